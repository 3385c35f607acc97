"""The operators of dattn, registered with torch.library: kernels, fake kernels, autograd, autocast.

    dattn::attention_forward(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream) -> (out, lse)
    dattn::attention_backward(dout, q, k, v, bias, sink, out, lse, seed, ...) -> (dq, dk, dv, dbias, dsink)
    dattn::agree(value, call) -> value of the mesh's first rank
    dattn::positions(like, sharding, seq) -> global positions of this rank's rows
    dattn::unshard(shard, sharding, seq, dim, sum) -> whole;  dattn::reduce_shard: its adjoint

`call` and `sharding` are JSON texts (_plan.py, sharding.py). seq_q, seq_kv: lengths of the whole sequence. `seed`
[1] int64 on the cpu, or `stream`: the number that dropout is keyed by, beside positions."""
import ctypes
import json

import torch
from torch.autograd.forward_ad import unpack_dual

from dattn import _c
from dattn.torch import _mesh, _plan

library = torch.library.Library("dattn", "DEF")
_CALL = "str call, SymInt seq_q, SymInt seq_kv, SymInt stream"
library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sink, Tensor? seed, {_CALL})"
               " -> (Tensor, Tensor)")
library.define("attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sink, Tensor out,"
               f" Tensor lse, Tensor? seed, {_CALL}, bool want_bias, bool want_sink) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
library.define("agree(Tensor value, str call) -> Tensor")
library.define("positions(Tensor like, str sharding, SymInt seq) -> Tensor")
library.define("unshard(Tensor shard, str sharding, SymInt seq, int dim, bool sum) -> Tensor")
library.define("reduce_shard(Tensor whole, str sharding, SymInt seq, int dim) -> Tensor")
ops = torch.ops.dattn


def kernel(name):
    """Registers the function for the devices there are."""
    def register(function):
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        return function
    return register


def fake(name):
    return lambda function: torch.library.register_fake(f"dattn::{name}", function, lib=library)


def _stream(seed, stream):
    return stream if seed is None else int(seed) & 0xffffffff


# ---- attention ----


@kernel("attention_forward")
def attention_forward(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream):
    if sink is not None:
        sink = sink.to(torch.float32)
    plan = _plan.call_of(call).plan(q, k, v, bias, sink, seq_q, seq_kv)
    return plan.forward(q, k, v, bias, sink, _stream(seed, stream))


@fake("attention_forward")
def _(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream):
    axes = _plan.call_of(call).axes
    at = lambda axis: 1 if axes[axis] is None else q.shape[axes[axis]]
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty([*q.shape[:-1], v.shape[-1]]), q.new_empty([at(0), at(2), at(1)], dtype=lse)


@kernel("attention_backward")
def attention_backward(dout, q, k, v, bias, sink, out, lse, seed, call, seq_q, seq_kv, stream, want_bias, want_sink):
    gradients = gradients_of(dout, q, k, v, bias, sink, out, lse, seed, call, seq_q, seq_kv, stream, want_bias, want_sink)
    nothing = torch.empty(0, dtype=torch.float32, device=q.device)  # an operator's results are tensors
    return (*gradients[:3], *(nothing.clone().to(like.dtype) if gradient is None else gradient
                              for gradient, like in zip(gradients[3:], (q, nothing))))


def gradients_of(dout, q, k, v, bias, sink, out, lse, seed, call, seq_q, seq_kv, stream, want_bias, want_sink):
    """[dq, dk, dv, dbias or None, dsink or None]."""
    sink32 = None if sink is None else sink.to(torch.float32)
    plan = _plan.call_of(call).plan(q, k, v, bias, sink32, seq_q, seq_kv)
    results = plan.backward(dout, q, k, v, bias, sink32, out, lse, _stream(seed, stream), want_bias, want_sink)
    if want_sink and sink.dtype != torch.float32:
        results[4] = results[4].to(sink.dtype)
    return results


@fake("attention_backward")
def _(dout, q, k, v, bias, sink, out, lse, seed, call, seq_q, seq_kv, stream, want_bias, want_sink):
    like = lambda tensor: tensor.new_empty(tensor.shape)
    return (like(q), like(k), like(v), like(bias) if want_bias else q.new_empty(0),
            like(sink) if want_sink else q.new_empty(0, dtype=torch.float32))


def _setup(ctx, inputs, output):
    q, k, v, bias, sink, seed, *ctx.call = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, sink, seed, out, lse)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 10
    q, k, v, bias, sink, seed, out, lse = ctx.saved_tensors
    want_bias, want_sink = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    dq, dk, dv, dbias, dsink = ops.attention_backward(dout, q, k, v, bias, sink, out, lse, seed, *ctx.call, want_bias, want_sink)
    return dq, dk, dv, dbias if want_bias else None, dsink if want_sink else None, None, None, None, None, None


