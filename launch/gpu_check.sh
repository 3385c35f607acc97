#!/usr/bin/env bash
# Checks and measures dattn on a machine with one or more GPUs, and writes one report. Each step's result is kept as soon as it
# is there, so that a run which a time limit cut goes on where it stopped. Works in the repository and in an unpacked bundle
# (launch/bundle.sh) alike.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gpu_check.sh [--out FOLDER] [--limit SECONDS] [--quick] [--only STEP,..] [--dry-run] [--standin]
  Builds dattn with its CUDA module when build/release has none (or takes DATTN_BUILD=FOLDER), then runs the steps whose result
  FOLDER (default build/gpu_check) does not hold yet: correctness first, then speed. Writes FOLDER/results.json and
  FOLDER/report.md; each step's output is in FOLDER/STEP.log.
  --limit SECONDS  starts no step after that time and ends the one that runs (default 480); call again to go on
  --quick          a few small cases of each step
  --only STEP,..   these steps, again
  --dry-run        prints the commands of the steps that are left
  --standin        over the tests' stand-ins for CUDA, cuDNN and NCCL on host memory: everything but the numbers; implies --quick
steps: doctor kernels layers generation nccl conformance_1 conformance_threads conformance_nccl determinism training curves
       training_invariant same_bits bench_product clocks raw_cudnn bench_attention bench_fp32 bench_virtual_ranks decode same_text gpt2
       torch
DATTN_PYTHON names a python that has PyTorch, to compare with (else build/venv's or python3).
exit codes: 0 all passed, 1 a step failed, 2 bad input, 3 the time was up first: call again
END
}

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
out=$root/build/gpu_check
only='' dry_run=no standin=no quick=no limit=480
while [[ $# -gt 0 ]]; do
  case $1 in
    --out | --only | --limit) [[ $# -ge 2 ]] || { echo "gpu_check.sh: $1 needs a value" >&2; exit 2; } ;;&
    --out) out=$2; shift ;;
    --only) only=,$2,; shift ;;
    --limit) limit=$2; shift ;;
    --quick) quick=yes ;;
    --dry-run) dry_run=yes ;;
    --standin) standin=yes quick=yes ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[[ $limit =~ ^[1-9][0-9]*$ ]] || { echo "gpu_check.sh: --limit $limit is no number of seconds" >&2; exit 2; }
# shellcheck source=/dev/null  # of a bundle
[[ ! -f $root/env.sh ]] || . "$root/env.sh"
build=${DATTN_BUILD:-$root/build/release}
bin=$build/bin
results=$out/results.jsonl
mkdir -p "$out"
touch "$results"

if [[ ! -x $bin/dattn ]]; then
  if [[ $dry_run == yes ]]; then
    echo "+ launch/setup.sh; cmake --preset release; cmake --build --preset release" >&2
  else
    "$root/launch/setup.sh"
    (cd "$root" && cmake --preset release && cmake --build --preset release)
  fi
elif ! said=$("$bin/dattn" --version 2>&1); then
  echo "gpu_check.sh: $bin/dattn does not start: $said" >&2
  [[ ! -f $root/GLIBC ]] || echo "built with $(cat "$root/GLIBC"), this machine has $(getconf GNU_LIBC_VERSION 2>&1)" >&2
  exit 2
fi

# Open MPI as root, more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 DATTN_LOG=${DATTN_LOG:-quiet}
mpi=(mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1)
sizes=(512 1024 2048 4096 8192 16384)
dims=(64 128)
strategies=(ring ulysses)  # and, but for --quick, all others that doctor lists
load=(--size 8192 --repeat 2000)  # some seconds
train=(--set train.steps=100 --set train.eval_every=0)
gpt2=(--steps 20 --set train.batch=8 --set dtype=bf16)
tokens=256 product=8192 fp32_size=4096 repeat=10
if [[ $quick == yes ]]; then
  sizes=(512 2048) dims=(128) product=2048 fp32_size=2048 tokens=32 repeat=3
