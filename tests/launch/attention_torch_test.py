#!/usr/bin/env python3
"""`dattn attention` against PyTorch: out, lse, dq, dk, dv for several masks (scaled_dot_product_attention), and dbias, dsink
with soft cap, ALiBi, a learned bias and a sink (autograd of the formula); 9 query and 3 KV heads, an odd length, every strategy
and layout, 1 to 8 ranks. Needs the Python environment of
`launch/setup.sh --python`; without it the test is skipped (exit 77).

The command is found in DATTN_BUILD/bin. DATTN_SWEEP=full takes every mask, mesh and strategy instead of a choice."""
import itertools
import math
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PYTHON = os.path.join(ROOT, "build", "venv", "bin", "python")
if not os.path.exists(PYTHON):
    print("skipped: no build/venv; launch/setup.sh --python makes it")
    sys.exit(77)
if os.path.realpath(sys.prefix) != os.path.realpath(os.path.join(ROOT, "build", "venv")):
    os.execv(PYTHON, [PYTHON] + sys.argv)

import torch
from safetensors.torch import load_file, save_file

SEQ, HEADS, KV_HEADS, DIM = 1021, 9, 3, 64
TOLERANCE = 2e-6

MASKS = {
    "full": ("{kind: full}", lambda q, k: torch.ones_like(q, dtype=torch.bool)),
    "causal": ("{kind: causal}", lambda q, k: k <= q),
    "window": ("{kind: window, left: 100, right: 7}", lambda q, k: (k >= q - 100) & (k <= q + 7)),
    "documents": ("{kind: documents, cu_seqlens: [0, 130, 130, 611, 1000], within: {kind: causal}}",
                  lambda q, k: (k <= q) & same_document(q, k, [0, 130, 130, 611, 1000])),
    "causal_bottom_right": ("{kind: causal_bottom_right}", lambda q, k: k <= q),  # as many keys as queries
    "prefix": ("{kind: prefix, length: 200}", lambda q, k: (k <= q) | (k < 200)),
    "global": ("{kind: global, tokens: 5, window: {left: 60, right: 9}}",
               lambda q, k: ((k >= q - 60) & (k <= q + 9)) | (k < 5) | (q < 5)),
    "blocks": ("{kind: blocks, size: 400, list: [[0, 0], [1, 0], [1, 1], [2, 2]]}",
               lambda q, k: (k // 400 == q // 400) | ((q // 400 == 1) & (k < 400))),
    "padding": ("{kind: padding, lengths: [900], within: {kind: causal}}", lambda q, k: (k <= q) & (q < 900) & (k < 900)),
    "per_row": ("{kind: per_row, masks: [{kind: window, left: 30, right: 0}]}", lambda q, k: (k >= q - 30) & (k <= q)),
    "regions": ("{kind: regions, regions: [{q: [0, 500], k: [0, 300], lo: -8, hi: 90}, {q: [500, 1021], k: [200, 900], lo: null, hi: 0},"
                " {q: [10, 10], k: [0, 5]}, {q: [300, 500], k: [300, 1021], lo: 5, hi: null}]}",
                lambda q, k: ((q < 500) & (k < 300) & (k - q >= -8) & (k - q <= 90))
                | ((q >= 500) & (k >= 200) & (k < 900) & (k <= q)) | ((q >= 300) & (q < 500) & (k >= 300) & (k - q >= 5))),
}
MESHES = {1: [{}], 2: [{"ring": 2}, {"ulysses": 2}, {"tensor": 2}], 3: [{"ring": 3}, {"ulysses": 3}],
          4: [{"ring": 4}, {"ulysses": 4}, {"ulysses": 2, "ring": 2}, {"tensor": 2, "ring": 2}, {"rows": 2, "ring": 2}],
          8: [{"ring": 8}, {"ulysses": 8}, {"ulysses": 4, "ring": 2}, {"tensor": 2, "ulysses": 2, "ring": 2},
              {"ulysses": 2, "rows": 2, "ring": 2}]}
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


def same_document(q, k, bounds):
    number = torch.bucketize(torch.arange(SEQ), torch.tensor(bounds[1:]), right=True)
    number[torch.arange(SEQ) >= bounds[-1]] = -1
    return (number[q] == number[k]) & (number[q] >= 0)


def strategies(mesh):
    ring, ulysses, rows = mesh.get("ring", 1), mesh.get("ulysses", 1), mesh.get("rows", 1)
    names = ["allgather", "grid", "tree"]
    if rows == 1:
        names += ["hybrid", "fetch"] + (["ring", "ring_q"] if ulysses == 1 else []) + (["ulysses"] if ring == 1 else [])
    return names


def expected(inputs, visible):
    """fp64 through torch's own SDPA; rows that see nothing give 0 (torch gives NaN there)."""
    q, k, v = (inputs[name].double().transpose(1, 2).requires_grad_() for name in "qkv")
    seeing = visible.any(dim=1)
    safe = visible.clone()
    safe[~seeing, 0] = True
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=safe, enable_gqa=True)
    out = out * seeing[None, None, :, None]
    out.backward(inputs["dout"].double().transpose(1, 2))
    scores = q @ k.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(2, 3) / math.sqrt(DIM)
    lse = scores.masked_fill(~visible, -math.inf).logsumexp(dim=3)
    turn = lambda t: t.detach().transpose(1, 2)
    return {"out": turn(out), "lse": lse.detach(), "dq": turn(q.grad), "dk": turn(k.grad), "dv": turn(v.grad)}


SLOPES, SOFTCAP = [0.01 * (head + 1) for head in range(HEADS)], 3.0


def expected_terms(inputs):
    """Causal attention with every score term, in fp64, with the gradients of the learned ones."""
    q, k, v = (inputs[name].double().transpose(1, 2).requires_grad_() for name in "qkv")
    bias, sink = inputs["bias"].double().requires_grad_(), inputs["sink"].double().requires_grad_()
    group = HEADS // KV_HEADS
    scores = q @ k.repeat_interleave(group, dim=1).transpose(2, 3) / math.sqrt(DIM)
    position = torch.arange(SEQ)
    distance = (position[None, :] - position[:, None]).double()
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP) + torch.tensor(SLOPES).double()[:, None, None] * distance + bias
    scores = scores.masked_fill(distance > 0, -math.inf)
    lse = torch.logaddexp(scores.logsumexp(dim=3), sink[None, :, None])
    out = torch.exp(scores - lse[..., None]) @ v.repeat_interleave(group, dim=1)
    out.backward(inputs["dout"].double().transpose(1, 2))
    turn = lambda t: t.detach().transpose(1, 2)
    return {"out": turn(out), "lse": lse.detach(), "dq": turn(q.grad), "dk": turn(k.grad), "dv": turn(v.grad),
            "dbias": bias.grad, "dsink": sink.grad}


