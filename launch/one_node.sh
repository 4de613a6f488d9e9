#!/usr/bin/env bash
# Every accelerator of this machine, or NPROC_PER_NODE ranks.
#
# usage: launch/one_node.sh key=value ...
#   NPROC_PER_NODE   ranks to start; auto (the default): one for each accelerator, without any one for each CPU core
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${NPROC_PER_NODE:-auto}" -m epmoe.generate "$@"
