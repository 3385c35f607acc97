"""Calls and plans: what an attention call's arguments mean to the C interface, worked out once and kept.

A *call* is everything but the tensors: mesh, mask, layout, .. as one JSON text, so that operators in compiled graphs can carry
it. A *plan* is a call for tensors of given shapes: the C handle, and the structs of its two calls, whose pointers are set
anew each time."""
import ctypes
import json

import torch

from dattn import _c
from dattn.torch import _mesh

FORMATS = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3), "thd": (None, 0, 1, 2)}  # axes B, S, H, D
BIAS_AXES = (0, 2, 1, 3)  # [B, H, S, T] of the user as [B, S, H, T]
DTYPES = {torch.float32: (_c.FLOAT, 32), torch.float64: (_c.FLOAT, 64), torch.bfloat16: (_c.BFLOAT, 16),
          torch.float16: (_c.FLOAT, 16)}
MOST_CALLS, MOST_PLANS = 512, 64  # kept; a call with new document boundaries each step makes a new one each step


def constant_of_graphs(function):
    """Its results are constants of compiled graphs: torch.compiler.assume_constant_result, which would import the compiler."""
    function._dynamo_marked_constant = True
    return function


class Window:
    """A dattn_tensor that is pointed at one tensor after the other."""
    __slots__ = ("struct", "pointer", "shape", "strides", "seen", "axes")

    def __init__(self, axes):
        self.axes = axes  # of the tensor, for each axis of the C tensor; None = an axis of 1
        self.shape, self.strides = (ctypes.c_int64 * len(axes))(), (ctypes.c_int64 * len(axes))()
        self.struct = _c.Tensor(ndim=len(axes), shape=self.shape, strides=self.strides)
        self.pointer = ctypes.pointer(self.struct)
        self.seen = None

    def show(self, tensor):
        """Points at the tensor, or at a copy where its last axis is strided; returns which, to be kept during the call."""
        strides = tensor.stride()
        if strides != self.seen:
            tensor = self._look(tensor, strides)
        self.struct.data = tensor.data_ptr()
        return tensor

    def _look(self, tensor, strides):
        if strides and strides[-1] != 1 and tensor.shape[-1] > 1:
            return self._look(tensor.contiguous(), None)
        strides = strides or tensor.stride()
        for at, axis in enumerate(self.axes):
            self.shape[at] = 1 if axis is None else tensor.shape[axis]
            self.strides[at] = 1 if axis is None else strides[axis]
        self.struct.dtype = dtype_struct(tensor.dtype)
        self.struct.device = device_struct(tensor.device)
        self.seen = strides
        return tensor


def dtype_struct(dtype):
    code, bits = DTYPES.get(dtype) or (_c.INT, dtype.itemsize * 8)
    return _c.DType(code, bits, 1)


def device_struct(device):
    return _c.Device(_c.CUDA if device.type == "cuda" else _c.CPU, device.index or 0)


class Call:
    """A call's description, read from its text, and its plans."""

    def __init__(self, text):
        self.text, self.options = text, json.loads(text)
        self.mesh_spec = mesh_from(self.options["mesh"])
        self.axes = FORMATS[self.options["format"]]
        self.plans = {}

    def plan(self, q, k, v, bias, sink, seq_q, seq_kv):
        key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, seq_q, seq_kv,
               None if bias is None else (bias.shape, bias.dtype, bias.device),
               None if sink is None else (sink.shape, sink.dtype, sink.device))
        plan = self.plans.get(key)
        if plan is None or not plan.mesh.is_current():
            if len(self.plans) >= MOST_PLANS:
                self.plans.pop(next(iter(self.plans))).close()
            plan = self.plans[key] = Plan(self, q, k, v, bias, sink, seq_q, seq_kv)
        return plan

    def close(self):
        while self.plans:
            self.plans.popitem()[1].close()


_calls = {}


def call_of(text):
    call = _calls.get(text)
    if call is None:
        if len(_calls) >= MOST_CALLS:
            _calls.pop(next(iter(_calls))).close()
        call = _calls[text] = Call(text)
    return call


def _forget(mesh):
    for call in _calls.values():
        for key in [key for key, plan in call.plans.items() if plan.mesh is mesh]:
            call.plans.pop(key).close()


