#!/usr/bin/env bash
# One to four machines that may come and go: when one fails or joins, all start again from the latest checkpoint, at the
# world size that there is then.
#
#   FIRST_NODE=10.0.0.1 launchers/recipes/elastic.sh [settings...]      the same line on every machine
#
# To change: what two_nodes.sh names, and
#   NODES        the fewest and the most machines (1:4)
#   RESTARTS     how often all start again after a failure before torchrun gives up (3)
#   --batch-size must divide by the ranks of every size that may occur: 96 does for 1 to 4 machines of 8
#   --tensor-parallel, if given, must divide the ranks of every size too: a checkpoint resumes at the same
#   --save-every steps between checkpoints: what a failure costs at most
# The machine at FIRST_NODE holds the rendezvous and has to stay. A folder in OUT without a checkpoint is begun anew.
set -euo pipefail

: "${FIRST_NODE:?the name or address of the machine that stays}"
LEVEL=${LEVEL:-O3}
PRESET=${PRESET:-tiny}
export OUT=${OUT:-runs/$PRESET-$LEVEL-elastic}
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

# Every process looks for itself, at every start, before any of them writes.
# shellcheck disable=SC2016  # expanded in the process that starts, not here
START='if compgen -G "$OUT/step-*/checkpoint.json" >/dev/null; then FROM="--resume latest"; else FROM=--overwrite; fi
exec python -m msamp_like.launchers.pretrain "$@" --out "$OUT" $FROM'

torchrun --nnodes "${NODES:-1:4}" --nproc-per-node "${RANKS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:${PORT:-29400}" --rdzv-id "${JOB:-elastic}" \
    ${IS_HOST:+--rdzv-conf "is_host=$IS_HOST"} --no-python bash -c "$START" pretrain \
    --preset "$PRESET" --level "$LEVEL" --batch-size 96 --save-every 100 "$@"
