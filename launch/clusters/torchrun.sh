#!/usr/bin/env bash
# Starts dattn's ranks with torchrun, for clusters whose tooling already does that. Run it on every node with the same
# arguments; one node needs no variables.
#   NODES=2 NODE=0 HEAD=node0 PORT=29500 RANKS_PER_NODE=2 launch/clusters/torchrun.sh CONFIG [--set key=value ...]
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: $0 CONFIG [ARGUMENTS...]" >&2; exit 2; }
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
dattn=${DATTN_BUILD:-$root/build/release}/bin/dattn
nodes=${NODES:-1}
here=${RANKS_PER_NODE:-$(($("$dattn" mesh-ranks train "$@") / nodes))}

exec torchrun --no-python --nnodes="$nodes" --node-rank="${NODE:-0}" --nproc-per-node="$here" \
  --master-addr="${HEAD:-127.0.0.1}" --master-port="${PORT:-29500}" "$dattn" train "$@"
