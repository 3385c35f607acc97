#!/usr/bin/env python3
"""How far the simulator is from the clock: attention calls on this machine beside what `dattn plan --simulate` predicts on
the machine that `dattn doctor --calibrate` measures for as many ranks. Prints measured / predicted and the deviations.

Other work on the machine changes what it can do, within minutes by half. So the machine is calibrated before and after the
calls of each strategy, these are predicted on the mean of both, and of several rounds the median ratio counts.

    python3 tests/bench/simulate_bench.py --dattn build/release/bin/dattn
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

HEADS, DIM = 4, 64
# strategy, mesh axes
MESHES = {2: [("ring", "ring: 2"), ("allgather", "ring: 2"), ("ulysses", "ulysses: 2"), ("grid", "rows: 2")],
          4: [("ring", "ring: 4"), ("allgather", "ring: 4"), ("ulysses", "ulysses: 4"), ("grid", "ring: 2, rows: 2")]}
MASKS = ("full", "causal")
PHASES = ("forward", "backward")


def last_json(dattn, *arguments):
    result = subprocess.run([dattn, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        raise SystemExit(f"dattn {' '.join(map(str, arguments))}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def calibrated(dattn, ranks, folder):
    return last_json(dattn, "doctor", "--ranks", ranks, "--threads", 1, "--calibrate", folder / "one.yaml")["calibration"]["machine"]


def mean_of(before, after):
    """Of two machines, or of two maps or figures of theirs: shares and seconds as they are, what is above 1 as an integer."""
    if isinstance(before, dict):
        return {key: mean_of(before[key], after[key]) for key in before}
    if isinstance(before, (bool, str)):
        return before
    mean = (before + after) / 2
    return round(mean) if mean > 1 else mean


def predicted_ms(dattn, machine, strategy, mesh, seq, mask, folder):
    config, machine_file = folder / "call.yaml", folder / "machine.yaml"
    config.write_text(f"mesh: {{{mesh}}}\nstrategy: {strategy}\nattention: {{mask: {{kind: {mask}}}}}\ndtype: fp32\n"
                      f"shape: {{batch: 1, seq: {seq}, heads: {HEADS}, dim: {DIM}}}\n")
    machine_file.write_text(json.dumps(machine))  # JSON is YAML
    done = last_json(dattn, "plan", config, "--simulate", machine_file)["simulate"]
    return {phase: done[phase]["time_s"] * 1000 for phase in PHASES}


def measured_ms(dattn, ranks, strategy, mesh, seq, mask, repeat):
    axes = mesh.replace(": ", "=").replace(" ", "")
    done = last_json(dattn, "bench", "attention", "--ranks", ranks, "--threads", 1, "--mesh", axes, "--seq", seq,
                     "--heads", HEADS, "--dim", DIM, "--mask", mask, "--dtype", "fp32", "--repeat", repeat, "--backward",
                     "--set", f"strategy={strategy}")
    return {phase: done["milliseconds"][phase]["p50"] for phase in PHASES}


def measure(options, ranks, folder):
    """By (strategy, mask, seq, phase): (measured, predicted) of each round."""
    results = {}
    for number in range(options.rounds):
        before = calibrated(options.dattn, ranks, folder)
        for strategy, mesh in MESHES[ranks]:
            cases = [(mask, seq) for mask in MASKS for seq in options.seq]
            measured = {case: measured_ms(options.dattn, ranks, strategy, mesh, case[1], case[0], options.repeat) for case in cases}
            after = calibrated(options.dattn, ranks, folder)
            machine = mean_of(before, after)
            for mask, seq in cases:
                predicted = predicted_ms(options.dattn, machine, strategy, mesh, seq, mask, folder)
                for phase in PHASES:
                    results.setdefault((strategy, mask, seq, phase), []).append((measured[mask, seq][phase], predicted[phase]))
            before = after
            print(f"round {number + 1} of {options.rounds}, {ranks} ranks, {strategy}: {json.dumps(machine)}", file=sys.stderr)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dattn", default="build/release/bin/dattn")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=list(MESHES))
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    deviations = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for ranks in options.ranks:
            print(f"{ranks} ranks\n{'strategy':<10} {'mask':<7} {'seq':>5} {'phase':<9} {'measured':>10} {'predicted':>10} {'ratio':>6}")
            for (strategy, mask, seq, phase), pairs in measure(options, ranks, folder).items():
                measured, predicted = (statistics.median(side) for side in zip(*pairs))
                ratio = statistics.median(one / other for one, other in pairs)
                deviations.setdefault((f"{ranks} ranks", mask, phase), []).append(abs(ratio - 1))
                print(f"{strategy:<10} {mask:<7} {seq:>5} {phase:<9} {measured:>7.2f} ms {predicted:>7.2f} ms {ratio:>6.2f}",
                      flush=True)
    for names, values in deviations.items():
        print(f"median deviation, {', '.join(names)}: {statistics.median(values):.1%} of {len(values)} calls")
    everything = [value for values in deviations.values() for value in values]
    print(f"median deviation: {statistics.median(everything):.1%} of {len(everything)} calls")


if __name__ == "__main__":
    main()
