#!/usr/bin/env python3
"""How far the simulator is from the clock: measures attention calls on this machine beside what `dattn plan --simulate`
predicts on the machine file that `dattn doctor --calibrate` writes for as many ranks, and prints measured / predicted.

    python3 tests/bench/simulate_bench.py --dattn build/release/bin/dattn
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

HEADS, DIM = 4, 64
# strategy, mesh axes
MESHES = {2: [("ring", "ring: 2"), ("allgather", "ring: 2"), ("ulysses", "ulysses: 2"), ("grid", "rows: 2")],
          4: [("ring", "ring: 4"), ("allgather", "ring: 4"), ("ulysses", "ulysses: 4"), ("grid", "ring: 2, rows: 2")]}


def last_json(dattn, *arguments):
    result = subprocess.run([dattn, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        raise SystemExit(f"dattn {' '.join(map(str, arguments))}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def calibrated(dattn, ranks, folder):
    machine = folder / f"ranks{ranks}.yaml"
    last_json(dattn, "doctor", "--ranks", ranks, "--threads", 1, "--calibrate", machine)
    return machine


def predicted_ms(dattn, machine, strategy, mesh, seq, mask, folder):
    config = folder / "call.yaml"
    config.write_text(f"mesh: {{{mesh}}}\nattention: {{strategy: {strategy}, mask: {{kind: {mask}}}}}\ndtype: fp32\n"
                      f"shape: {{batch: 1, seq: {seq}, heads: {HEADS}, dim: {DIM}}}\n")
    done = last_json(dattn, "plan", config, "--simulate", machine)["simulate"]
    return {phase: done[phase]["time_s"] * 1000 for phase in ("forward", "backward")}


def measured_ms(dattn, ranks, strategy, mesh, seq, mask, repeat):
    axes = mesh.replace(": ", "=").replace(" ", "")
    done = last_json(dattn, "bench", "attention", "--ranks", ranks, "--threads", 1, "--mesh", axes, "--seq", seq,
                     "--heads", HEADS, "--dim", DIM, "--mask", mask, "--dtype", "fp32", "--repeat", repeat, "--backward",
                     "--set", f"attention.strategy={strategy}")
    return {phase: times["p50"] for phase, times in done["milliseconds"].items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dattn", default="build/release/bin/dattn")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=list(MESHES))
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    deviations = {}
    print(f"{'ranks':>5} {'strategy':<10} {'mask':<7} {'seq':>5} {'phase':<9} {'measured':>10} {'predicted':>10} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for ranks in options.ranks:
            machine = calibrated(options.dattn, ranks, folder)
            for strategy, mesh in MESHES[ranks]:
                for mask in ("full", "causal"):
                    for seq in options.seq:
                        predicted = predicted_ms(options.dattn, machine, strategy, mesh, seq, mask, folder)
                        measured = measured_ms(options.dattn, ranks, strategy, mesh, seq, mask, options.repeat)
                        for phase, expected in predicted.items():
                            ratio = measured[phase] / expected
                            deviations.setdefault((ranks, phase), []).append(abs(ratio - 1))
                            print(f"{ranks:>5} {strategy:<10} {mask:<7} {seq:>5} {phase:<9} {measured[phase]:>7.2f} ms "
                                  f"{expected:>7.2f} ms {ratio:>6.2f}", flush=True)
            print(machine.read_text(), flush=True)
    for (ranks, phase), values in deviations.items():
        print(f"median deviation, {ranks} ranks, {phase}: {statistics.median(values):.1%} of {len(values)} calls")
    everything = [value for values in deviations.values() for value in values]
    print(f"median deviation: {statistics.median(everything):.1%} of {len(everything)} calls")


if __name__ == "__main__":
    main()