torch.library.register_autograd("dattn::attention_forward", _backward, setup_context=_setup, lib=library)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("dattn::attention_backward has no derivative of its own; second derivatives of attention are not"
                              " available")


torch.library.register_autograd("dattn::attention_backward", _no_second_derivative, lib=library)


def refuse_tangents(*tensors):
    """Forward mode would pass over the operators: PyTorch takes their results to be constants."""
    if any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("dattn has no derivatives in forward mode (torch.func.jvp, dual tensors); use backward mode")


def _autocast(device):
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream):
        q, k, v, bias = autocast(device.lower(), q, k, v, bias)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return ops.attention_forward(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream)
    return cast


def autocast(device, *tensors):
    """Floating tensors as autocast wants them for matrix products; fp64 stays."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def under_autocast(q, k, v, bias):
    """The tensors as the operator gets them, where autocast is on."""
    device = "cpu" if q.is_cpu else "cuda"
    return autocast(device, q, k, v, bias) if torch.is_autocast_enabled(device) else (q, k, v, bias)


def checked(form, q, k, v, bias=None, sink=None):
    """under_autocast's tensors; what no plan could take is refused."""
    q, k, v, bias = under_autocast(q, k, v, bias)
    _plan.check_tensors(form, q, k, v, bias, sink)
    return q, k, v, bias


library.impl("attention_forward", _autocast("cpu"), "AutocastCPU")
library.impl("attention_forward", _autocast("cuda"), "AutocastCUDA")


class Attention(torch.autograd.Function):
    """The same operator without the dispatcher, for eager calls on plain tensors: it saves most of the call's overhead."""

    @staticmethod
    def forward(ctx, q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream):
        out, lse = attention_forward(q, k, v, bias, sink, seed, call, seq_q, seq_kv, stream)
        ctx.call = (call, seq_q, seq_kv, stream)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, sink, seed, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None or torch.is_grad_enabled() or type(dout) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0:
            return _backward(ctx, dout, _)
        q, k, v, bias, sink, seed, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return *gradients_of(dout, q, k, v, bias, sink, out, lse, seed, *ctx.call, wanted[3], wanted[4]), None, None, None, None, None


# ---- what ranks agree on, shards ----


def sharding_of(text, seq, device):
    """(mesh, handle) of the sharding of `seq` rows that a text describes."""
    mesh = _mesh.mesh_of(_plan.mesh_from(json.loads(text)["mesh"]), device)
    shardings = mesh.__dict__.setdefault("shardings", {})
    key = (text, seq)
    if key not in shardings:
        options = json.loads(text)
        attention = options["attention"]
        lib = _c.lib()
        shardings[key] = mesh._own(lib.dattn_sharding_destroy, _c.create(
            lib.dattn_sharding_create, mesh.mesh, seq, _c.text(options["layout"]),
            None if attention is None else _c.text(json.dumps(attention))))
    return mesh, shardings[key]


def rows_of(text, seq, device):
    return _c.lib().dattn_sharding_rows(sharding_of(text, seq, device)[1])


@kernel("agree")
def agree(value, call):
    mesh = _mesh.mesh_of(_plan.call_of(call).mesh_spec, torch.device("cpu"))
    if mesh.group is None:
        return value.clone()
    if "agreement" not in mesh.__dict__:
        lib = _c.lib()
        mesh.agreement = mesh._own(lib.dattn_sharding_destroy, _c.create(
            lib.dattn_sharding_create, mesh.everyone, len(mesh.callbacks.ranks), b"contiguous", None))
    return _gather(mesh, mesh.agreement, value.contiguous(), len(mesh.callbacks.ranks), 0)[:1]


