#!/usr/bin/env python3
"""Compares the attention kernel with PyTorch's CPU scaled_dot_product_attention: same shapes, same threads, interleaved,
medians. Run with a Python that has torch, for example build/venv/bin/python tests/bench/compare_torch.py --bench
build/release/bin/dattn_attention_bench.

Both sides run as processes in turn and report the median of their repeats; the table shows the median over rounds.
FLOPs = 4 * S * S * D * H forward (half of it when causal), backward 2.5 times that.
"""
import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

TORCH_SIDE = "--torch-side"


def torch_side(spec):
    """Runs one shape in this process and prints {forward_ms, backward_ms}."""
    import torch
    import torch.nn.functional as functional

    torch.set_num_threads(spec["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    shape = (1, spec["heads"], spec["seq"], spec["dim"])
    q, k, v = (torch.rand(shape, dtype=dtype).mul_(2).sub_(1).requires_grad_() for _ in range(3))
    dout = torch.rand(shape, dtype=dtype)
    clock = time.process_time if spec["cpu_time"] else time.perf_counter

    def forward():
        return functional.scaled_dot_product_attention(q, k, v, is_causal=spec["mask"] == "causal")

    def timed(body):
        start = clock()
        result = body()
        return clock() - start, result

    forward_s, backward_s = [], []
    for i in range(spec["repeat"] + 1):  # the first one warms up
        with torch.no_grad():
            seconds, _ = timed(forward)
        out = forward()
        back, _ = timed(lambda: torch.autograd.grad(out, (q, k, v), dout))
        if i > 0:
            forward_s.append(seconds)
            backward_s.append(back)
    print(json.dumps({"forward_ms": statistics.median(forward_s) * 1e3, "backward_ms": statistics.median(backward_s) * 1e3}))


def run_ours(bench, spec):
    command = [bench] + [part for key in ("seq", "heads", "dim", "dtype", "mask", "threads", "repeat")
                         for part in (f"--{key}", str(spec[key]))]
    if spec["cpu_time"]:
        command.append("--cpu-time")
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_torch(spec):
    command = [sys.executable, __file__, TORCH_SIDE, json.dumps(spec)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def gflops(spec, result):
    pairs = spec["seq"] * (spec["seq"] + 1) / 2 if spec["mask"] == "causal" else spec["seq"] ** 2
    flops = 4 * pairs * spec["dim"] * spec["heads"]
    return flops / result["forward_ms"] * 1e-6, 2.5 * flops / result["backward_ms"] * 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="build/release/bin/dattn_attention_bench")
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--mask", nargs="+", default=["full", "causal"])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of one round")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time, for busy machines")
    args = parser.parse_args()
    print("GFLOP/s, forward and backward")
    print("| dtype | mask | S | D | torch | ours | ratio | torch | ours | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dtype, mask, seq, dim in itertools.product(args.dtype, args.mask, args.seq, args.dim):
        spec = {"seq": seq, "heads": args.heads, "dim": dim, "dtype": dtype, "mask": mask, "threads": args.threads,
                "repeat": args.repeat, "cpu_time": args.cpu_time}
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(gflops(spec, run_ours(args.bench, spec)))
            theirs.append(gflops(spec, run_torch(spec)))
        (of, ob), (tf, tb) = ([statistics.median(column) for column in zip(*rows)] for rows in (ours, theirs))
        print(f"| {dtype} | {mask} | {seq} | {dim} | {tf:.1f} | {of:.1f} | {of / tf:.2f} | {tb:.1f} | {ob:.1f} | "
              f"{ob / tb:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == TORCH_SIDE:
        torch_side(json.loads(sys.argv[2]))
    else:
        main()