def error(got, want):
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return math.inf
    difference, want = got.double()[finite] - want[finite], want[finite]
    return (difference.norm() / want.norm()).item()


def main():
    command = os.path.join(os.environ.get("DATTN_BUILD", os.path.join(ROOT, "build", "release")), "bin", "dattn")
    full = os.environ.get("DATTN_SWEEP") == "full"
    torch.manual_seed(3)
    shapes = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "dout": HEADS}
    inputs = {name: torch.randn(1, SEQ, heads, DIM) for name, heads in shapes.items()}
    cases = [(mask, ranks, mesh, strategy, layout) for mask in MASKS for ranks, meshes in MESHES.items() for mesh in meshes
             for strategy in strategies(mesh) for layout in LAYOUTS]
    cases = [case for i, case in enumerate(cases) if (i + i // 4) % 2 == 0]  # two layouts each, in turn
    if not full:  # every mask with every mesh once, the strategy and layout in turn
        groups = [list(group) for _, group in itertools.groupby(cases, key=lambda c: (c[0], c[1], str(c[2])))]
        cases = [group[(7 * i) % len(group)] for i, group in enumerate(groups)]
    worst, failed = 0.0, 0
    terms = dict(inputs, bias=torch.randn(1, 1, SEQ, SEQ), sink=torch.randn(HEADS))
    term_text = f"mask: {{kind: causal}}, softcap: {SOFTCAP}, alibi_slopes: {SLOPES}"
    term_cases = [case for case in cases if case[0] == "causal"]
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ("x.safetensors", "t.safetensors", "y.safetensors", "c.yaml")}
        save_file(inputs, paths["x.safetensors"])
        save_file(terms, paths["t.safetensors"])
        rows, columns = torch.meshgrid(torch.arange(SEQ), torch.arange(SEQ), indexing="ij")
        want = {name: expected(inputs, visible(rows, columns)) for name, (_, visible) in MASKS.items()}
        with_terms = expected_terms(terms)
        runs = [(f"mask: {MASKS[case[0]][0]}", "x.safetensors", want[case[0]], case) for case in cases]
        runs += [(term_text, "t.safetensors", with_terms, case) for case in term_cases]
        for attention, source, right, (mask, ranks, mesh, strategy, layout) in runs:
            text = ", ".join(f"{axis}: {size}" for axis, size in mesh.items())
            with open(paths["c.yaml"], "w", encoding="utf-8") as config:
                config.write(f"attention: {{{attention}}}\nmesh: {{{text}}}\nlayout: {layout}\nstrategy: {strategy}\n")
            run = [command, "attention", paths["c.yaml"], "--in", paths[source], "--out", paths["y.safetensors"]]
            result = subprocess.run(run + ["--ranks", str(ranks)], capture_output=True, text=True, timeout=300)
            case = f"{mask}, mesh {{{text}}}, {strategy}, {layout}, {source}"
            if result.returncode != 0:
                failed += 1
                print(f"FAILED {case}: exit {result.returncode}\n{result.stderr}")
                continue
            got = load_file(paths["y.safetensors"])
            for name, values in right.items():
                off = error(got[name], values)
                worst = max(worst, off)
                if not off <= TOLERANCE:
                    failed += 1
                    print(f"FAILED {case}: {name} is off by {off:.2e}")
    print(f"{len(runs)} cases, worst relative error {worst:.2e}, {failed} failures")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
