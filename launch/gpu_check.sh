#!/usr/bin/env bash
# Checks and measures dattn on a machine with one or more GPUs, and writes one report. Each step's result is kept as soon as it
# is there, so that a run which a time limit cut goes on where it stopped.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gpu_check.sh [--out FOLDER] [--only STEP,..] [--dry-run] [--standin]
  Builds dattn with its CUDA module when build/release has none (or takes the bundle's: DATTN_BUILD=FOLDER), then runs the steps
  whose result FOLDER (default build/gpu_check) does not hold yet: correctness first, then speed. Writes FOLDER/results.jsonl
  and FOLDER/report.md.
  --only STEP,..  these steps, again
  --dry-run       prints the commands
  --standin       over the tests' stand-ins for CUDA and NCCL on host memory: everything but the numbers
steps: doctor kernels layers conformance_1 conformance_threads conformance_nccl determinism training
       bench_attention bench_virtual_ranks torch
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/build/gpu_check
build=${DATTN_BUILD:-$root/build/release}
only=
dry_run=no
standin=no
while [[ $# -gt 0 ]]; do
  case $1 in
    --out) out=$2; shift ;;
    --only) only=,$2,; shift ;;
    --dry-run) dry_run=yes ;;
    --standin) standin=yes ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
bin=$build/bin
results=$out/results.jsonl
mkdir -p "$out"
touch "$results"

# Open MPI as root, more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 DATTN_LOG=${DATTN_LOG:-quiet}
mpi=(mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1)
sizes=(512 1024 2048 4096 8192 16384)
sweep=()
if [[ $standin == yes ]]; then
  export DATTN_CUDA_MODULE=$build/lib/libdattn_cuda_standin.so DATTN_NCCL=$build/lib/libnccl_standin.so
  sizes=(64)
  sweep=(--gtest_filter='*ring_*:*ulysses_*')
fi

# One step: step NAME SECONDS COMMAND.. . Its last line of output that is JSON goes into the results.
step() {
  local name=$1 limit=$2 status=0 start=$SECONDS log
  shift 2
  if [[ -n $only ]]; then
    [[ $only == *",${name%%:*},"* ]] || return 0
  elif grep -q "\"step\": \"$name\", \"exit\": 0" "$results"; then
    return 0
  fi
  { printf '+'; printf ' %q' "$@"; echo; } >&2
  [[ $dry_run == no ]] || return 0
  log=$out/${name//:/_}.log
  timeout "$limit" "$@" >"$log" 2>&1 || status=$?
  local last
  last=$(grep -E '^\{.*\}$' "$log" | tail -1 || true)
  printf '{"step": "%s", "exit": %d, "seconds": %d, "result": %s}\n' "$name" "$status" $((SECONDS - start)) "${last:-null}" \
    >>"$results"
  if [[ $status -ne 0 ]]; then
    echo "gpu_check: step $name failed ($status); the end of $log:" >&2
    tail -5 "$log" >&2
  fi
}

if [[ $dry_run == no && ! -x $bin/dattn ]]; then
  "$root/launch/setup.sh"
  (cd "$root" && cmake --preset release && cmake --build --preset release)
fi

step doctor 120 "$bin/dattn" doctor --json --set device=cuda
step kernels 400 "$bin/dattn_core_tests" --gtest_brief=1 --gtest_filter='*Cuda*:*Cudnn*'
step conformance_1 400 env DATTN_TEST_DEVICE=cuda "$bin/dattn_conformance_tests" --gtest_brief=1 --gtest_filter='*_1_ranks'
step conformance_threads 600 env DATTN_TEST_DEVICE=cuda "$bin/dattn_conformance_tests" --gtest_brief=1 \
  "${sweep[@]:---gtest_filter=*_2_ranks:*_4_ranks:*_8_ranks}"
for ranks in 2 4; do
  step "conformance_nccl:$ranks" 600 "${mpi[@]}" -np "$ranks" env DATTN_TEST_DEVICE=cuda DATTN_TEST_TRANSFERS=nccl \
    "$bin/dattn_conformance_processes"
done
step determinism 400 env DATTN_TEST_DEVICE=cuda "$bin/dattn_conformance_tests" --gtest_brief=1 --gtest_filter='*nvarian*'
for device in cpu cuda; do
  step "training:$device" 400 "$bin/dattn" train "$root/configs/quickstart.yaml" --ranks 1 --json --set mesh.ring=1 --set mesh.ulysses=1 \
    --set train.steps=100 --set train.eval_every=0 --set "device=$device" --set "train.out=$out/train_$device"
done

for seq in "${sizes[@]}"; do
  for dim in 64 128; do
    for mask in full causal; do
      heads=$((2048 / dim)) batch=$((16384 / seq))
      [[ $standin == no ]] || heads=1 batch=1
      step "bench_attention:$seq,$dim,$mask" 120 "$bin/dattn" bench attention --json --set device=cuda --dtype bf16 --seq "$seq" \
        --batch "$batch" --heads "$heads" --dim "$dim" --mask "$mask" --backward --repeat 10
    done
  done
done
for mesh in ring=1 ring=4 ulysses=4 ring=8; do
  step "bench_virtual_ranks:$mesh" 200 "$bin/dattn" bench attention --json --set device=cuda --set ranks_per_device=8 \
    --ranks "${mesh#*=}" --mesh "$mesh" --dtype bf16 --seq "${sizes[-1]}" --heads 8 --dim 128 --mask causal --backward --repeat 5
done
if [[ -x $root/build/venv/bin/python ]] || python3 -c 'import torch' 2>/dev/null; then
  python=$root/build/venv/bin/python
  [[ -x $python ]] || python=python3
  step torch 400 "$python" "$root/tests/bench/gpu_torch.py" "${sizes[@]}"
fi
[[ $dry_run == no ]] || exit 0

{
  echo "# dattn on a GPU"
  echo
  echo "- date: $(date -u +%Y-%m-%d)"
  echo "- commit: $(git -C "$root" rev-parse --short HEAD 2>/dev/null || cat "$root/COMMIT" 2>/dev/null || echo unknown)"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader | sed 's/^/- GPU: /'
  fi
  [[ $standin == no ]] || echo "- over the stand-ins on host memory: no figure says anything about a GPU"
  echo
  echo "| step | exit | seconds | result |"
  echo "|---|---|---|---|"
  # shellcheck disable=SC2016  # no expansions are meant
  sed -E 's/^\{"step": "([^"]*)", "exit": ([0-9]+), "seconds": ([0-9]+), "result": (.*)\}$/| \1 | \2 | \3 | `\4` |/' "$results"
} >"$out/report.md"
cat "$out/report.md"
! grep -qE '"exit": [1-9]' "$results"
