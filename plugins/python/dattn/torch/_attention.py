"""dattn.torch.attention: what a user calls. It turns its arguments into an operator call (_ops.py)."""
import json

import torch
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from dattn import _c
from dattn.torch import _dtensor, _mesh, _ops, _plan, sharding
from dattn.torch._masks import plain_mask

_texts = {}  # call texts by the arguments that make them; the mesh in the value keeps its id from being used again
_mesh._on_close.append(lambda mesh: _texts.clear())  # so that their groups can end
MOST_TEXTS = 4096


def attention(q, k, v, *, mask="causal", mesh=None, layout="zigzag", strategy="auto", tensor_format="bshd", scale=None,
              softcap=None, alibi_slopes=None, bias=None, sink=None, dropout_p=0.0, dropout_seed=None, seq_len=None,
              seq_len_kv=None, determinism=None, timeout_s=None, return_lse=False):
    """Exact attention of this rank's queries over the keys of all ranks.

    q, k, v: this rank's shards, [batch, seq, heads, dim] (tensor_format "bshd"), or "sbhd", "bhsd", "thd" (no batch axis); any
        strides but the last; fewer heads in k and v are shared by groups of query heads. DTensors give a DTensor.
    mask: a kind of configs/SCHEMA.md ("full", "causal", ..), or a dict with that section's keys: {"kind": "window", "left": 128}.
    mesh: a DeviceMesh with dimensions out of data, ring_outer, ring, rows, ulysses, tensor; a ProcessGroup (a ring, or with
        strategy "ulysses" that); None = one rank.
    layout: who holds which rows: contiguous, zigzag, striped, balanced (dattn.torch.shard cuts so).
    seq_len, seq_len_kv: lengths of the whole sequence, of queries and of keys; seq_len alone is that of both. Without it the
        ranks tell each other their lengths in each call.
    scale: of scores, 1 / sqrt(dim) if absent; softcap: scores become softcap * tanh(score / softcap); alibi_slopes: one for
        each head of the model.
    bias: [batch or 1, heads or 1, seq, all keys], added to this rank's scores; sink: [heads] logits of a key without value.
        Both have gradients; that of sink is this rank's part of the sum.
    dropout_p: probability of dropping a pair, keyed by global positions; dropout_seed in [0, 2**32), or drawn from torch's
        default generator of the mesh's first rank.
    determinism: off, repeatable, invariant. timeout_s: a rank silent for so long is lost; absent = the process group's.
    return_lse: also returns [batch, heads, seq] fp32 logarithms of the sums of exponentials; without gradient.

    Raises dattn.BadInput (a ValueError) for what is refused, before anything is sent but the lengths and the seed that the
    ranks tell each other; wrong tensors and meshes are refused before these too. dattn.PeerLost is a RuntimeError."""
    if isinstance(q, DTensor):
        return _dtensor.attention(attention, q, k, v, mesh=mesh, tensor_format=tensor_format, bias=bias, sink=sink,
                                  return_lse=return_lse, seq_len=seq_len, seq_len_kv=seq_len_kv, mask=mask, layout=layout,
                                  strategy=strategy, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
                                  dropout_p=dropout_p, dropout_seed=dropout_seed, determinism=determinism, timeout_s=timeout_s)
    if torch.compiler.is_compiling():
        call, sequence_ranks = _constant_call(mesh, _fixed(mask), layout, strategy, tensor_format, _fixed(scale), _fixed(softcap),
                                              _fixed(alibi_slopes), _fixed(dropout_p), determinism, _fixed(timeout_s))
    else:
        call, sequence_ranks = _call(mesh, mask, layout, strategy, tensor_format, scale, softcap, alibi_slopes, dropout_p,
                                     determinism, timeout_s)
    if dropout_seed is not None and not 0 <= dropout_seed < 1 << 32:
        raise _c.BadInput(f"dropout_seed is {dropout_seed}; it must lie in [0, 2**32)")
    draws = dropout_p > 0 and dropout_seed is None
    if (draws or (sequence_ranks > 1 and seq_len is None)) and (q.is_cpu or q.is_cuda) and not torch.compiler.is_compiling():
        q, k, v, bias = _ops.checked(tensor_format, q, k, v, bias, sink)  # before ranks tell each other lengths or the seed
    axis = 1 if tensor_format == "bshd" else 2 if tensor_format == "bhsd" else 0
    seq_q, seq_kv = sharding.whole_lengths(sequence_ranks, q.shape[axis], k.shape[axis], seq_len, seq_len_kv,
                                           lambda *rows: sharding.total_rows(_plan.call_of(call).mesh_spec, *rows))
    seed = _ops.ops.agree(torch.randint(0, 1 << 32, (1,), dtype=torch.int64), call) if draws else None
    stream = dropout_seed if dropout_p > 0 and not draws else 0
    plain = (type(q) is torch.Tensor and (q.is_cpu or q.is_cuda) and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
             and torch._C._functorch.peek_interpreter_stack() is None)
    if not plain:
        if not torch.compiler.is_compiling():
            _ops.refuse_tangents(q, k, v, bias, sink)
        out, lse = _ops.ops.attention_forward(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream)
    else:
        q, k, v, bias = _ops.under_autocast(q, k, v, bias)
        if torch.is_grad_enabled():
            out, lse = _ops.Attention.apply(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream)
        else:
            out, lse = _ops.attention_forward(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream)
    if return_lse:
        return out, lse[0] if tensor_format == "thd" else lse
    return out


