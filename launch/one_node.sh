#!/usr/bin/env bash
# Every accelerator of this machine, or NPROC_PER_NODE ranks.
#
# usage: launch/one_node.sh [serve] key=value ...      serve: over HTTP
#   NPROC_PER_NODE   ranks to start; auto (the default): one for each accelerator, without any one for each CPU core
set -euo pipefail

module=epmoe.generate
[ "${1:-}" != serve ] || { module=epmoe.serve && shift; }
exec torchrun --standalone --nproc-per-node "${NPROC_PER_NODE:-auto}" -m "$module" "$@"
