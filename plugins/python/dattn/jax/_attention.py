"""dattn.jax.attention: XLA custom calls with derivatives and batching.

    attention -> _attend (custom_vjp) -> _forward, _backward (custom_vmap) -> dattn_forward, dattn_backward (custom calls)"""
import json
import operator

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from dattn import _c
from dattn.jax import _axes, _library
from dattn.jax._call import Call, dtype_struct, plain_mask, plain_value, rows_of


def attention(q, k, v, *, mask="causal", axes=None, layout="zigzag", strategy="auto", seq_len=None, seq_len_kv=None, scale=None,
              softcap=None, alibi_slopes=None, bias=None, sink=None, dropout_p=0.0, dropout_seed=None, determinism=None,
              return_lse=False, timeout_s=60.0):
    """Attention of this device's queries over the keys of all devices of the axes: softmax(scale q k^T + terms) v.

    q [B, S, H, D], k [B, T, K, D], v [B, T, K, V], or without B: this device's shards, K divides H; float32, float64,
    bfloat16 or float16. Returns out [B, S, H, V] and, with return_lse, lse [B, H, S] (float32; float64 for float64; no gradient).

    mask: a kind's name or a dict with the keys of configs/SCHEMA.md (attention.mask); None = full
    axes: mesh axes of the enclosing shard_map, as a dict {ours: its name} or names; None: those with our names, which are data,
        ring_outer, ring, rows, ulysses, tensor. The sequence is cut over ring_outer to ulysses, heads over tensor.
    layout: which rows a device holds: contiguous, zigzag, striped, balanced (arrange, shard)
    strategy: how keys and values travel: auto, or a name of `dattn plan --help`
    seq_len, seq_len_kv: length of the whole sequence; seq_len is required where several devices share it
    scale: of the scores; None = D ** -0.5
    softcap, alibi_slopes: as in configs/SCHEMA.md
    bias [B or 1, H or 1, S, seq_len_kv]: added to scores; sink [H]: one more logit per head, with no value
    dropout_p, dropout_seed: the same seed (an integer or uint32 array) drops the same pairs, on any mesh
    determinism: off, repeatable, invariant; None = repeatable on the CPU, off on CUDA devices
    timeout_s: a device that is waited for as long has failed; the call then fails on all devices

    Raises BadInput (a ValueError) when the call is traced; while it runs, failures are jax.errors.JaxRuntimeError."""
    if all(getattr(array, "ndim", None) == 3 for array in (q, k, v)):
        results = attention(q[None], k[None], v[None], mask=mask, axes=axes, layout=layout, strategy=strategy, seq_len=seq_len,
                            seq_len_kv=seq_len_kv, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
                            bias=bias if bias is None or bias.ndim == 4 else bias[None], sink=sink, dropout_p=dropout_p,
                            dropout_seed=dropout_seed, determinism=determinism, return_lse=return_lse, timeout_s=timeout_s)
        return jax.tree.map(lambda result: result[0], results)
    _library.register()
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check_inputs(q, k, v, dropout_p, dropout_seed, timeout_s)
    found = _axes.axes_of(axes)
    seq_len, seq_len_kv = _lengths(found, q, k, seq_len, seq_len_kv)
    terms = {"mask": plain_mask(mask)}
    if scale is not None:
        terms["softmax_scale"] = float(scale)
    if softcap is not None:
        terms["softcap"] = float(softcap)
    if alibi_slopes is not None:
        terms["alibi_slopes"] = [float(slope) for slope in plain_value(alibi_slopes, "alibi_slopes")]
    if dropout_p > 0:
        terms["dropout"] = {"p": float(dropout_p)}
    call = Call(found, seq_len, seq_len_kv, json.dumps(terms), layout, strategy, determinism or "", float(timeout_s),
                _axes.threads_of(found))
    bias = None if bias is None else jnp.asarray(bias, q.dtype)
    sink = None if sink is None else jnp.asarray(sink, jnp.float32)
    _check_call(call, q, k, v, bias, sink)
    stream = jnp.asarray(0 if dropout_seed is None else dropout_seed).astype(jnp.uint32).reshape(1)
    arrays = _axes.varying_alike(q, k, v, found.place(), stream, bias, sink)
    out, lse = _attend(call, *arrays)
    return (out, jax.lax.stop_gradient(lse)) if return_lse else out


# ---- what is refused while tracing ----


