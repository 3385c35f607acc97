#!/usr/bin/env bash
# Packs what was built for machines that have neither compiler, Open MPI nor network: the command, the programs that gpu_check.sh
# runs, their libraries, a relocated Open MPI, configs, test data and scripts. The folder may lie anywhere and be moved.
#
#   dattn-bundle/dattn, mpirun        the commands, with their libraries found
#                env.sh               the same for a shell: source it
#                launch/gpu_check.sh  correctness and speed on a GPU
#                build/release/       bin, lib (ours), deps (the system's), openmpi
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/bundle.sh [--out FILE]
  Packs the build (build/release, or DATTN_BUILD=FOLDER) into FILE (default build/dattn-bundle.tar.xz); the name's end picks the
  packer: .tar.xz, .tar.zst, .tar.gz. What is not built is left out: without nvcc at build time there is no CUDA module.
    tar xf dattn-bundle.tar.xz; dattn-bundle/dattn doctor; dattn-bundle/launch/gpu_check.sh
exit codes: 0 done, 2 there is no build, or the bundle is larger than 60 MB
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
build=${DATTN_BUILD:-$root/build/release}
out=$root/build/dattn-bundle.tar.xz
limit=60000000  # bytes
programs=(dattn dattn_core_tests dattn_plugins_tests dattn_nccl_tests dattn_conformance_tests dattn_conformance_processes
          dattn_cudnn_bench)
libraries=(libdattn_mpi.so libdattn_cuda.so libdattn_cuda_standin.so libnccl_standin.so)
# Of Open MPI, what one machine needs, and ranks of srun (schizo_slurm knows them for what they are); the rest drags in libraries
# of networks and file systems.
unneeded='_(ofi|ucx|psm2?|openib|osc|io|fcoll|fbtl|fs|sharedfp|spml|scoll|memheap|sshmem|atomic|monitoring|gridengine)[_.]|_(ess|plm|ras)_slurm[.]'

say() { echo "bundle: $*" >&2; }
give_up() { say "$*"; exit 2; }

while [[ $# -gt 0 ]]; do
  case $1 in
    --out) [[ $# -ge 2 ]] || give_up "--out needs a file"; out=$2; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "bundle.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
case $out in
  *.tar.xz) packer=(xz -6 -T0 -c) ;;
  *.tar.zst) packer=(zstd -19 -T0 -q -c) ;;
  *.tar.gz) packer=(gzip -9 -c) ;;
  *) give_up "$out ends in none of .tar.xz, .tar.zst, .tar.gz" ;;
esac
[[ -x $build/bin/dattn ]] || give_up "$build has no bin/dattn; build first: cmake --preset release && cmake --build --preset release"

work=$(mktemp -d "${out%/*}/bundle.XXXXXX")
trap 'rm -rf "$work"' EXIT
to=$work/dattn-bundle
release=$to/build/release
mkdir -p "$release/bin" "$release/lib" "$release/deps" "$to/build/data"

# Strips a copy; what cannot be stripped stays as it is.
place() { cp -L "$1" "$2" && { strip --strip-unneeded "$2/$(basename "$1")" 2>/dev/null || true; }; }

place_build() {
  local name
  for name in "${programs[@]}"; do
    if [[ -x $build/bin/$name ]]; then place "$build/bin/$name" "$release/bin"; else say "not built, left out: $name"; fi
  done
  for name in "${libraries[@]}"; do
    if [[ -f $build/lib/$name ]]; then place "$build/lib/$name" "$release/lib"; else say "not built, left out: $name"; fi
  done
}

