#!/usr/bin/env bash
# Any preset on the processes of one machine.
#
#   LEVEL=O3 PRESET=small launchers/recipes/one_node.sh [settings...]      for example --steps 1000 --data 'text/*.txt'
#
# To change: RANKS, the processes of this machine (default: one a GPU; give a number on a CPU); any setting that
# `python -m msamp_like.launchers.pretrain --help` lists, which wins over what stands here. --batch-size counts the
# sequences of all ranks together and must divide by their number times --micro-batches, over --tensor-parallel.
# Where a model or its activations are too large for one rank: --tensor-parallel 2 --sequence-parallel; where gradients of
# all parameters are: --zero-stage 2.
set -euo pipefail

LEVEL=${LEVEL:-O3}
PRESET=${PRESET:-tiny}

torchrun --standalone --nproc-per-node "${RANKS:-gpu}" -m msamp_like.launchers.pretrain \
    --preset "$PRESET" --level "$LEVEL" --out "${OUT:-runs/$PRESET-$LEVEL}" "$@"
