#!/usr/bin/env python3
"""dattn beside its peers on this machine, on CPUs: PyTorch's attention and training step, ONNX Runtime's attention, OpenBLAS.

    build/venv/bin/python tests/bench/compare.py --build build/release [--only attention,train] [--quick]

Every measurement is a process of its own; the sides of a case take turns, on the same shapes and as many threads, and the
median over the rounds counts. The peak of the processor is measured before and after every round; a round in which it moved
by more than 5 % is not counted and done again, three times as many rounds at most. Writes OUT/compare.json (every raw
number), the tables of docs/benchmarks*.md between their markers, and docs/benchmarks.svg; what is measured: compare_blocks.py.
A quick run, or one of chosen shapes, leaves the docs alone and writes OUT/benchmarks.md, unless --docs says where."""
import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import report
from compare_blocks import BLOCKS, ON_PROCESSOR_TIME, SECTIONS

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST_MOVED = 0.05
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-np"]


def say(text):
    print(text, file=sys.stderr, flush=True)


def last_json(command, threads, timeout):
    """The last line that the command prints, or {"error": reason}. It and what it started end with the timeout."""
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) | dict.fromkeys(
        ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    try:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=os.environ | variables, start_new_session=True)
    except OSError as error:
        return {"error": f"{command[0]} does not start: {error.strerror}"}
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as stop:
        end(process)
        if isinstance(stop, subprocess.TimeoutExpired):
            return {"error": f"no answer within {timeout} s"}
        raise
    if process.returncode != 0:
        lines = [line for line in err.splitlines() if re.search(r"\w", line)] or [f"exit code {process.returncode}"]
        return {"error": lines[0][:200]}
    try:
        return json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"{command[0]} printed no JSON"}


