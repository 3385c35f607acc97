"""Masks of Transformers as dattn's: a mask function read as a band and documents, never written out as a matrix.

A model asks its mask interface for a mask with a *mask function* (query, key -> seen), a tree of the functions of
transformers.masking_utils. What is understood of that tree becomes, for each batch row, rectangles with a band
lo <= k - q <= hi (kind `regions`). On whole sequences any other function is evaluated and recognised."""
import dataclasses
import inspect
from typing import Optional

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils

from dattn import _c
from dattn.torch import _masks

MOST_ELEMENTS = 1 << 28  # of a mask function that must be evaluated: [batch, seq, keys]


@dataclasses.dataclass(frozen=True)
class Bands:
    """The pairs with lo <= k - q <= hi whose positions lie in the same document; None = unbounded."""
    lo: Optional[int] = None
    hi: Optional[int] = None
    documents: Optional[tuple] = None  # of each batch row (or one for all): document boundaries, from 0 to the length

    def both(self, other):
        if self.documents is not None and other.documents is not None:
            raise NotUnderstood
        bounds = lambda choose, one, two: two if one is None else one if two is None else choose(one, two)
        return Bands(bounds(max, self.lo, other.lo), bounds(min, self.hi, other.hi), self.documents or other.documents)


class NotUnderstood(Exception):
    pass


class SequenceMask(BlockMask):
    """What our mask interface gives to a model, which hands it to attend(): who sees whom, as attention(mask=) takes it.
    A BlockMask by type alone: models and generate() pass those on as they are."""

    def __init__(self, kind, batch, seq_q, seq_kv):
        self.kind, self.sizes = kind, (batch, 1, seq_q, seq_kv)

    ndim = 4

    @property
    def shape(self):
        return self.sizes

    def __getitem__(self, _):
        raise _c.BadInput("the model cuts its mask itself, which attn_implementation='dattn' cannot follow; use"
                          " dattn.torch.sdpa with attn_implementation='sdpa'")

    def __repr__(self):
        return f"SequenceMask({self.kind}, {self.sizes})"

    def to(self, *_, **__):
        return self


def of_function(function, attention_mask, batch, queries, keys, q_offset=0, kv_offset=0, evaluate=True):
    """The SequenceMask of a mask function. queries, keys: of this call; the first of each are positions q_offset, kv_offset.
    attention_mask: [batch, positions] booleans, False = padding, or None. evaluate: whether the function may be called."""
    padding = masking_utils.prepare_padding_mask(attention_mask, keys, kv_offset)
    try:
        bands = read(function, queries)
    except NotUnderstood:
        if not evaluate:
            raise _c.BadInput(f"the model's mask function {getattr(function, '__qualname__', function)} is unknown, and cannot be"
                              " called where activations are sharded; use register(activations='replicated')") from None
        return _evaluated(function, attention_mask, batch, queries, keys, q_offset, kv_offset)
    shift = q_offset - kv_offset  # from offsets of positions to offsets of rows
    lo = None if bands.lo is None or bands.lo + shift <= -queries else bands.lo + shift
    hi = None if bands.hi is None or bands.hi + shift >= keys else bands.hi + shift
    seen = None if padding is None else padding[:, kv_offset:kv_offset + keys]
    if seen is not None and bool(seen.all()):
        seen = None
    documents = bands.documents or ((0, max(queries, keys)),)
    if seen is None and bands.documents is None:
        return SequenceMask(_plain(lo, hi, queries, keys), batch, queries, keys)
    runs = [[(0, keys)]] if seen is None else [_runs(row) for row in seen]
    rows = max(len(documents), len(runs))
    pick = lambda values, row: values[row if len(values) > 1 else 0]
    kinds = [_regions(pick(documents, row), pick(runs, row), lo, hi, queries, keys) for row in range(rows)]
    same = all(kind == kinds[0] for kind in kinds)
    return SequenceMask(kinds[0] if same else {"kind": "per_row", "masks": kinds}, batch, queries, keys)


def within(kind, boundaries):
    """A mask of `_plain` inside documents."""
    return {"kind": "documents", "cu_seqlens": boundaries, "within": kind}


