"""The sequence cut over a mesh: shard, unshard, position_ids, for activations, ids and labels."""
import json

import torch

from dattn import _c
from dattn.torch import _mesh, _ops, _plan
from dattn.torch._masks import plain_mask


def shard(x, mesh, layout="zigzag", dim=1, *, mask=None, timeout_s=None):
    """This rank's rows of `dim` of the whole x; local. The gradient is zero outside these rows.
    mask: the attention's, needed by layout "balanced"."""
    dim = _axis(x, dim)
    sharding, ranks = _described(mesh, layout, mask, timeout_s)
    return x if ranks == 1 else x.index_select(dim, _ops.ops.positions(x, sharding, x.shape[dim]))


def unshard(x, mesh, layout="zigzag", dim=1, *, seq_len=None, grad="own", mask=None, timeout_s=None):
    """The whole of which x is this rank's rows of `dim`, on every rank. Collective.
    seq_len: rows of the whole; absent, ranks tell each other theirs. grad: "own" = this rank's rows of its own gradient of
    the whole; "sum" = their sum over the ranks, for wholes that are used differently on each rank."""
    if grad not in ("own", "sum"):
        raise _c.BadInput(f"grad is '{grad}'; use 'own' or 'sum'")
    dim = _axis(x, dim)
    sharding, ranks = _described(mesh, layout, mask, timeout_s)
    if ranks == 1:
        return x
    if not torch.compiler.is_compiling():
        _ops.refuse_tangents(x)
    seq = seq_len if seq_len is not None else _sum_of_rows(mesh, timeout_s, x.shape[dim])
    return _ops.ops.unshard(x, sharding, seq, dim, grad == "sum")


def position_ids(mesh, layout="zigzag", *, seq_len=None, rows=None, mask=None, device=None, timeout_s=None):
    """[rows] int64: the global positions of this rank's rows. seq_len: rows of the whole; or rows: those of this rank, which
    ranks then tell each other."""
    if seq_len is None and rows is None:
        raise _c.BadInput("position_ids needs seq_len (the whole sequence's), or rows (this rank's)")
    sharding, ranks = _described(mesh, layout, mask, timeout_s)
    if seq_len is None:
        seq_len = rows if ranks == 1 else _sum_of_rows(mesh, timeout_s, rows)
    return _ops.ops.positions(torch.empty(0, dtype=torch.int64, device=device), sharding, seq_len)


def total_rows(spec, *rows):
    """The sums of the ranks' rows along the sequence, of queries and keys or whatever else. One collective."""
    if spec.sequence_ranks == 1:
        return list(rows)
    own = torch.tensor([rows], dtype=torch.int64)
    return _ops.unshard(own, _text(spec, "contiguous", None), spec.sequence_ranks, 0, False).sum(0).tolist()


def whole_lengths(ranks, rows, keys, seq_len, seq_len_kv, total):
    """(queries, keys) of the whole sequence, of which this rank holds rows and keys. Whether total(rows, keys) is asked, a
    collective, hangs on nothing in which ranks differ: without seq_len it is; seq_len alone is the length of the keys too."""
    if ranks == 1:
        seq, seq_kv = rows, keys
    elif seq_len is None:
        _refuse_in_graphs()
        seq, seq_kv = total(rows, keys)
    else:
        seq = seq_kv = seq_len
    return seq if seq_len is None else seq_len, seq_kv if seq_len_kv is None else seq_len_kv


def _refuse_in_graphs():
    if torch.compiler.is_compiling():
        raise _c.BadInput("seq_len must be given under torch.compile: without it ranks exchange their lengths in each call")


def _sum_of_rows(mesh, timeout_s, rows):
    _refuse_in_graphs()
    return total_rows(_mesh.spec_of(mesh, timeout_s=timeout_s), rows)[0]


def _axis(x, dim):
    if not -x.dim() <= dim < x.dim():
        raise _c.BadInput(f"dim is {dim}, but x has shape {list(x.shape)}")
    return dim % x.dim()


def _described(mesh, layout, mask, timeout_s):
    """(text of the sharding, ranks along the sequence); a constant of compiled graphs."""
    if torch.compiler.is_compiling():
        return _constant_description(mesh, layout, mask, timeout_s)
    spec = _mesh.spec_of(mesh, timeout_s=timeout_s)
    return _text(spec, layout, mask), spec.sequence_ranks


@_plan.constant_of_graphs
def _constant_description(mesh, layout, mask, timeout_s):
    spec = _mesh.spec_of(mesh, timeout_s=timeout_s)
    return _text(spec, layout, mask), spec.sequence_ranks


def _text(spec, layout, mask):
    attention = None if mask is None else {"mask": plain_mask(mask)}
    return json.dumps({"mesh": _plan.mesh_text(spec), "layout": layout, "attention": attention})
