"""What compare.py measures, and the table of each: a block is a list of cases (a row or a few, with its sides: ours and the
peers) and a function from their results to markdown. A new comparison is a new block here and, for a new peer, a function in
peers.py."""
import dataclasses
import itertools
import json
from functools import partial
from typing import Callable

from report import (attention_flops, attention_share, binary, gflops, label, median, milliseconds, number, percent, rated, ratio,
                    share, table)

PASSES = ("forward", "backward")


@dataclasses.dataclass
class Case:
    what: dict  # the row's key; compare.json has it
    sides: dict  # name -> measures once, gives what the process printed
    threads: int = 1  # of all ranks together, as the peak is measured


@dataclasses.dataclass
class Block:
    section: str
    cases: Callable  # of a Lab
    table: Callable  # of the results


def chosen(given, default):
    return given if given is not None else default


def calls_for(flops, most=200):
    """Timed calls of one round: about a second of a core's work, but at least one."""
    return max(1, min(most, round(5e10 / flops)))


def attention_spec(lab, dtype, mask, seq, dim, heads, kv_heads=None, threads=1, backward=True):
    spec = {"dtype": dtype, "mask": mask, "seq": seq, "dim": dim, "heads": heads, "kv_heads": kv_heads or heads,
            "threads": threads, "backward": backward, "cpu_time": lab.options.cpu_time}
    flops = sum(attention_flops(spec, which) for which in (PASSES if backward else PASSES[:1]))
    return spec | {"repeat": lab.options.repeat or calls_for(flops)}


# --- attention -------------------------------------------------------------------------------------------------------------