def _plain(lo, hi, queries, keys):
    if lo is None and hi is None:
        return {"kind": "full"}
    if queries == keys and lo is None and hi == 0:
        return {"kind": "causal"}
    if queries == keys and (lo is None or lo <= 0) and (hi is None or hi >= 0):
        return {"kind": "window", "left": None if lo is None else -lo, "right": hi}
    return {"kind": "regions", "regions": [{"q": [0, queries], "k": [0, keys], "lo": lo, "hi": hi}]}


def _regions(boundaries, runs, lo, hi, queries, keys):
    """boundaries: of the documents of one batch row; runs: its keys that are no padding."""
    regions = []
    for begin, end in zip(boundaries[:-1], boundaries[1:]):
        q = [begin, min(end, queries)] if len(boundaries) > 2 else [0, queries]
        for first, last in runs:
            k = [max(first, begin), min(last, end, keys)]
            if q[0] < q[1] and k[0] < k[1]:
                regions.append({"q": q, "k": k, "lo": lo, "hi": hi})
    if not regions:  # nothing is seen
        regions.append({"q": [0, queries], "k": [0, keys], "lo": keys + 1, "hi": None})
    return {"kind": "regions", "regions": regions}


def _runs(seen):
    """Half-open ranges of True in a row of booleans."""
    edges = torch.nn.functional.pad(seen.to(torch.int8), (1, 1)).diff()
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()))


def _evaluated(function, attention_mask, batch, queries, keys, q_offset, kv_offset):
    if batch * queries * keys > MOST_ELEMENTS:
        raise _c.BadInput(f"the model's mask function {getattr(function, '__qualname__', function)} is unknown, and too large to be"
                          f" written out ({batch} x {queries} x {keys}); use one that transformers.masking_utils builds")
    seen = masking_utils.sdpa_mask(batch, queries, keys, q_offset, kv_offset, function, attention_mask,
                                   allow_is_causal_skip=False, use_vmap=True)
    return SequenceMask(_masks.mask_of(seen), batch, queries, keys)


# ---- reading the tree: a function that a factory made has that factory's code, and in its closure the arguments ----


def read(function, queries):
    """The Bands of a mask function; raises NotUnderstood."""
    reader = _readers().get(getattr(function, "__code__", None))
    if reader is None:
        raise NotUnderstood
    return reader(inspect.getclosurevars(function).nonlocals, queries)


def _all(inner, queries):
    bands = Bands()
    for function in inner["mask_functions"]:
        bands = bands.both(read(function, queries))
    return bands


def _window(inner, _):
    return Bands(lo=1 - int(inner["sliding_window"]))


def _two_sided_window(inner, _):
    return Bands(lo=-int(inner["sliding_window"]), hi=int(inner["sliding_window"]))


def _packed(inner, _):
    number = inner["packed_sequence_mask"]  # [batch, seq]: the document of each position
    changes = number.diff(dim=1) != 0
    rows = [tuple([0, *(row.nonzero()[:, 0] + 1).tolist(), number.shape[1]]) for row in changes]
    return Bands(documents=tuple(rows))


def _chunks(inner, queries):
    size, padding = int(inner["chunk_size"]), inner["left_padding"].tolist()  # chunks begin behind the row's padding
    rows = [tuple([*([0] if first else []), *range(first, queries, size), queries]) for first in padding]
    return Bands(documents=tuple(rows))


_known = {}


def _readers():
    """Readers by the code of the functions they read."""
    if not _known:
        m = masking_utils
        add = lambda function, reader: _known.__setitem__(function.__code__, reader)
        add(m.causal_mask_function, lambda *_: Bands(hi=0))
        add(m.bidirectional_mask_function, lambda *_: Bands())
        add(m.and_masks(m.causal_mask_function), _all)
        add(m.sliding_window_overlay(1), _window)
        add(m.sliding_window_bidirectional_overlay(1), _two_sided_window)
        add(m.packed_sequence_mask_function(None), _packed)
        # Inside a document, differences of its own positions are those of rows.
        add(m.remap_positions_for_packed_sequence(None, None), lambda inner, queries: read(inner["mask_function"], queries))
        add(m.chunked_overlay(1, None), _chunks)
    return _known