def end(process):
    """The session of this command alone. mpirun is asked first, since only it ends its ranks."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, name)
            process.communicate(timeout=10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


class Lab:
    """Runs the sides' processes."""

    def __init__(self, options):
        self.options = options
        self.dtypes = options.dtype or ["fp32", "bf16"]
        self.bin = options.build / "bin"

    def run(self, command, threads):
        return last_json(command, threads, self.options.timeout)

    def peer(self, name, spec, ranks=1):
        """A function of peers.py, by torchrun where it has several ranks."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []
        return self.run([sys.executable, *launcher, pathlib.Path(__file__).with_name("peers.py"), json.dumps({"peer": name} | spec)],
                        spec["threads"])

    def attention(self, spec, more=(), ranks=1, mpi=False):
        """`dattn bench attention`; for processor time, the program of the kernel alone."""
        keys = ["heads", "kv-heads", "dim", "dtype", "mask", "threads", "repeat"]
        flags = [part for key in keys for part in (f"--{key}", spec[key.replace("-", "_")])]
        queries = spec.get("queries", spec["seq"])
        if spec["cpu_time"]:
            return self.kernel(spec, ["--queries", queries])
        command = [self.bin / "dattn", "bench", "attention", "--seq", queries, "--seq-kv", spec["seq"], *flags, *more, "--json"]
        return self.job(command + ["--backward"] * spec["backward"], spec["threads"], ranks, mpi)

    def job(self, command, threads, ranks, mpi):
        """A command on ranks that are processes of mpirun, or threads of one."""
        return self.run([*MPIRUN, ranks, *command] if mpi else [*command, "--ranks", ranks], threads)

    def kernel(self, spec, more=()):
        """The program of the kernel alone."""
        keys = ["seq", "heads", "kv-heads", "dim", "dtype", "mask", "threads", "repeat"]
        flags = [part for key in keys for part in (f"--{key}", spec[key.replace("-", "_")])] + ["--cpu-time"] * spec["cpu_time"]
        done = self.run([self.bin / "dattn_attention_bench", *flags, *more], spec["threads"])
        if "error" in done:
            return done
        return done | {"milliseconds": {which: {"p50": done[f"{which}_ms"]} for which in ("forward", "backward")}}

    def train(self, spec, axis="data", ranks=1, mpi=False):
        settings = {f"mesh.{axis}": ranks, "train.batch": spec["batch"], "train.seq_len": spec["seq_len"], "dtype": spec["dtype"],
                    "model.vocab": 50257, "model.dropout": 0}
        command = [self.bin / "dattn", "bench", "train", ROOT / "configs/models/gpt2_124m.yaml", "--threads", spec["threads"],
                   "--steps", spec["steps"], "--json"]
        return self.job(command + [part for key, value in settings.items() for part in ("--set", f"{key}={value}")],
                        spec["threads"], ranks, mpi)

    def product(self, spec):
        return self.run([self.bin / "dattn", "bench", "product", "--size", spec["size"], "--dtype", spec["dtype"], "--threads",
                         spec["threads"], "--repeat", spec["repeat"], "--json"], spec["threads"])

    def machine_now(self, dtype, threads):
        """What the processor and the memory can do at this moment: of the smallest call, which takes half a second."""
        if self.options.cpu_time:  # which other programs do not change
            return {"peak": None, "memory_gbyte_per_s": None}
        done = self.run([self.bin / "dattn", "bench", "attention", "--seq", 16, "--heads", 1, "--repeat", 1, "--dtype", dtype,
                         "--threads", threads, "--json"], threads)
        return {"peak": done.get("peak_gflops"), "memory_gbyte_per_s": done.get("bandwidth", {}).get("memory_gbyte_per_s")}


def one_round(case, lab, before, failed):
    """All sides in turn, and what the machine could do; `failed` gets the sides that gave an error."""
    sides = {}
    for name in [name for name in case.sides if name not in failed]:
        printed = case.sides[name]()
        if "error" in printed:
            failed[name] = printed["error"]
            say(f"    {name}: {printed['error']}")
        else:
            sides[name] = printed
    after = lab.machine_now(case.what["dtype"], case.threads)
    peaks = [now["peak"] for now in (before, after)] + sides.get("ours", {}).get("peak_gflops_before_after", [])
    known = [peak for peak in peaks if peak]
    moved = 1 - min(known) / max(known) if known else 0
    return {"sides": sides, "peaks": peaks, "peak": max(known, default=None), "moved_by": moved, "moved": moved > MOST_MOVED,
            "memory_gbyte_per_s": after["memory_gbyte_per_s"]}, after


def measure(case, lab):
    rounds, steady, failed, wanted = [], [], {}, lab.options.rounds
    before = lab.machine_now(case.what["dtype"], case.threads)
    while len(steady) < wanted and len(rounds) < 3 * wanted and len(failed) < len(case.sides):
        round_, before = one_round(case, lab, before, failed)
        rounds.append(round_)
        peaks = ", ".join("unknown" if peak is None else f"{peak:.1f}" for peak in round_["peaks"])
        dropped = f", moved by {round_['moved_by']:.0%}: dropped" if round_["moved"] else ""
        say(f"    round {len(rounds)}: peak {peaks} GFLOP/s{dropped}")
        steady = [round_ for round_ in rounds if not round_["moved"]]
    restless = sorted((round_ for round_ in rounds if round_["moved"]), key=lambda round_: round_["moved_by"])
    taken = (steady + restless)[:wanted]
    for round_ in rounds:
        round_["counts"] = any(round_ is one for one in taken)
    return {"what": case.what, "rounds": rounds, "failed": failed, "steady": not any(round_["moved"] for round_ in taken)}


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def about(lab):
    """Where and with what a block was measured."""
    names = {"torch": "PyTorch", "transformers": "Transformers", "onnxruntime": "ONNX Runtime", "numpy": "NumPy"}
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    versions = {title: installed[name] for name, title in names.items() if name in installed}
    if onednn := output_of("dpkg-query", "-W", "-f", "${Version}", "libdnnl-dev"):
        versions["oneDNN"] = onednn
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    model, family, number = (match.group(1) if (match := re.search(rf"^{key}\s*: (.+)$", cpu, re.MULTILINE)) else "unknown"
                             for key in ("model name", "cpu family", "model"))
    features = lab.run([lab.bin / "dattn", "doctor", "--threads", 1, "--json"], 1).get("cpu_features", "features unknown")
    changed = "+" if output_of("git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no") else ""
    return {"date": datetime.date.today().isoformat(), "cpu": f"{model} (family {family}, model {number}: {features})",
            "cores": os.cpu_count(), "commit": output_of("git", "rev-parse", "--short=12", "HEAD") + changed,
            "versions": versions, "rounds": lab.options.rounds, "cpu_time": lab.options.cpu_time}


def write(name, block, page):
    """The block's table, and the plot of the block attention."""
    if not block["results"]:
        return
    lines = [report.about_line(block["about"]), BLOCKS[name].table(block["results"]), *report.notes(block["results"])]
    if name == "attention" and report.plot(block["results"], page.with_suffix(".svg")):
        lines.append(f"![GFLOP/s by sequence length]({page.with_suffix('.svg').name})")
    report.write_block(page, name, "\n\n".join(lines))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/release", help="our programs are in its bin/")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections or blocks of them: " + ", ".join(
        dict.fromkeys([*SECTIONS, *BLOCKS])))
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build/bench")
    parser.add_argument("--docs", type=pathlib.Path, help="the page of the tables; the plot goes beside it")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the tables of OUT/compare.json")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one process")
    parser.add_argument("--cpu-time", action="store_true",
                        help="processor time in place of wall time, for busy machines: blocks " + ", ".join(ON_PROCESSOR_TIME))
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], help="these alone, everywhere")
    shapes = parser.add_argument_group("other shapes for the block attention, the first two for plugin, the first for sharded")
    for option in ("--seq", "--dim"):
        shapes.add_argument(option, type=int, nargs="+")
    shapes.add_argument("--mask", nargs="+", choices=["full", "causal"])
    shapes.add_argument("--heads", type=int)
    shapes.add_argument("--threads", type=int, default=1)
    shapes.add_argument("--repeat", type=int, help="timed calls of one round, in blocks of attention")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - {*SECTIONS, *BLOCKS}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is unknown")
    chosen_shapes = options.dtype or options.seq or options.dim or options.mask or options.heads or options.threads != 1
    if options.docs is None:
        options.docs = options.out / "benchmarks.md" if options.quick or chosen_shapes else ROOT / "docs/benchmarks.md"
    return options


def main():
    options = parse()
    lab = Lab(options)
    options.out.mkdir(parents=True, exist_ok=True)
    raw = options.out / "compare.json"
    measured = json.loads(raw.read_text()) if raw.exists() else {}
    names = [name for name, block in BLOCKS.items() if name in options.only or block.section in options.only]
    if options.cpu_time:
        names = [name for name in names if name in ON_PROCESSOR_TIME]
    for name in names:
        if options.render:
            if name in measured:
                write(name, measured[name], options.docs)
            continue
        cases = list(BLOCKS[name].cases(lab))
        measured[name] = {"about": about(lab), "results": []}
        for i, case in enumerate(cases, 1):
            say(f"{name} {i}/{len(cases)}: {json.dumps(case.what)}")
            measured[name]["results"].append(measure(case, lab))
            raw.write_text(json.dumps(measured, indent=1) + "\n")  # after each case: what was measured is kept
        write(name, measured[name], options.docs)
    say(f"raw numbers: {raw}; tables: {options.docs}")


if __name__ == "__main__":
    main()