@fake("agree")
def _(value, call):
    return torch.empty_like(value)


@kernel("positions")
def positions(like, sharding, seq):
    mesh, handle = sharding_of(sharding, seq, torch.device("cpu"))
    rows = torch.empty(_c.lib().dattn_sharding_rows(handle), dtype=torch.int64)
    pointer = ctypes.cast(rows.data_ptr(), ctypes.POINTER(ctypes.c_int64))
    _c.check(_c.lib().dattn_sharding_positions(handle, pointer, rows.numel()))
    return rows.to(like.device)


@fake("positions")
def _(like, sharding, seq):
    return like.new_empty(rows_of(sharding, int(seq), torch.device("cpu")), dtype=torch.int64)


def _gather(mesh, handle, shard, seq, dim):
    shape = list(shard.shape)
    shape[dim] = seq
    whole = torch.empty(shape, dtype=shard.dtype, device=shard.device)
    _transfer(_c.lib().dattn_unshard, mesh, handle, dim, shard, whole)
    return whole


def _transfer(function, mesh, handle, dim, source, target):
    axes = tuple(range(source.dim()))
    windows = [_plan.Window(axes), _plan.Window(axes)]
    kept = [window.show(tensor) for window, tensor in zip(windows, (source, target))]  # noqa: F841
    stream = torch.cuda.current_stream(source.device).cuda_stream if source.is_cuda else None
    with mesh.lock:
        mesh.run(function, handle, dim, windows[0].pointer, windows[1].pointer, stream)


@kernel("unshard")
def unshard(shard, sharding, seq, dim, sum):
    mesh, handle = sharding_of(sharding, seq, shard.device)
    rows = _c.lib().dattn_sharding_rows(handle)
    if shard.shape[dim] != rows:
        raise _c.BadInput(f"unshard: axis {dim} has {shard.shape[dim]} rows, but this rank holds {rows} of {seq}")
    if shard.dtype.itemsize == 1:  # the library moves elements of 2 bytes and more
        return _gather(mesh, handle, shard.to(torch.int16), seq, dim).to(shard.dtype)
    return _gather(mesh, handle, shard.contiguous(), seq, dim)


@fake("unshard")
def _(shard, sharding, seq, dim, sum):
    shape = list(shard.shape)
    shape[dim] = seq
    return shard.new_empty(shape)


@kernel("reduce_shard")
def reduce_shard(whole, sharding, seq, dim):
    mesh, handle = sharding_of(sharding, seq, whole.device)
    shape = list(whole.shape)
    shape[dim] = _c.lib().dattn_sharding_rows(handle)
    shard = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    _transfer(_c.lib().dattn_reduce_shard, mesh, handle, dim, whole.contiguous(), shard)
    return shard


@fake("reduce_shard")
def _(whole, sharding, seq, dim):
    shape = list(whole.shape)
    shape[dim] = rows_of(sharding, int(seq), torch.device("cpu"))
    return whole.new_empty(shape)


def _unshard_setup(ctx, inputs, output):
    _, ctx.sharding, ctx.seq, ctx.dim, ctx.sum = inputs


def _unshard_backward(ctx, gradient):
    if ctx.sum:
        own = ops.reduce_shard(gradient, ctx.sharding, ctx.seq, ctx.dim)
    else:
        own = gradient.index_select(ctx.dim, ops.positions(gradient, ctx.sharding, ctx.seq))
    return own, None, None, None, None


def _reduce_setup(ctx, inputs, output):
    _, ctx.sharding, ctx.seq, ctx.dim = inputs


def _reduce_backward(ctx, gradient):
    return ops.unshard(gradient, ctx.sharding, ctx.seq, ctx.dim, True), None, None, None


torch.library.register_autograd("dattn::unshard", _unshard_backward, setup_context=_unshard_setup, lib=library)
torch.library.register_autograd("dattn::reduce_shard", _reduce_backward, setup_context=_reduce_setup, lib=library)
