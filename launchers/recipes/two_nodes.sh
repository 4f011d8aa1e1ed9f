#!/usr/bin/env bash
# Two machines, started alike: run the same line on each; they meet at the first one's address.
#
#   FIRST_NODE=10.0.0.1 launchers/recipes/two_nodes.sh [settings...]
#
# To change:
#   FIRST_NODE   name or address of one of the two, which the other can reach; PORT (29400) must be open on it, and
#                between the two any other port, for the ranks choose theirs
#   RANKS        processes a machine, the same on both (default: one a GPU)
#   INTERFACE    the network device between them, where a machine has several: `ip -brief addr` lists them
#   IS_HOST      1 on the first and 0 on the other, where FIRST_NODE is no name that the first one knows itself by
#   ADDRESS      this machine's own address, where its host name does not lead there
#   OUT          on storage that both see: the first rank writes, a resume reads on all
#   --tensor-parallel N splits each model over N neighbours: at most RANKS, or its activations cross between the machines
set -euo pipefail

: "${FIRST_NODE:?the name or address of one of the two machines}"
LEVEL=${LEVEL:-O3}
PRESET=${PRESET:-tiny}
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

torchrun --nnodes 2 --nproc-per-node "${RANKS:-gpu}" ${ADDRESS:+--local-addr "$ADDRESS"} \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:${PORT:-29400}" --rdzv-id "${JOB:-two_nodes}" \
    ${IS_HOST:+--rdzv-conf "is_host=$IS_HOST"} -m msamp_like.launchers.pretrain \
    --preset "$PRESET" --level "$LEVEL" --out "${OUT:-runs/$PRESET-$LEVEL}" "$@"