# Where the linker finds Open MPI's parts; nothing is placed where there is none.
place_openmpi() {
  local orterun plugins share plugin pmix
  if ! { command -v mpirun && command -v ompi_info; } >/dev/null; then say "no Open MPI here, left out"; return; fi
  orterun=$(readlink -f "$(command -v mpirun)")
  plugins=$(ompi_info --path pkglibdir --parsable | sed 's/^[^/]*//')
  share=$(ompi_info --path pkgdatadir --parsable | sed 's/^[^/]*//')
  mkdir -p "$release/openmpi/bin" "$release/openmpi/lib/openmpi3" "$release/openmpi/share"
  cp "$orterun" "$release/openmpi/bin/mpirun"
  cp "$(readlink -f "$(command -v orted)")" "$release/openmpi/bin/orted"
  for plugin in "$plugins"/mca_*.so; do
    [[ $(basename "$plugin") =~ $unneeded ]] || place "$plugin" "$release/openmpi/lib/openmpi3"
  done
  cp -rL "$share" "$release/openmpi/share/openmpi"
  pmix=$(ldd "$plugins"/mca_pmix_ext*.so 2>/dev/null | awk '/libpmix/{print $3}')
  [[ -n $pmix ]] || return 0  # built into Open MPI
  pmix=$(dirname "$(dirname "$(readlink -f "$pmix")")")
  mkdir -p "$release/openmpi/lib/pmix"
  for plugin in "$pmix"/lib/pmix/*.so; do place "$plugin" "$release/openmpi/lib/pmix"; done
  [[ ! -d $pmix/share/pmix ]] || cp -rL "$pmix/share/pmix" "$release/openmpi/share/pmix"
}

# The libraries of the system that what is placed needs, but for those that belong to the kernel and the C library.
place_dependencies() {
  local file
  find "$release" -type f \( -perm -100 -o -name '*.so' \) -print0 | xargs -0 -n 1 ldd 2>/dev/null |
    awk '/=> \//{print $3}' | sort -u | grep -vE '/(ld-linux[^/]*|lib(c|m|dl|rt|pthread|resolv|util))\.so' |
    while read -r file; do place "$file" "$release/deps"; done
}

place_scripts() {
  local file
  for file in launch/gpu_check.sh launch/gpu_report.awk tests/bench/gpu_torch.py; do
    mkdir -p "$to/$(dirname "$file")"
    cp "$root/$file" "$to/$file"
  done
  cp -r "$root/configs" "$to/configs"
  cp "$root/LICENSE" "$to"
  [[ ! -s $root/build/data/austen.txt ]] || cp "$root/build/data/austen.txt" "$to/build/data"
  git -C "$root" describe --always --dirty --abbrev=12 >"$to/COMMIT" 2>/dev/null || echo unknown >"$to/COMMIT"
  getconf GNU_LIBC_VERSION >"$to/GLIBC"
}

# Shell text that finds the bundle wherever it lies.
write_environment() {
  cat >"$to/env.sh" <<'END'
# Source this in bash: commands and libraries of the bundle first. What the shell had is in DATTN_OUTER_LD_LIBRARY_PATH.
_dattn=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ ${DATTN_BUNDLE:-} != "$_dattn" ]]; then
  export DATTN_BUNDLE=$_dattn DATTN_OUTER_LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
  export LD_LIBRARY_PATH=$_dattn/build/release/deps${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export PATH=$_dattn/build/release/openmpi/bin:$_dattn/build/release/bin:$PATH
  export PMIX_PREFIX=$_dattn/build/release/openmpi PMIX_LIBDIR=$_dattn/build/release/openmpi/lib
  export OPAL_PREFIX=$_dattn/build/release/openmpi OPAL_LIBDIR=$_dattn/build/release/openmpi/lib
  # One machine: no remote shell is looked for, and the plugins are those of the bundle.
  export OMPI_MCA_plm=isolated OMPI_MCA_mca_base_component_path=$_dattn/build/release/openmpi/lib/openmpi3
fi
unset _dattn
END
  local name
  for name in dattn mpirun; do
    cat >"$to/$name" <<'END'
#!/usr/bin/env bash
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
END
    echo "exec $name \"\$@\"" >>"$to/$name"
    chmod 755 "$to/$name"
  done
}

place_build
place_openmpi
place_dependencies
place_scripts
write_environment
tar -C "$work" --owner=0 --group=0 --sort=name -cf - dattn-bundle | "${packer[@]}" >"$out.part"
mv "$out.part" "$out"
bytes=$(stat -c %s "$out")
say "$out: $bytes bytes packed, $(du -sb "$to" | cut -f1) unpacked"
[[ $bytes -lt $limit ]] || give_up "that is more than $limit bytes"