def _call(mesh, mask, layout, strategy, tensor_format, scale, softcap, alibi_slopes, dropout_p, determinism, timeout_s):
    """(call text, ranks along the sequence)."""
    if type(mask) is not str:
        mask = json.dumps(plain_mask(mask))
    if alibi_slopes is not None:
        alibi_slopes = tuple(plain_values(alibi_slopes))
    key = (id(mesh), mask, layout, strategy, tensor_format, scale, softcap, alibi_slopes, dropout_p, determinism, timeout_s)
    found = _texts.get(key)
    if found is None:
        if len(_texts) >= MOST_TEXTS:
            _texts.clear()
        found = _texts[key] = (*_make_call(mesh, *key[1:]), mesh)
    return found[0], found[1]


def _make_call(mesh, mask, layout, strategy, tensor_format, scale, softcap, alibi_slopes, dropout_p, determinism, timeout_s):
    if tensor_format not in _plan.FORMATS:
        raise _c.BadInput(f"unknown tensor_format '{tensor_format}'; known: {', '.join(_plan.FORMATS)}")
    if not 0.0 <= dropout_p < 1.0:
        raise _c.BadInput(f"dropout_p is {dropout_p}; it must lie in [0, 1)")
    spec = _mesh.spec_of(mesh, strategy, timeout_s)
    terms = {"mask": json.loads(mask) if mask.startswith("{") else {"kind": mask}}
    if scale is not None:
        terms["softmax_scale"] = float(scale)
    if softcap is not None:
        terms["softcap"] = float(softcap)
    if alibi_slopes is not None:
        terms["alibi_slopes"] = list(alibi_slopes)
    if dropout_p > 0:
        terms["dropout"] = {"p": dropout_p}
    options = {"mesh": _plan.mesh_text(spec), "attention": terms, "layout": layout, "strategy": strategy,
               "determinism": determinism, "format": tensor_format}
    return json.dumps(options), spec.sequence_ranks


@_plan.constant_of_graphs
def _constant_call(*arguments):
    return _call(*arguments)


def _fixed(value):
    """Numbers as constants of the graph, which torch.compile(dynamic=True) would keep variable."""
    if isinstance(value, dict):
        return {name: _fixed(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fixed(one) for one in value]
    return guard_scalar(value) if isinstance(value, (int, float)) else value


def plain_values(values):
    return values.tolist() if isinstance(values, torch.Tensor) else [float(value) for value in values]
