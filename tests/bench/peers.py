#!/usr/bin/env python3
"""One measurement of a peer, in a process of its own: compare.py starts it with a JSON object as its only argument, of which
"peer" names the function below. Prints one JSON line, like `dattn bench --json`; {"error": reason} where the peer is not
installed or fails.

A peer is imported inside its function, so that each process holds one and any may be missing."""
import json
import math
import os
import pathlib
import statistics
import sys
import time


def percentiles(seconds):
    ordered = sorted(seconds)
    return {f"p{share}": ordered[round(share / 100 * (len(ordered) - 1))] * 1e3 for share in (20, 50, 80)}


def timed(body, clock=time.perf_counter):
    start = clock()
    result = body()
    return clock() - start, result


def calls(repeat, enough_s=30):
    """Numbers of the calls to make: 0 warms up; of the others, which count, fewer than `repeat` where they take long."""
    start = time.perf_counter()
    for i in range(repeat + 1):
        yield i
        if i > 0 and time.perf_counter() - start > enough_s:
            return


def seconds_of(repeat, body):
    return [timed(body)[0] for _ in calls(repeat)][1:]


def torch_with(spec):
    import torch
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(1)
    return torch, {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]


def torch_passes(spec, forward, inputs, dout, clock=time.perf_counter, meet=lambda: None):
    """Milliseconds of both passes of forward(). `meet` waits for the other ranks, before a call and at its end."""
    import torch

    def seconds_of_call(body):
        meet()
        return timed(lambda: (body(), meet()), clock)[0]

    seconds = {"forward": [], "backward": []} if spec["backward"] else {"forward": []}
    for i in calls(spec["repeat"], spec.get("enough_s", 30)):
        with torch.no_grad():
            times = {"forward": seconds_of_call(forward)}
        if spec["backward"]:
            out = forward()
            times["backward"] = seconds_of_call(lambda out=out: torch.autograd.grad(out, inputs, dout))
        if i > 0:
            for which, second in times.items():
                seconds[which].append(second)
    return {"milliseconds": {which: percentiles(values) for which, values in seconds.items()}}


def torch_attention(spec):
    """scaled_dot_product_attention on [1, heads, rows, dim], the layout it likes best; dattn's own is [1, rows, heads, dim]."""
    torch, dtype = torch_with(spec)
    queries = spec.get("queries", spec["seq"])
    q = torch.randn(1, spec["heads"], queries, spec["dim"], dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, spec["kv_heads"], spec["seq"], spec["dim"], dtype=dtype, requires_grad=True) for _ in range(2))

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=spec["mask"] == "causal",
                                                                enable_gqa=spec["kv_heads"] != spec["heads"])

    clock = time.process_time if spec.get("cpu_time") else time.perf_counter
    return torch_passes(spec, forward, (q, k, v), torch.randn_like(q), clock)