fi
kernels='*Cuda*:*Cudnn*:-CudaNn*' generation='*OnCuda*:*TokenGraph*' layers='CudaNn*'
one_rank='*_1_ranks' invariant='*nvarian*' meshes='*nvarian*:*Repeatable*'
others='-Sweep/*' raw=dattn_cudnn_bench torch=()
if [[ $standin == yes ]]; then
  export DATTN_CUDA_MODULE=$build/lib/libdattn_cuda_standin.so DATTN_NCCL=$build/lib/libnccl_standin.so
  sizes=(64) product=64 fp32_size=64 tokens=4 repeat=1 load=(--size 64 --repeat 3)
  # A few of what the default tests run.
  kernels='CudaKernel.*:StepGraph*:Cudnn*' generation='GenerationOnCuda.*'
  one_rank='*/ring_1_ranks' invariant='CudaInvariant.IsStillAttention' meshes='*Invariant.*/causal:*Repeatable.*/ring'
  others='Refusal.*:Bytes.*' raw=dattn_cudnn_bench_standin torch=(--cpu)
  small=(--set train.batch=2 --set train.seq_len=32 --set train.eval_batches=1 --set train.sample_length=0 --set model.layers=1)
  train=(--set train.steps=3 --set train.eval_every=0 "${small[@]}")
  gpt2=("${small[@]}" --steps 1 --set model.dim=64 --set model.heads=2 --set model.hidden=64 --set model.vocab=256)
fi

result_of() { tac "$results" | grep -m 1 "\"step\": \"$1\"" || true; }  # the newest
record() {  # record NAME EXIT SECONDS RESULT
  printf '{"step": "%s", "exit": %d, "seconds": %d, "result": %s}\n' "$@" >>"$results"
}

wanted() {  # wanted NAME: the step is asked for, or has not passed yet
  if [[ -n $only ]]; then [[ $only == *",${1%%:*},"* || $only == *",$1,"* ]]
  else [[ $(result_of "$1") != *'"exit": 0'* ]]
  fi
}