def _check_inputs(q, k, v, dropout_p, dropout_seed, timeout_s):
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise _c.BadInput(f"{name} has shape {list(array.shape)}; it must be [batch, seq, heads, dim]")
        dtype_struct(array.dtype, name)
        if array.dtype != q.dtype:
            raise _c.BadInput(f"q is {q.dtype} but {name} is {array.dtype}; give all of one type")
    for name, axis, one, other in (("k", "batch", q.shape[0], k.shape[0]), ("v", "batch", q.shape[0], v.shape[0]),
                                   ("k", "dim", q.shape[3], k.shape[3])):
        if one != other:
            raise _c.BadInput(f"{name} has {axis} {other} but q has {one}")
    if k.shape[1:3] != v.shape[1:3]:
        raise _c.BadInput(f"k has {k.shape[1]} rows and {k.shape[2]} heads but v has {v.shape[1]} and {v.shape[2]}")
    if not 0.0 <= dropout_p < 1.0:
        raise _c.BadInput(f"dropout_p is {dropout_p}; it must lie in [0, 1)")
    if dropout_p > 0 and dropout_seed is None:
        raise _c.BadInput(f"dropout_p is {dropout_p} but there is no dropout_seed; give another one for each step and layer")
    if not timeout_s > 0:
        raise _c.BadInput(f"timeout_s is {timeout_s}; it must be positive")


def _lengths(axes, q, k, seq_len, seq_len_kv):
    if axes.sequence_parts == 1:
        return q.shape[1] if seq_len is None else operator.index(seq_len), \
            k.shape[1] if seq_len_kv is None else operator.index(seq_len_kv)
    if seq_len is None or (seq_len_kv is None and k.shape[1] != q.shape[1]):
        raise _c.BadInput(f"{axes.sequence_parts} devices share the sequence: give seq_len, the length of the whole (and"
                          " seq_len_kv where keys have another)")
    return operator.index(seq_len), operator.index(seq_len if seq_len_kv is None else seq_len_kv)


def _check_call(call, q, k, v, bias, sink):
    flags = 0
    if bias is not None:
        allowed = ({1, q.shape[0]}, {1, q.shape[2]}, {q.shape[1]}, {call.seq_kv})
        if bias.ndim != 4 or any(size not in sizes for size, sizes in zip(bias.shape, allowed)):
            raise _c.BadInput(f"bias has shape {list(bias.shape)}; it must be [{q.shape[0]} or 1, {q.shape[2]} or 1, {q.shape[1]},"
                              f" {call.seq_kv}]: batch, heads, this device's queries, all keys")
        flags = _c.bias_flags(bias.shape)
    if sink is not None and sink.shape != (q.shape[2],):
        raise _c.BadInput(f"sink has shape {list(sink.shape)}; it must be [{q.shape[2]}], one number for each head of this device")
    rows = rows_of(call, q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype.name, flags, sink is not None)
    for name, array, most, seq in (("q", q, rows[0], call.seq_q), ("k", k, rows[1], call.seq_kv)):
        if array.shape[1] != most:
            raise _c.BadInput(f"{name} has {array.shape[1]} rows, but of a sequence of {seq} in layout {call.layout} over"
                              f" {call.axes.sequence_parts} devices each holds {most}"
                              + ("" if seq % call.axes.sequence_parts == 0 else ", padding included"))


# ---- derivatives ----


def _attend_forward(call, q, k, v, place, stream, bias, sink):
    out, lse = _forward(call, q, k, v, place, stream, bias, sink)
    return (out, lse), (q, k, v, place, stream, bias, sink, out, lse)


def _attend_backward(call, saved, cotangents):
    q, k, v, place, stream, bias, sink, out, lse = saved
    q, dout = _axes.varying_alike(q, cotangents[0].astype(q.dtype))
    dq, dk, dv, dbias, dsink = _backward(call, q, k, v, place, stream, bias, sink, out, lse, dout)
    return dq, dk, dv, None, None, dbias, dsink


def _attend(call, *arrays):
    return _forward(call, *arrays)


_attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _attend_backward)


# ---- the custom calls, and many of them as one ----