def torch_plugin(spec):
    """dattn.torch.attention on [1, rows, heads, dim]; under torchrun, over gloo on this rank's rows of it."""
    torch, dtype = torch_with(spec)
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "plugins/python"))
    import dattn.torch

    ranks, options, meet = int(os.environ.get("WORLD_SIZE", "1")), {}, lambda: None
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        options = {"mesh": torch.distributed.group.WORLD, "seq_len": spec["seq"], "strategy": spec["strategy"]}
        meet = torch.distributed.barrier
    q, k, v = (torch.randn(1, spec["seq"] // ranks, spec[heads], spec["dim"], dtype=dtype, requires_grad=True)
               for heads in ("heads", "kv_heads", "kv_heads"))

    def forward():
        return dattn.torch.attention(q, k, v, mask=spec["mask"], **options)

    return torch_passes(spec, forward, (q, k, v), torch.randn_like(q), meet=meet)


def onnx_node(spec):
    """A model of one node on q, k, v of [1, seq, heads * dim]. MultiHeadAttention has as many key heads as heads."""
    from onnx import TensorProto, helper

    def tensor(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    seq, heads, kv_heads, dim = (spec[key] for key in ("seq", "heads", "kv_heads", "dim"))
    causal, grouped = int(spec["mask"] == "causal"), spec["operator"] == "GroupQueryAttention"
    if grouped:  # it always gives back the keys and values too, for the next call: [1, kv_heads, seq, dim]
        lengths = [helper.make_tensor("last", TensorProto.INT32, [1], [seq - 1]),
                   helper.make_tensor("total", TensorProto.INT32, [1], [seq])]
        node = helper.make_node(spec["operator"], ["q", "k", "v", "", "", "last", "total"], ["out", "keys", "values"],
                                domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, causal=causal)
    else:
        lengths = []
        node = helper.make_node(spec["operator"], ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=heads,
                                unidirectional=causal)
    results = [tensor("out", 1, seq, heads * dim)]
    if grouped:
        results += [tensor(name, 1, kv_heads, seq, dim) for name in ("keys", "values")]
    graph = helper.make_graph([node], "attention", [tensor("q", 1, seq, heads * dim), tensor("k", 1, seq, kv_heads * dim),
                                                    tensor("v", 1, seq, kv_heads * dim)], results, lengths)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def onnx_attention(spec):
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
    session = onnxruntime.InferenceSession(onnx_node(spec), options, providers=["CPUExecutionProvider"])
    random = numpy.random.default_rng(1)
    feed = {name: random.standard_normal((1, spec["seq"], spec[heads] * spec["dim"]), dtype=numpy.float32)
            for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))}
    off = float(numpy.abs(session.run(["out"], feed)[0] - torch_output(spec, feed)).max())
    if not off < 1e-4:
        raise ValueError(f"its output differs from PyTorch's by {off:.1e}")
    seconds = seconds_of(spec["repeat"], lambda: session.run(["out"], feed))
    return {"milliseconds": {"forward": percentiles(seconds)}, "difference_from_pytorch": off}


def torch_output(spec, feed):
    torch, _ = torch_with(spec)
    q, k, v = (torch.from_numpy(feed[name]).unflatten(2, (-1, spec["dim"])).transpose(1, 2) for name in "qkv")
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=spec["mask"] == "causal",
                                                           enable_gqa=spec["kv_heads"] != spec["heads"])
    return out.transpose(1, 2).flatten(2).numpy()


def torch_train(spec):
    """Steps of Transformers' GPT-2 124M from random weights on random tokens, without dropout."""
    torch, dtype = torch_with(spec)
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"Transformers took {model.config._attn_implementation} in place of sdpa")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=6e-4, fused=True)
    losses = []

    def step():
        tokens = torch.randint(model.config.vocab_size, (spec["batch"], spec["seq_len"]))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    seconds = seconds_of(spec["steps"], step)
    return {"milliseconds": percentiles(seconds), "tokens_per_s": spec["batch"] * spec["seq_len"] / statistics.median(seconds),
            "loss": losses[-1], "parameters": model.num_parameters()}


def product_rate(size, repeat, body):
    seconds = seconds_of(repeat, body)
    return {"milliseconds": percentiles(seconds), "gflops": 2 * math.pow(size, 3) / statistics.median(seconds) * 1e-9}


def torch_product(spec):
    torch, dtype = torch_with(spec)
    a, b, c = (torch.randn(spec["size"], spec["size"]).to(dtype) for _ in range(3))
    return product_rate(spec["size"], spec["repeat"], lambda: torch.mm(a, b, out=c))


def numpy_product(spec):
    import numpy

    random = numpy.random.default_rng(1)
    a, b, c = (random.standard_normal((spec["size"], spec["size"]), dtype=numpy.float32) for _ in range(3))
    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return product_rate(spec["size"], spec["repeat"], lambda: numpy.matmul(a, b, out=c)) | {
        "library": f"{blas['name']} {blas['version']}"}


PEERS = {peer.__name__: peer
         for peer in (torch_attention, torch_plugin, onnx_attention, torch_train, torch_product, numpy_product)}


def main(spec):
    try:
        result = PEERS[spec["peer"]](spec)
    except Exception as error:  # whatever a peer throws is the reason for an empty cell
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[0]}"}
    if os.environ.get("RANK", "0") == "0":  # lines of several ranks could mix
        print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