cut=no
# One step: step NAME SECONDS COMMAND.. . Its last line of output that is JSON is the result.
step() {
  local name=$1 most=$2 status=0 start=$SECONDS log left=$((limit - SECONDS)) last
  shift 2
  wanted "$name" || return 0
  { printf '+'; printf ' %q' "$@"; echo; } >&2
  [[ $dry_run == no ]] || return 0
  if [[ $cut == yes || $left -lt 2 ]]; then
    cut=yes
    return 0
  fi
  log=$out/${name//[:,=]/_}.log
  timeout -k 5 $((most < left ? most : left)) "$@" >"$log" 2>&1 </dev/null || status=$?
  if [[ $status -eq 124 && $left -lt $most ]]; then
    cut=yes
    return 0
  fi
  last=$(grep -E '^\{.*\}$' "$log" | tail -1 || true)
  record "$name" "$status" $((SECONDS - start)) "${last:-null}"
  if [[ $status -ne 0 ]]; then
    echo "gpu_check: step $name failed ($status); the end of $log:" >&2
    tail -5 "$log" >&2
  fi
}

tests() { step "$1" "$2" env DATTN_TEST_DEVICE=cuda "$bin/$3" --gtest_brief=1 --gtest_filter="$4"; }
bench() { step "$1" 200 "$bin/dattn" bench attention --json --set device=cuda --dtype bf16 --backward --repeat "$repeat" "${@:2}"; }

step doctor 120 "$bin/dattn" doctor --json --set device=cuda
found=$(result_of doctor)
listed=$found
if [[ $listed != *'"strategies":'* && -x $bin/dattn ]]; then listed=$("$bin/dattn" doctor --json --set device=cpu | tail -1 || true); fi
if [[ $quick == no && $listed =~ \"strategies\":\[([^]]*)\] ]]; then IFS=, read -ra strategies <<<"${BASH_REMATCH[1]//\"/}"; fi
devices=1
[[ ! $found =~ ([0-9]+)' device(s)' ]] || devices=${BASH_REMATCH[1]}

tests kernels 400 dattn_core_tests "$kernels"
tests layers 400 dattn_core_tests "$layers"
tests generation 400 dattn_plugins_tests "$generation"
tests conformance_1 400 dattn_conformance_tests "$one_rank"
for strategy in "${strategies[@]}"; do
  filter="*/${strategy}_2_ranks:*/${strategy}_4_ranks"
  [[ $quick == yes ]] || filter+=":*/${strategy}_8_ranks"
  [[ $standin == no ]] || filter="*/${strategy}_2_ranks"
  tests "conformance_threads:$strategy" 400 dattn_conformance_tests "$filter"
done
if [[ $dry_run == no && $found != *'"nccl":{"found":true'* ]]; then
  for name in nccl conformance_nccl; do
    ! wanted $name || record $name 0 0 '{"absent": "no NCCL: see doctor"}'
  done
else
  # Ranks that are threads have a device each. The last two know how the stand-in adds.
  filter='NcclAbi.*:*.Staged/*'
  for ranks in 1 2 3 4; do [[ $ranks -gt $devices ]] || filter+=":*.OverNccl*/*$ranks"; done
  [[ $devices -lt 3 ]] || filter+=':Nccl.*-Nccl.SumsOfItsOwn*:Nccl.CollectivesOfItsOwn*'
  tests nccl 400 dattn_nccl_tests "$filter"
  # A process for each rank; those that share a device talk by loopback, some ms a call.
  for ranks in 2 4; do
    for cases in "${strategies[@]}" others; do
      filter="*/${cases}_${ranks}_ranks"
      [[ $cases != others ]] || filter=$others
      step "conformance_nccl:$ranks,$cases" 400 "${mpi[@]}" -np "$ranks" env DATTN_TEST_DEVICE=cuda DATTN_TEST_TRANSFERS=nccl \
        DATTN_TEST_RANKS_PER_DEVICE=$((devices >= ranks ? 1 : 64)) "$bin/dattn_conformance_processes" --gtest_brief=1 \
        --gtest_filter="$filter"
    done
  done
fi
step determinism 400 env DATTN_TEST_DEVICE=cuda "$bin/dattn_core_tests" --gtest_brief=1 --gtest_filter="$invariant"
tests determinism:meshes 400 dattn_conformance_tests "$meshes"
for device in cpu cuda; do
  step "training:$device" 400 "$bin/dattn" train "$root/configs/quickstart.yaml" --ranks 1 --json --set mesh.ring=1 --set mesh.ulysses=1 \
    "${train[@]}" --set "device=$device" --set "train.out=$out/train_$device"
done
step curves 20 awk -v mode=curves -f "$root/launch/gpu_report.awk" "$out/training_cpu.log" "$out/training_cuda.log"
for ranks in 1 2; do
  step "training_invariant:$ranks" 400 "$bin/dattn" train "$root/configs/quickstart.yaml" --ranks "$ranks" --json \
    --set "mesh.ring=$ranks" --set mesh.ulysses=1 "${train[@]}" --set device=cuda --set "ranks_per_device=$ranks" \
    --set determinism=invariant --set "train.out=$out/train_invariant_$ranks"
done
step same_bits 20 awk -v mode=curves -v tolerance=0 -f "$root/launch/gpu_report.awk" "$out/training_invariant_1.log" \
  "$out/training_invariant_2.log"

products=("$bin/dattn" bench product --json --set device=cuda --dtype bf16)
step bench_product 120 "${products[@]}" --size "$product"
# The clock that a device keeps while it works. nvidia-smi may not be there.
# shellcheck disable=SC2016  # expanded by the shell that runs it
sample='nvidia-smi -i "${CUDA_VISIBLE_DEVICES%%,*}" --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits -lms 100 >"$0" &
"$@"; status=$?; kill $! 2>/dev/null; exit $status'
step clocks 120 env CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" bash -c "$sample" "$out/clocks.csv" "${products[@]}" "${load[@]}"
[[ $dry_run == yes || -x $bin/$raw ]] || ! wanted raw_cudnn || record raw_cudnn 0 0 '{"absent": "built without cuDNN"}'
for seq in "${sizes[@]}"; do
  for dim in "${dims[@]}"; do
    for mask in full causal; do
      heads=$((2048 / dim)) batch=$((16384 / seq))
      [[ $standin == no ]] || heads=1 batch=1
      shape=(--seq "$seq" --batch "$batch" --heads "$heads" --dim "$dim" --mask "$mask")
      [[ $dry_run == no && ! -x $bin/$raw ]] || step "raw_cudnn:$seq,$dim,$mask" 200 "$bin/$raw" --repeat "$repeat" "${shape[@]}"
      bench "bench_attention:$seq,$dim,$mask" "${shape[@]}"
      step "bench_attention:$seq,$dim,$mask,cuda" 200 env DATTN_KERNEL=cuda "$bin/dattn" bench attention --json --set device=cuda \
        --dtype bf16 --backward --repeat "$repeat" "${shape[@]}"
    done
  done
done
for dim in "${dims[@]}"; do
  for mask in full causal; do
    heads=$((2048 / dim))
    [[ $standin == no ]] || heads=1
    for tf32 in false true; do
      name=bench_fp32:$fp32_size,$dim,$mask
      [[ $tf32 == false ]] || name+=,tf32
      step "$name" 200 "$bin/dattn" bench attention --json --set device=cuda --set tf32=$tf32 --dtype fp32 --backward \
        --repeat "$repeat" --seq "$fp32_size" --batch 1 --heads "$heads" --dim "$dim" --mask "$mask"
    done
  done
done
for mesh in ring=1 ring=4 ulysses=4 ring=8; do
  bench "bench_virtual_ranks:$mesh" --set ranks_per_device=8 --ranks "${mesh#*=}" --mesh "$mesh" --seq "${sizes[-1]}" --heads 8 \
    --dim 128 --mask causal
done
decode=("$bin/dattn" generate "$out/train_cuda" --json --set device=cuda --prompt "It is a truth" --max-tokens "$tokens")
step decode 200 "${decode[@]}"
step decode:no_graphs 200 "${decode[@]}" --no-graphs
step same_text 20 awk -v mode=texts -f "$root/launch/gpu_report.awk" "$out/decode.log" "$out/decode_no_graphs.log"
step gpt2 300 "$bin/dattn" bench train "$root/configs/models/gpt2_124m.yaml" --ranks 1 --json --set device=cuda "${gpt2[@]}"
# Not with the bundle's libraries: they may be older than PyTorch's.
python=(env "LD_LIBRARY_PATH=${DATTN_OUTER_LD_LIBRARY_PATH-${LD_LIBRARY_PATH:-}}" "${DATTN_PYTHON:-$root/build/venv/bin/python}")
[[ -x ${python[2]} ]] || python[2]=python3
usable='import torch; assert torch.cuda.is_available()'
[[ $standin == no ]] || usable='import torch'
if [[ $dry_run == yes ]] || { [[ $cut == no ]] && wanted torch && "${python[@]}" -c "$usable" 2>/dev/null; }; then
  step torch 400 "${python[@]}" "$root/tests/bench/gpu_torch.py" "${torch[@]}" "${sizes[@]}"
fi
[[ $dry_run == no ]] || exit 0

commit=$(cat "$root/COMMIT" 2>/dev/null || git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
gpu=$(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader 2>/dev/null | paste -sd ';' || true)
[[ $standin == no ]] || gpu="none: stand-ins on host memory, no figure says anything about a GPU"
awk -v mode=report -v date="$(date -u +%Y-%m-%d)" -v commit="$commit" -v gpu="${gpu:-nvidia-smi is not there}" -v cut="$cut" \
  -v clocks="$out/clocks.csv" -v json="$out/results.json" -f "$root/launch/gpu_report.awk" "$results" >"$out/report.md"
cat "$out/report.md"
if [[ $cut == yes ]]; then
  echo "gpu_check: $limit s are over; call again to go on" >&2
  exit 3
fi
! grep -q '"exit": [1-9]' "$out/results.json"