def _forward(call, *arrays):
    """q, k, v, place, stream, bias, sink -> out, lse."""
    run = custom_vmap(lambda *given: _call_forward(call, *given))

    @run.def_vmap
    def _(size, batched, *given):
        q, k, v, place, stream, bias, sink = given
        in_q, in_k, in_v, in_place, in_stream, in_bias, in_sink = batched
        if in_place or in_stream or in_sink:
            return _one_by_one(lambda *one: _forward(call, *one), batched, given), (True, True)
        if bias is not None and (in_bias or bias.shape[0] > 1):
            bias = _fold(bias, in_bias, size, min_batch=q.shape[1 if in_q else 0])
        q, k, v = _fold(q, in_q, size), _fold(k, in_k, size), _fold(v, in_v, size)
        results = _forward(call.for_batches(size), q, k, v, place, stream, bias, sink)
        return _unfold(results, size), (True, True)
    return run(*arrays)


def _backward(call, *arrays):
    """q, k, v, place, stream, bias, sink, out, lse, dout -> dq, dk, dv, dbias, dsink."""
    run = custom_vmap(lambda *given: _call_backward(call, *given))

    @run.def_vmap
    def _(size, batched, *given):
        q, k, v, place, stream, bias, sink, out, lse, dout = given
        in_q, in_k, in_v, in_place, in_stream, in_bias, _, in_out, in_lse, in_dout = batched
        done = tuple(given[at] is not None for at in (0, 1, 2, 5, 6))
        done = tuple(True if there else None for there in done)
        if in_place or in_stream or sink is not None:  # each of the mapped calls has a dsink of its own
            return _one_by_one(lambda *one: _backward(call, *one), batched, given), done
        batch = q.shape[1 if in_q else 0]
        shared = bias is not None and bias.shape[1 if in_bias else 0] < batch
        if bias is not None:
            bias = _fold(bias, in_bias, size, min_batch=batch)
        q, k, v, out, lse, dout = (_fold(array, inside, size) for array, inside in (
            (q, in_q), (k, in_k), (v, in_v), (out, in_out), (lse, in_lse), (dout, in_dout)))
        dq, dk, dv, dbias, _ = _unfold(_backward(call.for_batches(size), q, k, v, place, stream, bias, None, out, lse, dout), size)
        if shared:
            dbias = dbias.sum(1, keepdims=True)
        return (dq, dk, dv, dbias, None), done
    return run(*arrays)


def _fold(array, batched, size, min_batch=None):
    """[size, B, ..], or [B, ..] for all, -> [size * B, ..]; B is at least min_batch."""
    if not batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    if min_batch is not None:
        array = jnp.broadcast_to(array, (size, min_batch, *array.shape[2:]))
    return array.reshape(size * array.shape[1], *array.shape[2:])


def _unfold(results, size):
    return jax.tree.map(lambda result: result.reshape(size, result.shape[0] // size, *result.shape[1:]), results)


def _one_by_one(function, batched, arrays):
    mapped = [array for array, inside in zip(arrays, batched) if array is not None and inside]

    def one(rows):
        rows = iter(rows)
        return function(*(next(rows) if array is not None and inside else array for array, inside in zip(arrays, batched)))
    return jax.lax.map(one, mapped)


def _call_forward(call, q, k, v, place, stream, bias, sink):
    out = _like(q, (*q.shape[:3], v.shape[3]))
    lse = _like(q, (q.shape[0], q.shape[2], q.shape[1]), jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
    operands = [array for array in (q, k, v, place, stream, bias, sink) if array is not None]
    return _custom_call(False, (out, lse), operands, call.attributes(False, bias, sink))


def _call_backward(call, q, k, v, place, stream, bias, sink, out, lse, dout):
    results = [_like(array, array.shape) for array in (q, k, v, bias, sink) if array is not None]
    operands = [array for array in (q, k, v, place, stream, bias, sink, out, lse, dout) if array is not None]
    dq, dk, dv, *rest = _custom_call(True, results, operands, call.attributes(True, bias, sink))
    rest = iter(rest)
    return dq, dk, dv, None if bias is None else next(rest), None if sink is None else next(rest)


def _custom_call(backward, results, operands, attributes):
    # No side effect, although devices wait for each other: what XLA leaves out or moves, it does in the program of all of them.
    return jax.ffi.ffi_call(_library.TARGETS[backward], tuple(results))(*operands, **attributes)


def _like(array, shape, dtype=None):
    """What a custom call writes: it varies over the axes that `array` varies over."""
    kind = _axes.varying(array)
    if kind is None:
        return jax.ShapeDtypeStruct(shape, dtype or array.dtype)
    whole = jax.sharding.PartitionSpec(*(None,) * len(shape))
    return jax.ShapeDtypeStruct(shape, dtype or array.dtype, manual_axis_type=kind,
                                sharding=jax.sharding.NamedSharding(jax.typeof(array).sharding.mesh, whole))
