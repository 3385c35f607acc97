#!/usr/bin/env python3
"""How far the simulator is from the clock: attention calls on this machine beside what `dattn plan --simulate` predicts on
the machine that `dattn doctor --calibrate` measures for as many ranks. Prints measured / predicted and the deviations.

Other work on the machine makes calls and calibrations slower, never faster. So both are done in several rounds, one beside
the other, and the best of each counts: the highest rates, the least time (20th percentile of a round's calls).

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
MASKS = ("full", "causal")
PHASES = ("forward", "backward")


def last_json(dattn, *arguments):
    result = subprocess.run([dattn, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        raise SystemExit(f"dattn {' '.join(map(str, arguments))}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def calibrated(dattn, ranks, folder):
    return last_json(dattn, "doctor", "--ranks", ranks, "--threads", 1, "--calibrate", folder / "one.yaml")["calibration"]["machine"]


def best_of(machines):
    """The machine that is as fast in everything as the fastest of these."""
    best = dict(machines[0])
    forward = max(machine["flops"]["fp32"] * machine["attend_of_peak"] for machine in machines)
    backward = max(machine["flops"]["fp32"] * machine["attend_grad_of_peak"] for machine in machines)
    peak = max(forward, backward)
    best["flops"] = {"fp32": peak, "bf16": max(machine["flops"]["bf16"] for machine in machines)}
    best["attend_of_peak"], best["attend_grad_of_peak"] = forward / peak, backward / peak
    best["memory_bandwidth"] = max(machine["memory_bandwidth"] for machine in machines)
    best["kernel_latency_s"] = min(machine["kernel_latency_s"] for machine in machines)
    links = [machine["links"]["inside"] for machine in machines]
    best["links"] = {"inside": {"latency_s": min(link["latency_s"] for link in links),
                                "bandwidth": max(link["bandwidth"] for link in links)}}
    return best


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
    return {phase: done["milliseconds"][phase]["p20"] for phase in PHASES}


def measure(options, ranks, folder):
    """The best machine, and the best times by (strategy, mesh, mask, seq)."""
    machines, best = [], {}
    for _ in range(options.rounds):
        for strategy, mesh in MESHES[ranks]:
            machines.append(calibrated(options.dattn, ranks, folder))
            for case in [(strategy, mesh, mask, seq) for mask in MASKS for seq in options.seq]:
                times = measured_ms(options.dattn, ranks, strategy, mesh, case[3], case[2], options.repeat)
                best[case] = {phase: min(times[phase], best.get(case, times)[phase]) for phase in PHASES}
    return best_of(machines), best


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
            machine, measured = measure(options, ranks, folder)
            print(f"{ranks} ranks: {json.dumps(machine)}")
            print(f"{'strategy':<10} {'mask':<7} {'seq':>5} {'phase':<9} {'measured':>10} {'predicted':>10} {'ratio':>6}")
            for (strategy, mesh, mask, seq), times in measured.items():
                predicted = predicted_ms(options.dattn, machine, strategy, mesh, seq, mask, folder)
                for phase in PHASES:
                    ratio = times[phase] / predicted[phase]
                    deviations.setdefault((f"{ranks} ranks", mask, phase), []).append(abs(ratio - 1))
                    print(f"{strategy:<10} {mask:<7} {seq:>5} {phase:<9} {times[phase]:>7.2f} ms {predicted[phase]:>7.2f} ms "
                          f"{ratio:>6.2f}", flush=True)
    for names, values in deviations.items():
        print(f"median deviation, {', '.join(names)}: {statistics.median(values):.1%} of {len(values)} calls")
    everything = [value for values in deviations.values() for value in values]
    print(f"median deviation: {statistics.median(everything):.1%} of {len(everything)} calls")


if __name__ == "__main__":
    main()
