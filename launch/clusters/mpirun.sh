#!/usr/bin/env bash
# Trains over the machines of a host file with Open MPI. A host file has lines like "node1 slots=2": ranks per machine, on machines
# with GPUs as many as it has.
#   launch/clusters/mpirun.sh HOSTFILE CONFIG [--set key=value ...]
set -euo pipefail

[[ $# -ge 2 ]] || { echo "usage: $0 HOSTFILE CONFIG [ARGUMENTS...]" >&2; exit 2; }
hosts=$1
shift
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
dattn=${DATTN_BUILD:-$root/build/release}/bin/dattn
ranks=$("$dattn" mesh-ranks train "$@")

# What the user set for NCCL and dattn holds on the other machines too.
exported=()
for name in $(compgen -e | grep -E '^(NCCL|DATTN|CUDA|OMP)_' || true); do exported+=(-x "$name"); done
# --bind-to none: a rank runs several threads. The node's interface can be chosen with, for example,
# DATTN_MPIRUN_ARGS="--mca btl_tcp_if_include eth0".
# shellcheck disable=SC2086  # several words are meant
exec mpirun -np "$ranks" --hostfile "$hosts" --bind-to none "${exported[@]}" ${DATTN_MPIRUN_ARGS:-} "$dattn" train "$@"
