"""DTensors: attention on their local shards, the result a DTensor that is placed as q is."""
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from dattn import _c
from dattn.torch import _mesh, _plan


def attention(function, q, k, v, *, mesh, tensor_format, bias, sink, return_lse, seq_len, seq_len_kv, **options):
    axes = _plan.FORMATS.get(tensor_format)
    if axes is None:
        raise _c.BadInput(f"unknown tensor_format '{tensor_format}'; known: {', '.join(_plan.FORMATS)}")
    mesh = q.device_mesh if mesh is None else mesh
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, DTensor) or tensor.device_mesh != q.device_mesh:
            raise _c.BadInput(f"q is a DTensor; {name} must be one on the same mesh")
        _check_placements(name, tensor, axes)
    for name, given, tensor in (("seq_len", seq_len, q), ("seq_len_kv", seq_len_kv, k)):
        if given is not None and given != tensor.shape[axes[1]]:
            raise _c.BadInput(f"{name} is {given}, but the DTensor has {tensor.shape[axes[1]]} rows; leave {name} out")
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in
             (("q", q), ("k", k), ("v", v), ("bias", bias), ("sink", sink))}
    out, lse = function(local["q"], local["k"], local["v"], mesh=mesh, tensor_format=tensor_format, bias=local["bias"],
                        sink=local["sink"], seq_len=q.shape[axes[1]], seq_len_kv=k.shape[axes[1]], return_lse=True, **options)
    shape = (*q.shape[:-1], v.shape[-1])
    placed = DTensor.from_local(out, q.device_mesh, q.placements, run_check=False, shape=shape, stride=_strides(shape))
    if not return_lse:
        return placed
    to = {axes[0]: 0, axes[2]: 1, axes[1]: 2} if axes[0] is not None else {axes[2]: 0, axes[1]: 1}
    lse_shape = [q.shape[axis] for axis in sorted(to, key=to.get)]
    placements = [Shard(to[p.dim]) if isinstance(p, Shard) else p for p in q.placements]
    return placed, DTensor.from_local(lse, q.device_mesh, placements, run_check=False, shape=tuple(lse_shape), stride=_strides(lse_shape))


def _check_placements(name, tensor, axes):
    batch, seq, heads, _ = axes
    for dim, placement in zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements):
        if dim in _mesh.SEQUENCE_AXES:
            right = [Shard(seq)]
        elif dim == "tensor":
            right = [Shard(heads)]
        else:
            right = [Replicate()] + ([] if batch is None else [Shard(batch)])
        ranks = tensor.device_mesh.size(tensor.device_mesh.mesh_dim_names.index(dim))
        if (placement not in right and ranks > 1) or isinstance(placement, Partial):
            raise _c.BadInput(f"{name} is placed {placement} along mesh dimension '{dim}'; redistribute it to"
                              f" {' or '.join(map(str, right))}")


def _strides(shape):
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
