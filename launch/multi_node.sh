#!/usr/bin/env bash
# One of several nodes. Run it on each of them with the same values, NODE_RANK apart, and the same keys.
#
# usage: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node launch/multi_node.sh [serve] key=value ...
#   NNODES           nodes
#   NODE_RANK        which of them this is, from 0; node 0 has the generated text, or HTTP
#   MASTER_ADDR      name or address of node 0 that all nodes reach
#   MASTER_PORT      a free port of node 0; 29500 unless set
#   NPROC_PER_NODE   ranks on each node; auto (the default): one for each accelerator
set -euo pipefail

: "${NNODES:?set it to the number of nodes}"
: "${NODE_RANK:?set it to 0 on the first node, 1 on the second, ...}"
: "${MASTER_ADDR:?set it to the name or address of node 0}"
module=epmoe.generate
[ "${1:-}" != serve ] || { module=epmoe.serve && shift; }

exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${NPROC_PER_NODE:-auto}" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" -m "$module" "$@"