_mesh._on_close.append(_forget)


def mesh_text(spec):
    return [spec.group, spec.ranks, spec.axes, spec.data_index, spec.timeout_s]


def mesh_from(values):
    group, ranks, axes, data_index, timeout_s = values
    return _mesh.MeshSpec(group, None if ranks is None else tuple(ranks), tuple(map(tuple, axes)), data_index, timeout_s)


class Plan:
    """One C plan, with the structs of its calls."""

    def __init__(self, call, q, k, v, bias, sink, seq_q, seq_kv):
        self.handle = None
        self.call = call
        options, axes = call.options, call.axes
        check_tensors(options["format"], q, k, v, bias, sink)
        at = lambda tensor, axis: 1 if axes[axis] is None else tensor.shape[axes[axis]]
        self.batch, self.rows, self.heads, self.dim_v = at(q, 0), at(q, 1), at(q, 2), at(v, 3)
        self.out_shape = tuple(q.shape[:-1]) + (self.dim_v,)
        self.lse_shape = (self.batch, self.heads, self.rows)
        self.lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch_begin = call.mesh_spec.data_index * self.batch
        tensor_ranks = call.mesh_spec.tensor_ranks
        attention = json.dumps(options["attention"]) if isinstance(options["attention"], dict) else options["attention"]
        struct = _c.AttentionOptions(
            batch=self.batch, seq_q=seq_q, seq_kv=seq_kv, heads=self.heads * tensor_ranks, kv_heads=at(k, 2) * tensor_ranks,
            dim_qk=at(q, 3), dim_v=self.dim_v, dtype=dtype_struct(q.dtype), attention=_c.text(attention),
            layout=_c.text(options["layout"]), strategy=_c.text(options["strategy"]),
            determinism=_c.text(options["determinism"]), bias=0 if bias is None else _c.bias_flags(bias.shape),
            sink=0 if sink is None else 1)
        self.mesh = _mesh.mesh_of(call.mesh_spec, q.device)
        self.handle = _c.create(_c.lib().dattn_plan_create, self.mesh.mesh, ctypes.byref(struct))
        try:
            self._check_shares(options, at(k, 1), seq_q, seq_kv)
        except BaseException:
            self.close()
            raise
        self._make_structs(axes)

    def _check_shares(self, options, keys, seq_q, seq_kv):
        info = _c.PlanInfo()
        _c.check(_c.lib().dattn_plan_get_info(self.handle, ctypes.byref(info)))
        if (info.q_rows, info.kv_rows) != (self.rows, keys):
            raise _c.BadInput(
                f"q has {self.rows} rows and k {keys}, but layout {options['layout']} gives this rank {info.q_rows} of {seq_q}"
                f" queries and {info.kv_rows} of {seq_kv} keys; cut the sequence with dattn.torch.shard, and give seq_len, and"
                " seq_len_kv where there are more or fewer keys")

    def _make_structs(self, axes):
        forward, backward = _c.Forward(batch_begin=self.batch_begin), _c.Backward(batch_begin=self.batch_begin)
        windows = {name: Window(axes) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
        windows.update(bias=Window(BIAS_AXES), dbias=Window(BIAS_AXES), sink=Window((0,)), dsink=Window((0,)), lse=Window((0, 1, 2)))
        self.windows, self.forward_struct, self.backward_struct = windows, forward, backward
        for struct in (forward, backward):
            for name in ("q", "k", "v", "out", "lse"):
                setattr(struct, name, windows[name].pointer)
        for name in ("dout", "dq", "dk", "dv"):
            setattr(backward, name, windows[name].pointer)
        self.forward_windows = [windows[name] for name in ("q", "k", "v", "out", "lse")]
        self.backward_windows = self.forward_windows + [windows[name] for name in ("dout", "dq", "dk", "dv")]
        self.forward_reference, self.backward_reference = ctypes.byref(forward), ctypes.byref(backward)
        self._forward, self._backward = _c.lib().dattn_attention_forward, _c.lib().dattn_attention_backward

    def forward(self, q, k, v, bias, sink, stream):
        """(out, lse) of this rank's rows."""
        out = torch.empty(self.out_shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(self.lse_shape, dtype=self.lse_dtype, device=q.device)
        self._run(self._forward, self.forward_struct, self.forward_reference, self.forward_windows, (q, k, v, out, lse),
                  (("bias", bias), ("sink", sink)), stream)
        return out, lse

    def backward(self, dout, q, k, v, bias, sink, out, lse, stream, want_bias, want_sink):
        """[dq, dk, dv, dbias, dsink]; the last two are None unless wanted."""
        results = [contiguous_like(q), contiguous_like(k), contiguous_like(v), contiguous_like(bias) if want_bias else None,
                   torch.zeros_like(sink) if want_sink else None]
        self._run(self._backward, self.backward_struct, self.backward_reference, self.backward_windows,
                  (q, k, v, out, lse, dout, *results[:3]),
                  (("bias", bias), ("sink", sink), ("dbias", results[3]), ("dsink", results[4])), stream)
        return results

    def _run(self, function, struct, reference, windows, tensors, terms, stream):
        """Makes the C call with the struct pointed at these tensors. terms: (member, tensor or None)."""
        mesh = self.mesh
        with mesh.lock:
            kept = [window.show(tensor) for window, tensor in zip(windows, tensors)]
            for name, tensor in terms:
                if tensor is None:
                    setattr(struct, name, None)
                else:
                    window = self.windows[name]
                    kept.append(window.show(tensor))
                    setattr(struct, name, window.pointer)
            struct.dropout_stream = stream
            if mesh.device.type == "cuda":
                struct.stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
            mesh.run(function, self.handle, reference)

    def close(self):
        if self.handle is not None:
            _c.lib().dattn_plan_destroy(self.handle)
            self.handle = None


def contiguous_like(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def check_tensors(form, q, k, v, bias=None, sink=None):
    """Refuses what no plan could take."""
    axes, dims = FORMATS[form], 3 if form == "thd" else 4
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise _c.BadInput(f"{name} has shape {list(tensor.shape)}; tensor_format {form} has {dims} axes")
        if tensor.dtype not in DTYPES:
            raise _c.BadInput(f"{name} is {tensor.dtype}; use torch.float32, torch.bfloat16, torch.float16 or "
                              "torch.float64")
        if tensor.dtype != q.dtype:
            raise _c.BadInput(f"q is {q.dtype} but {name} is {tensor.dtype}; they must have one type")
        if tensor.device != q.device:
            raise _c.BadInput(f"q is on {q.device} but {name} is on {tensor.device}; they must be on one device")
    if q.device.type not in ("cpu", "cuda"):
        raise _c.BadInput(f"q is on {q.device}; dattn computes on cpu and cuda")
    at = lambda tensor, axis: 1 if axes[axis] is None else tensor.shape[axes[axis]]
    batch, rows, heads, dim = (at(q, axis) for axis in range(4))
    if at(k, 0) != batch or at(v, 0) != batch:
        raise _c.BadInput(f"q has {batch} batch rows, k {at(k, 0)}, v {at(v, 0)}; they must be equal")
    if at(k, 1) != at(v, 1) or at(k, 2) != at(v, 2):
        raise _c.BadInput(f"k has {at(k, 1)} rows of {at(k, 2)} heads but v {at(v, 1)} rows of {at(v, 2)} heads; they must be equal")
    if at(k, 2) == 0 or heads % at(k, 2) != 0:
        raise _c.BadInput(f"q has {heads} heads and k {at(k, 2)}; the heads of q must be a multiple of those of k")
    if at(k, 3) != dim:
        raise _c.BadInput(f"q has head dim {dim} but k {at(k, 3)}; they must be equal")
    if bias is not None:
        if bias.dim() != 4 or bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads) or bias.shape[2] != rows:
            raise _c.BadInput(f"bias has shape {list(bias.shape)}; give [{batch} or 1, {heads} or 1, {rows}, all keys]")
        if bias.dtype != q.dtype or bias.device != q.device:
            raise _c.BadInput(f"bias is {bias.dtype} on {bias.device}; q is {q.dtype} on {q.device}, and bias must be like it")
    if sink is not None and (tuple(sink.shape) != (heads,) or sink.device != q.device):
        raise _c.BadInput(f"sink has shape {list(sink.shape)} on {sink.device}; give one logit for each of this rank's {heads} heads, on {q.device}")