def attention_cases(lab):
    o = lab.options
    seqs = chosen(o.seq, [1024, 2048] if o.quick else [1024, 2048, 4096, 8192, 16384])
    masks, dims = chosen(o.mask, ["full", "causal"]), chosen(o.dim, [64, 128])
    for dtype, mask, dim, seq in itertools.product(lab.dtypes, masks, dims, seqs):
        heads = o.heads or max(1, min(4, 16384 // seq))  # FlashAttention's grid, as many positions x heads for every seq
        spec = attention_spec(lab, dtype, mask, seq, dim, heads, threads=o.threads)
        yield Case(spec, {"ours": partial(lab.attention, spec),
                          "PyTorch": partial(lab.peer, "torch_attention", spec)}, o.threads)


def attention_table(results):
    header = ["type, mask", "D", "S", "H", "forward: PyTorch", "ours", "ratio", "backward: PyTorch", "ours", "ratio"]
    rows = []
    for result in results:
        what, cells = result["what"], []
        for which in PASSES:
            theirs, ours = (gflops(result, side, which) for side in ("PyTorch", "ours"))
            cells += [rated(theirs, attention_share(result, "PyTorch", which)),
                      rated(ours, attention_share(result, "ours", which)), ratio(ours, theirs)]
        rows.append([label(result, f"{what['dtype']} {what['mask']}"), what["dim"], binary(what["seq"]), what["heads"], *cells])
    return ("GFLOP/s (share of the multiply-add peak measured in the same round), one call, "
            f"threads: {results[0]['what']['threads']}.\n\n" + table(header, rows))


def scaling_cases(lab):
    for dtype, dim in itertools.product(lab.dtypes, (64, 128)):
        spec = attention_spec(lab, dtype, "causal", 1024 if lab.options.quick else 4096, dim, 4, threads=2)
        yield Case(spec, {"ours": partial(lab.attention, spec),
                          "ours, 1 thread": partial(lab.attention, spec | {"threads": 1}),
                          "PyTorch": partial(lab.peer, "torch_attention", spec)}, 2)


def scaling_table(results):
    rows = []
    for result, which in itertools.product(results, PASSES):
        what = result["what"]
        one, two, theirs = (gflops(result, side, which) for side in ("ours, 1 thread", "ours", "PyTorch"))
        rows.append([label(result, f"{what['dtype']} {what['mask']}"), what["dim"], binary(what["seq"]), what["heads"], which,
                     number(one), rated(two, attention_share(result, "ours", which)), ratio(two, one), number(theirs),
                     ratio(two, theirs)])
    return "GFLOP/s (share of the peak of two threads).\n\n" + table(
        ["type, mask", "D", "S", "H", "pass", "ours, 1 thread", "ours, 2 threads", "gain", "PyTorch, 2 threads", "ratio"], rows)


def onnx_cases(lab):
    if "fp32" not in lab.dtypes:
        return
    calls = [("MultiHeadAttention", "full", 4, 4), ("MultiHeadAttention", "causal", 4, 4),
             ("GroupQueryAttention", "causal", 8, 2)]
    for (operator, mask, heads, kv_heads), seq in itertools.product(calls, [1024] if lab.options.quick else [1024, 4096]):
        spec = attention_spec(lab, "fp32", mask, seq, 64, heads, kv_heads, backward=False) | {"operator": operator}
        yield Case(spec, {"ours": partial(lab.attention, spec),
                          "ONNX Runtime": partial(lab.peer, "onnx_attention", spec),
                          "PyTorch": partial(lab.peer, "torch_attention", spec)})


def onnx_table(results):
    rows = []
    for result in results:
        what = result["what"]
        theirs, ours, torch = (gflops(result, side, "forward") for side in ("ONNX Runtime", "ours", "PyTorch"))
        rows.append([label(result, what["operator"]), what["mask"], binary(what["seq"]), f"{what['heads']} / {what['kv_heads']}",
                     number(theirs), number(torch), rated(ours, attention_share(result, "ours", "forward")), ratio(ours, theirs)])
    return "Forward, fp32, D 64, one thread, GFLOP/s.\n\n" + table(
        ["operator", "mask", "S", "H / key heads", "ONNX Runtime", "PyTorch", "ours", "ours / ONNX Runtime"], rows)


# --- small -----------------------------------------------------------------------------------------------------------------

def small_cases(lab):
    for dtype, seq in itertools.product(lab.dtypes, (16, 64, 256) if lab.options.quick else (16, 32, 64, 128, 256)):
        spec = attention_spec(lab, dtype, "causal", seq, 64, 4)
        yield Case(spec, {"ours": partial(lab.attention, spec),
                          "PyTorch": partial(lab.peer, "torch_attention", spec)})


def small_table(results):
    rows = []
    for result in results:
        cells = []
        for which in PASSES:
            theirs, ours = (milliseconds(result, side, which) for side in ("PyTorch", "ours"))
            cells += [number(theirs and theirs * 1e3), number(ours and ours * 1e3), ratio(theirs, ours)]
        rows.append([label(result, result["what"]["dtype"]), result["what"]["seq"], *cells])
    return "Microseconds of a call, causal, 4 heads, D 64, one thread.\n\n" + table(
        ["type", "S", "forward: PyTorch", "ours", "ratio", "backward: PyTorch", "ours", "ratio"], rows)


def decode_cases(lab):
    keys = [1024, 8192] if lab.options.quick else [1024, 4096, 16384, 65536, 131072]
    for dtype, seq in itertools.product(lab.dtypes, keys):
        spec = attention_spec(lab, dtype, "full", seq, 64, 4, backward=False)
        spec |= {"queries": 1, "repeat": max(5, min(200, 2**21 // seq))}
        yield Case(spec, {"ours": partial(lab.attention, spec),
                          "PyTorch": partial(lab.peer, "torch_attention", spec)})


def decode_table(results):
    rows = []
    for result in results:
        what = result["what"]
        read = 2 * what["seq"] * what["kv_heads"] * what["dim"] * {"fp32": 4, "bf16": 2}[what["dtype"]] * 1e-9

        def rate(printed, _, read=read):
            return read / printed["milliseconds"]["forward"]["p50"] * 1e3

        def of_memory(printed, round_, rate=rate):
            return rate(printed, round_) / round_["memory_gbyte_per_s"] if round_["memory_gbyte_per_s"] else None

        theirs, ours = (milliseconds(result, side, "forward") for side in ("PyTorch", "ours"))
        rows.append([label(result, what["dtype"]), binary(what["seq"]), number(theirs and theirs * 1e3),
                     number(ours and ours * 1e3), ratio(theirs, ours), number(median(result, "ours", rate), 1),
                     percent(median(result, "ours", of_memory))])
    return ("One query row, 4 heads, D 64, one thread: microseconds, and keys and values read in GB/s. Where that is more than "
            "memory's bandwidth, they stayed in a cache.\n\n") + table(
                ["type", "keys", "PyTorch", "ours", "ratio", "GB/s", "of memory"], rows)


# --- plugin ----------------------------------------------------------------------------------------------------------------

def plugin_cases(lab):
    seqs = chosen(lab.options.seq, [1024] if lab.options.quick else [1024, 2048, 4096, 8192, 16384])
    for dtype, dim, seq in itertools.product(lab.dtypes, chosen(lab.options.dim, [64, 128]), seqs):
        spec = attention_spec(lab, dtype, "causal", seq, dim, 4)
        yield Case(spec, {"ours": partial(lab.peer, "torch_plugin", spec),
                          "PyTorch": partial(lab.peer, "torch_attention", spec)})


def beside(result, base, side):
    """Cells of base, side and base / side: forward, then forward and backward together."""
    cells = []
    for passes in (PASSES[:1], PASSES):
        times = [[milliseconds(result, name, which) for which in passes] for name in (base, side)]
        over, under = (None if None in each else sum(each) for each in times)
        cells += [number(over, 2), number(under, 2), ratio(over, under)]
    return cells


def plugin_table(results):
    rows = [[label(result, result["what"]["dtype"]), result["what"]["dim"], binary(result["what"]["seq"]),
             *beside(result, "PyTorch", "ours")] for result in results]
    return "`dattn.torch.attention` on one rank, causal, 4 heads, one thread, ms.\n\n" + table(
        ["type", "D", "S", "forward: PyTorch", "ours", "ratio", "with backward: PyTorch", "ours", "ratio"], rows)


GLOO_STRATEGIES = ("ring", "ulysses")


def gloo_cases(lab):
    if "fp32" not in lab.dtypes:
        return
    spec = attention_spec(lab, "fp32", "causal", 4096 if lab.options.quick else 16384, 64, 4, threads=2) | {"enough_s": 600}
    sides = {"1 rank": partial(lab.peer, "torch_plugin", spec)}
    for strategy in GLOO_STRATEGIES:
        sides[strategy] = partial(lab.peer, "torch_plugin", spec | {"threads": 1, "strategy": strategy}, ranks=2)
    yield Case(spec, sides, 2)


def gloo_table(results):
    rows = [[label(result, binary(result["what"]["seq"])), strategy, *beside(result, "1 rank", strategy)]
            for result in results for strategy in GLOO_STRATEGIES]
    return ("Two processes over gloo with a thread each beside one with two threads: causal, fp32, 4 heads, D 64, ms.\n\n"
            ) + table(["S", "strategy", "forward: 1 x 2", "2 x 1", "ratio", "with backward: 1 x 2", "2 x 1", "ratio"], rows)


# --- train -----------------------------------------------------------------------------------------------------------------

def train_cases(lab):
    grid = itertools.product([(4, 64)] if lab.options.quick else [(4, 64), (1, 1024)], lab.dtypes,
                             (1,) if lab.options.quick else (1, 2))
    for (batch, seq_len), dtype, threads in grid:
        spec = {"batch": batch, "seq_len": seq_len, "dtype": dtype, "threads": threads, "steps": 3 if seq_len == 64 else 1}
        yield Case(spec, {"ours": partial(lab.train, spec),
                          "PyTorch": partial(lab.peer, "torch_train", spec)}, threads)


def train_table(results):
    rows = []
    for result in results:
        what = result["what"]
        theirs, ours = (median(result, side, lambda printed, _: printed["tokens_per_s"]) for side in ("PyTorch", "ours"))
        memory = median(result, "ours", lambda printed, _: printed.get("peak_memory_bytes"))
        of_peak = share(result, "ours", lambda printed: printed["gflops"])
        rows.append([label(result, f"{what['batch']} x {what['seq_len']}"), what["dtype"], what["threads"], number(theirs, 1),
                     number(ours, 1), ratio(ours, theirs), percent(of_peak), number(memory and memory / 2**30, 2)])
    return ("GPT-2 124M (vocabulary 50,257, no dropout), AdamW, tokens per second of a step; PyTorch: Transformers' "
            "GPT2LMHeadModel with sdpa, fused AdamW, bf16 by autocast.\n\n") + table(
                ["batch", "type", "threads", "PyTorch", "ours", "ratio", "ours, of peak", "ours, GiB"], rows)


# --- product ---------------------------------------------------------------------------------------------------------------

def product_cases(lab):
    for dtype, size in itertools.product(lab.dtypes, [1024] if lab.options.quick else [1024, 2048]):
        spec = {"size": size, "dtype": dtype, "threads": 1, "repeat": calls_for(2 * size**3)}
        sides = {"ours": partial(lab.product, spec),
                 "PyTorch": partial(lab.peer, "torch_product", spec)}
        if dtype == "fp32":  # the only one that NumPy multiplies by OpenBLAS
            sides["NumPy"] = partial(lab.peer, "numpy_product", spec)
        yield Case(spec, sides)


def product_table(results):
    def rate(printed, _=None):
        return printed["gflops"]

    rows = [[label(result, result["what"]["dtype"]), result["what"]["size"],
             *(rated(median(result, side, rate), share(result, side, rate)) for side in ("ours", "NumPy", "PyTorch"))]
            for result in results]
    return "Square matrices, one thread, GFLOP/s (share of the multiply-add peak).\n\n" + table(
        ["type", "size", "oneDNN in dattn", "OpenBLAS in NumPy", "PyTorch"], rows)


# --- sharded ---------------------------------------------------------------------------------------------------------------

MESHES = {"ring": (2, "ring=2"), "ulysses": (2, "ulysses=2"), "hybrid": (4, "ulysses=2,ring=2")}  # strategy: ranks, mesh
JOBS = ("threads", "mpirun")


def sharded_cases(lab):
    if "fp32" not in lab.dtypes:
        return
    for seq in chosen(lab.options.seq, [4096] if lab.options.quick else [4096, 16384, 65536]):
        spec = attention_spec(lab, "fp32", "causal", seq, 64, 4)
        sides = {"1 rank": partial(lab.attention, spec | {"threads": 2})}
        for job, (strategy, (ranks, mesh)) in itertools.product(JOBS, MESHES.items()):
            more = ["--mesh", mesh, "--set", f"strategy={strategy}"]
            sides[f"{strategy}, {job}"] = partial(lab.attention, spec, more, ranks=ranks, mpi=job == "mpirun")
        yield Case(spec, sides, 2)


def sharded_table(results):
    rows = []
    for result, job, (strategy, (ranks, _)) in itertools.product(results, JOBS, MESHES.items()):
        cells = []
        for which in PASSES:
            whole, parts = (milliseconds(result, side, which) for side in ("1 rank", f"{strategy}, {job}"))
            cells += [number(whole, 1), number(parts, 1), ratio(whole, parts)]
        rows.append([label(result, binary(result["what"]["seq"])), f"{strategy}, {ranks} x 1", job, *cells])
    return ("Causal, fp32, 4 heads, D 64, ms: 1 rank x 2 threads, then ranks of one thread each, and the first over the "
            "second.\n\n") + table(
                ["S", "ranks", "job", "forward: 1 x 2", "sharded", "ratio", "backward: 1 x 2", "sharded", "ratio"], rows)


def train_axes(batch):
    return ("ring", "ulysses") if batch == 1 else ("data",)


def sharded_train_cases(lab):
    grid = itertools.product([(4, 64), (1, 1024)] if lab.options.quick else [(4, 64), (2, 256), (1, 1024)], lab.dtypes)
    for (batch, seq_len), dtype in grid:
        spec = {"batch": batch, "seq_len": seq_len, "dtype": dtype, "threads": 2, "steps": 3 if seq_len == 64 else 1}
        sides = {"1 rank": partial(lab.train, spec)}
        for axis, job in itertools.product(train_axes(batch), JOBS):
            sides[f"{axis}, {job}"] = partial(lab.train, spec | {"threads": 1}, axis, ranks=2, mpi=job == "mpirun")
        yield Case(spec, sides, 2)


def sharded_train_table(results):
    def rate(printed, _):
        return printed["tokens_per_s"]

    rows = []
    for result in results:
        what, whole = result["what"], median(result, "1 rank", rate)
        for axis, job in itertools.product(train_axes(what["batch"]), JOBS):
            parts = median(result, f"{axis}, {job}", rate)
            rows.append([label(result, f"{what['batch']} x {what['seq_len']}"), what["dtype"], f"{axis} 2", job,
                         number(whole, 1), number(parts, 1), ratio(parts, whole)])
    return ("GPT-2 124M as above, tokens per second of a step: 1 rank x 2 threads, then 2 ranks of one thread each, and the "
            "second over the first.\n\n") + table(["batch", "type", "mesh", "job", "1 x 2", "2 x 1", "ratio"], rows)


# --- masks -----------------------------------------------------------------------------------------------------------------

def visible_masks(seq):
    """What the table calls a mask: (its keys in attention.mask, keys of the full mask with as many a row); of seq positions."""
    documents = [0, seq // 8, seq // 2, seq]
    blocks = [[row, key] for row in range(seq // 128) for key in range(seq // 128) if key in (0, row - 1, row) and key <= row]
    return {"causal": ({"kind": "causal"}, seq),
            "3 documents, causal": ({"kind": "documents", "cu_seqlens": documents, "within": {"kind": "causal"}}, seq),
            "prefix of S / 4": ({"kind": "prefix", "length": seq // 4}, seq),
            "window of 512": ({"kind": "window", "left": 511, "right": 0}, 512),
            "blocks of 128: first, before, own": ({"kind": "blocks", "size": 128, "list": blocks}, 384)}


def full_mask(keys):
    return f"full, {keys} keys"


def masks_cases(lab):
    for dtype in lab.dtypes:
        spec = attention_spec(lab, dtype, "full", 1024 if lab.options.quick else 8192, 64, 2)
        masks = visible_masks(spec["seq"])
        sides = {full_mask(keys): partial(lab.attention, spec | {"seq": keys, "queries": spec["seq"]})
                 for keys in sorted({keys for _, keys in masks.values()}, reverse=True)}
        sides |= {name: partial(lab.attention, spec, ["--set", f"attention.mask={json.dumps(mask)}"])
                  for name, (mask, _) in masks.items()}
        yield Case(spec, sides)


def masks_table(results):
    rows = []
    for result in results:
        for name, (_, keys) in visible_masks(result["what"]["seq"]).items():
            cells = []
            for which in PASSES:
                whole, mine = (median(result, side, lambda printed, _, which=which: printed[f"{which}_gflops"])
                               for side in (full_mask(keys), name))
                cells += [number(whole), number(mine), ratio(whole, mine)]
            rows.append([label(result, result["what"]["dtype"]), name, keys, *cells])
    what = results[0]["what"]
    return (f"GFLOP/s by visible pairs, S {what['seq']}, D {what['dim']}, {what['heads']} heads, one thread, beside a full mask of "
            "about as many tiles: S rows and as many keys as the column says; the price is the time of a visible pair over that "
            "of the full mask.\n\n") + table(
                ["type", "mask", "keys", "forward: full", "mask", "price", "backward: full", "mask", "price"], rows)


# --- terms -----------------------------------------------------------------------------------------------------------------

TERMS = {"plain": [], "invariant": ["--invariant"], "dropout 0.1": ["--dropout", 0.1], "softcap": ["--softcap", 30],
         "ALiBi": ["--alibi"]}  # flags of dattn_attention_bench


def terms_cases(lab):
    for dtype in lab.dtypes:
        spec = attention_spec(lab, dtype, "causal", 1024 if lab.options.quick else 2048, 64, 4)
        yield Case(spec, {term: partial(lab.kernel, spec, flags) for term, flags in TERMS.items()})


def terms_table(results):
    rows = []
    for result, term in itertools.product(results, TERMS):
        cells = []
        for which in PASSES:
            plain, priced = (milliseconds(result, side, which) for side in ("plain", term))
            cells += [number(priced, 1), "" if term == "plain" else ratio(priced, plain)]
        rows.append([label(result, result["what"]["dtype"]), term, *cells])
    what = results[0]["what"]
    return (f"Our kernel beside itself: causal, S {what['seq']}, D {what['dim']}, {what['heads']} heads, one thread, ms; the price "
            "is the time over that of the plain call.\n\n") + table(
                ["type", "", "forward", "price", "backward", "price"], rows)


BLOCKS = {"attention": Block("attention", attention_cases, attention_table),
          "scaling": Block("attention", scaling_cases, scaling_table),
          "onnxruntime": Block("attention", onnx_cases, onnx_table),
          "small": Block("small", small_cases, small_table),
          "decode": Block("small", decode_cases, decode_table),
          "plugin": Block("plugin", plugin_cases, plugin_table),
          "gloo": Block("plugin", gloo_cases, gloo_table),
          "train": Block("train", train_cases, train_table),
          "product": Block("product", product_cases, product_table),
          "sharded": Block("sharded", sharded_cases, sharded_table),
          "sharded_train": Block("sharded", sharded_train_cases, sharded_train_table),
          "masks": Block("masks", masks_cases, masks_table),
          "terms": Block("terms", terms_cases, terms_table)}
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS.values()))
ON_PROCESSOR_TIME = ("attention", "small", "decode", "terms")  # blocks of one thread whose sides can measure it
