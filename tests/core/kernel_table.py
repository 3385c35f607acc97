#!/usr/bin/env python3
"""What ptxas makes of the hot CUDA kernels: registers, spills, shared memory, tensor-core instructions. The table: docs/kernels.md.

  kernel_table.py           compiles them, optimised, for compute capability 9.0, and holds them to the limits below and, where
                            the compiler is the table's, to the table
  kernel_table.py --write   compiles them for every architecture and writes the table
  --nvcc PATH               else nvcc of PATH, CUDA_HOME or /usr/local/cuda
Needs nvdisasm: the toolkit's, or the one that launch/setup.sh --lint fetches.
Exit codes: 0 all is well, 1 a limit is passed, 77 a tool is missing."""
import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs/kernels.md"
CAPABILITIES = {"8.0": "sm_80", "9.0": "sm_90a", "10.0": "sm_100"}
TESTED = "9.0"
ATTENTION = "core/attention/cuda/"
MMA = [f"{ATTENTION}mma_{way}_{dim}.cu" for way in ("forward", "backward") for dim in (64, 128, 192, 256)]
SOURCES = [*MMA, f"{ATTENTION}merge_shares.cu", "core/attention/state.cu", "core/nn/norm.cu", "core/nn/optimizer.cu"]
# Of the sources without tensor cores: those that run often, by what stands in their text.
SMALL = {"row_loop<MergeRow<float>": "merge of shares of keys (decoding)", "each_row<Merge<float>": "merge of states",
         "row_loop<Forward>": "norm", "row_loop<InputGradient>": "gradient of norm: dx",
         "BlockSums<WeightGradient>": "gradient of norm: dw",
         "element_loop<Update>": "AdamW", "element_loop<Squares>": "norm of gradients"}

