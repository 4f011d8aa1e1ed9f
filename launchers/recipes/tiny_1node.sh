#!/usr/bin/env bash
# The smallest comparison: `tiny` (3.2 M parameters, bytes as tokens) on two processes, at O2 and at O0 from one seed,
# then the table and the figure. Minutes on two CPU cores. What `make train` does.
#
#   launchers/recipes/tiny_1node.sh [settings...]      for example --steps 600 --seed 1
set -euo pipefail

OUT=${OUT:-runs/tiny}
RANKS=${RANKS:-2}

for level in O2 O0; do
    torchrun --standalone --nproc-per-node "$RANKS" -m msamp_like.launchers.pretrain \
        --preset tiny --level "$level" --out "$OUT/$level" --overwrite "$@"
done
python -m msamp_like.launchers.compare "$OUT/O2" "$OUT/O0" --out "$OUT/loss.png"