# A multiprocessor of any of these: registers, and the least shared memory among them, of which each block costs 1 KiB more.
REGISTERS, SHARED_BYTES, BLOCK_BYTES = 64 * 1024, 164 * 1024, 1024
MMA_THREADS = 128
# Blocks that must fit on a multiprocessor, so that one computes while another waits; with larger dims the sums, or tiles of
# TF32, fill it alone.
BLOCKS = {64: 2, 128: 2, 192: 1, 256: 1}
TF32_BLOCKS = {64: 2, 128: 1, 192: 1}
# Bytes that a kernel may spill to memory and back, all others none. These hold two sums, or one of 256 columns, in 128 registers
# beside the products and draw dropout's words; what they spill is addresses and a few scores, once a step of 32 rows.
SPILLS = {"gradient 128/128: dk and dv, dropout": 40, "gradient 256/256: dk, dropout": 56}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""
    name: str       # as in the table
    dim: int = 0    # of q and k; 0: no tensor cores
    tf32: bool = False
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    mma: int = 0       # tensor-core instructions in the text, not as often as they run
    ldmatrix: int = 0
    copies: int = 0    # asynchronous, to shared memory
    order: int = 0     # of its source

    def blocks(self):
        """Of a multiprocessor: registers are given to warps 256 at a time."""
        rounded = (self.registers * 32 + 255) // 256 * 256
        return min(REGISTERS // (rounded * MMA_THREADS // 32), SHARED_BYTES // (self.shared + BLOCK_BYTES))

    def cells(self):
        blocks = str(self.blocks()) if self.dim else "-"
        return [str(x) for x in (self.registers, self.spilled, self.shared, blocks, self.mma, self.ldmatrix, self.copies)]

    def complaints(self):
        if self.spilled > SPILLS.get(self.name, 0):
            yield f"spills {self.spilled} bytes, {SPILLS.get(self.name, 0)} are allowed"
        if not self.dim:
            return
        least = (TF32_BLOCKS if self.tf32 else BLOCKS)[self.dim]
        if self.blocks() < least:
            yield (f"{self.blocks()} block(s) fit on a multiprocessor, {least} should: {self.registers} registers and "
                   f"{self.shared} bytes of shared memory")
        counts = {"tensor-core instruction": self.mma, "ldmatrix": self.ldmatrix, "asynchronous copy": self.copies}
        for what, count in counts.items():
            if count == 0:
                yield f"there is no {what} in it"


def skip(why):
    print(f"kernel_table: skipped: {why}")
    sys.exit(77)


def find_tool(name, *places):
    for place in (*places, shutil.which(name), "/usr/local/cuda/bin/" + name):
        if place and os.access(place, os.X_OK):
            return str(place)
    return None


def run(*command):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"kernel_table: {' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout + result.stderr


class Tools:
    def __init__(self, nvcc):
        home = os.environ.get("CUDA_HOME")
        self.nvcc = nvcc or find_tool("nvcc", home and home + "/bin/nvcc")
        if not self.nvcc:
            skip("no nvcc in PATH, CUDA_HOME/bin or /usr/local/cuda/bin; install the CUDA toolkit, or name it with --nvcc")
        beside = pathlib.Path(os.path.realpath(self.nvcc)).parent / "nvdisasm"
        self.nvdisasm = find_tool("nvdisasm", beside, ROOT / "build/nvdisasm/bin/nvdisasm")
        if not self.nvdisasm:
            skip("no nvdisasm beside nvcc, in PATH or in build/nvdisasm/bin; launch/setup.sh --lint fetches it")
        self.release = re.search(r"V([\d.]+)", run(self.nvcc, "--version")).group(1)

    def compile(self, source, *options):
        return run(self.nvcc, "-std=c++20", "--expt-relaxed-constexpr", "-O2", f"-I{ROOT}", source, *options)


# Names ------------------------------------------------------------------------------------------------------------------------
TERMS = ("", ", score terms", ", dropout")
SUMS = ("dq", "dk and dv", "dk", "dv")
TF32 = 2  # of Factor (core/device/cuda/ptx.h)


def readable(mangled):
    """(name in the table, dim, in TF32?, shape of its shared memory) of a kernel, bf16 and fp16 alike. None: it is not in the
    table."""
    text = run("c++filt", mangled).strip().replace("(anonymous namespace)::", "")
    text = re.sub(r"\((?:dattn::cuda::)?(\w+)\)(\d+)", r"\2", text.replace("dattn::cuda::", ""))  # (Terms)2
    if found := re.search(r"mma_forward<(\d), (\d+), (\d+), (\d+), (\d+), (\d)>", text):
        factor, qk, v, tiles, step, terms = map(int, found.groups())
        label, shape = f"attention {qk}/{v}", f"forward_shared_bytes<{{}}, {{}}, {tiles}, {step}>"
    elif found := re.search(r"mma_backward<(\d), (\d+), (\d+), (\d), (\d)>", text):
        factor, qk, v, sums, terms = map(int, found.groups())
        label = f"gradient {qk}/{v}: {SUMS[sums]}"
        shape = f"backward_shared_bytes<{{}}, {{}}, kGradStep<static_cast<Factor>({factor if factor == TF32 else 0})>>"
    else:
        return next(((label, 0, False, None) for part, label in SMALL.items() if part in text), None)
    width = 4 if factor == TF32 else 2
    return label + (", TF32" if factor == TF32 else "") + TERMS[terms], qk, factor == TF32, shape.format(qk * width, v * width)


def shared_bytes(tools, folder, shapes):
    """Of launches: what the compiler makes of the constant expressions."""
    lines = [f'#include "{ATTENTION}mma_{way}_text.h"\n' for way in ("forward", "backward")]
    lines.append("using namespace dattn::cuda;\n")
    lines += [f'extern "C" __device__ unsigned long long shape_{i} = {shape}();\n' for i, shape in enumerate(shapes)]
    source, ptx = folder / "shapes.cu", folder / "shapes.ptx"
    source.write_text("".join(lines))
    tools.compile(source, "-ptx", "-arch=sm_90a", "-o", ptx)
    found = dict(re.findall(r"\.u64 shape_(\d+) = (\d+);", ptx.read_text()))
    return {shape: int(found[str(i)]) for i, shape in enumerate(shapes)}


# Measurement ------------------------------------------------------------------------------------------------------------------
def figures_of(tools, folder, source, capability):
    """By mangled name, of one file: registers, spilled bytes and counts of instructions."""
    cubin = folder / f"{pathlib.Path(source).stem}_{capability}.cubin"
    said = tools.compile(source, "-cubin", f"-arch={CAPABILITIES[capability]}", "-Xptxas=-v", "-o", cubin)
    figures = {}
    for name, rest in re.findall(r"Compiling entry function '(\S+)'(.*?Used \d+ registers)", said, re.S):
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", rest).groups()
        figures[name] = {"registers": int(re.search(r"Used (\d+)", rest).group(1)), "spilled": int(stores) + int(loads)}
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", run(tools.nvdisasm, cubin), flags=re.M)
    for name, text in zip(sections[1::2], sections[2::2]):
        # Loads of the generic kind, of the matrix kind, and products: HMMA of mma.sync, HGMMA of wgmma, UTC..MMA of tcgen05.
        for key, pattern in (("mma", r"\bU?(?:TC)?HG?MMA\b"), ("ldmatrix", r"\bLDSM\b"), ("copies", r"\bLDGSTS\b|\bUTMALDG\b")):
            if name in figures:
                figures[name][key] = len(re.findall(pattern, text))
    return figures


def measure(tools, sources, capabilities):
    """{kernel's name: {capability: the most that bf16 or fp16 takes}}"""
    jobs = [(source, capability) for source in sources for capability in capabilities]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = pathlib.Path(name)
        all_figures = list(pool.map(lambda job: figures_of(tools, folder, *job), jobs))
        names = {mangled: readable(mangled) for figures in all_figures for mangled in figures}
        shared = shared_bytes(tools, folder, sorted({known[3] for known in names.values() if known and known[3]}))
    table = {}
    for (source, capability), figures in zip(jobs, all_figures):
        for mangled, values in figures.items():
            if names[mangled] is None:
                continue
            label, dim, tf32, shape = names[mangled]
            kernel = Kernel(label, dim, tf32, shared=shared.get(shape, 0), order=SOURCES.index(source), **values)
            row = table.setdefault(label, {})
            row[capability] = max(kernel, row.get(capability, kernel), key=lambda k: (k.spilled, k.registers, -k.mma))
    missing = {label for label in SMALL.values() if label not in table}
    if missing or len(table) == len(SMALL):
        sys.exit(f"kernel_table: not found in what ptxas says: {missing or 'attention'}")
    return table


# Table ------------------------------------------------------------------------------------------------------------------------
HEAD = """# Hot kernels

What ptxas makes of them, for compute capabilities 8.0 / 9.0 / 10.0 (one figure where all three agree). Written by
`python3 tests/core/kernel_table.py --write` with nvcc {release}; the test `core.kernel_table` compiles them anew for 9.0 and
fails where one spills more than is allowed there (mostly nothing), has no tensor-core instruction, leaves too little room for
a second block, or differs from this table. These are properties of the code: how fast it runs is for a GPU to say.

Attention by dims of q and v, in bf16 and fp16, which differ in one field of an instruction: the larger figure is given; and in
fp32 rounded to *TF32*, in steps of half the columns. *Score terms* are softcap, ALiBi and bias; *dropout* has all of them.
Spilled: bytes stored and loaded again, of a thread. Shared: bytes of a block of 128 threads; *blocks* is how many of them fit on
a multiprocessor with the shared memory of compute capability 8.0, the least of the three. Instructions are counted in the text,
where a loop's body stands once: mma (of a warp, 16 x 8 x 16; TF32: 16 x 8 x 8), ldmatrix (four matrices of 8 x 16 bytes),
copies (16 bytes a thread, asynchronous, from device to shared memory).

| kernel | registers | spilled | shared | blocks | mma | ldmatrix | copies |
|---|---|---|---|---|---|---|---|
"""


def rows_of(table):
    for name, by_capability in sorted(table.items(), key=lambda row: (row[1][TESTED].order, row[0].lower())):
        columns = zip(*(kernel.cells() for kernel in by_capability.values()))
        yield name, [cells[0] if len(set(cells)) == 1 else " / ".join(cells) for cells in columns]


def write(tools, table):
    rows = "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows_of(table))
    TABLE.write_text(HEAD.format(release=tools.release) + rows)


def committed(release):
    """{kernel's name: cells} of the table for the capability of the test, or nothing where another compiler wrote it."""
    text = TABLE.read_text()
    if f"with nvcc {release};" not in text:
        return {}
    place = list(CAPABILITIES).index(TESTED)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.split(" / ")[place if " / " in cell else 0] for cell in row[1:]] for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--nvcc")
    options = parser.parse_args()
    tools = Tools(options.nvcc)
    table = measure(tools, SOURCES, CAPABILITIES if options.write else [TESTED])
    wrong = [f"{name} (compute capability {capability}): {text}" for name, row in table.items()
             for capability, kernel in row.items() for text in kernel.complaints()]
    if options.write:
        write(tools, table)
    else:
        known = committed(tools.release)
        for name, row in table.items():
            cells = row[TESTED].cells()
            if known and known.get(name) != cells:
                wrong.append(f"{name}: docs/kernels.md says {known.get(name)}, it is {cells} now: if that is meant, write the "
                             "table again (kernel_table.py --write)")
        print(f"kernel_table: {len(table)} kernels, {'as in' if known else 'compiler is not that of'} docs/kernels.md")
    for line in wrong:
        print("kernel_table:", line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
