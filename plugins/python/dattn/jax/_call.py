"""One attention call's static part: what is the same on all devices and known when the program is traced."""
import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np

from dattn import _c, _mask
from dattn.jax import _library
from dattn.jax._axes import AXES, Axes

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
DTYPES = {"float32": (_c.FLOAT, 32), "float64": (_c.FLOAT, 64), "bfloat16": (_c.BFLOAT, 16), "float16": (_c.FLOAT, 16)}


@dataclasses.dataclass(frozen=True)
class Call:
    """Hashable: equal calls share compiled programs and plans."""
    axes: Axes
    seq_q: int
    seq_kv: int
    attention: str  # JSON, the keys of a config's attention section
    layout: str
    strategy: str
    determinism: str  # "" = the device's default
    timeout_s: float
    threads: int

    def attributes(self, backward, bias, sink):
        """Of the custom call."""
        return {"mesh": np.array(self.axes.sizes[1:], np.int64), "backward": backward, "bias": bias is not None,
                "sink": sink is not None, "threads": np.int32(self.threads), "timeout_s": np.float64(self.timeout_s),
                "seq_q": np.int64(self.seq_q), "seq_kv": np.int64(self.seq_kv), "attention": self.attention,
                "layout": self.layout, "strategy": self.strategy, "determinism": self.determinism}

    def for_batches(self, times):
        """The call for `times` batches behind each other: masks that differ between batch rows are repeated."""
        terms = json.loads(self.attention)
        mask = terms["mask"]
        for rows in ("lengths", "masks"):
            if rows in mask:
                mask[rows] = mask[rows] * times
        return dataclasses.replace(self, attention=json.dumps(terms))


def plain_mask(mask):
    """A mask as the YAML has it, arrays as lists."""
    return _mask.plain_mask(mask, plain_value)


def plain_value(value, name):
    """Arrays as lists; what is only known when the program runs is refused."""
    try:
        return np.asarray(value).tolist() if hasattr(value, "dtype") else value
    except Exception as error:  # a tracer
        raise _c.BadInput(f"{name} must be known when the program is traced: pass numpy arrays or lists, not results of the"
                          " program") from error


def dtype_struct(dtype, name):
    found = DTYPES.get(jnp.dtype(dtype).name)
    if found is None:
        raise _c.BadInput(f"{name} is {jnp.dtype(dtype).name}; use {', '.join(DTYPES)}")
    return _c.DType(*found, 1)


@functools.lru_cache(maxsize=256)
def rows_of(call, batch, heads, kv_heads, dim_qk, dim_v, dtype, bias, sink):
    """(queries, keys) that the arrays of a rank hold: the most of any rank. Raises BadInput where the call cannot be planned.
    heads: of a rank. bias: flags."""
    tensor = call.axes.sizes[5]
    text = lambda value: value.encode() or None
    options = _c.AttentionOptions(
        batch=batch, seq_q=call.seq_q, seq_kv=call.seq_kv, heads=heads * tensor, kv_heads=kv_heads * tensor, dim_qk=dim_qk,
        dim_v=dim_v, dtype=dtype_struct(dtype, "q"), attention=text(call.attention), layout=text(call.layout),
        strategy=text(call.strategy), determinism=text(call.determinism), bias=bias, sink=sink)
    with _library.Handles(call.axes.ranks) as handles:
        rank = handles.mesh(0, **dict(zip(AXES[1:], call.axes.sizes[1:])))
        create = _library.lib().dattn_plan_create
        handles.own(_library.lib().dattn_plan_destroy, _c.create(create, rank, options))
    mask = json.dumps(json.loads(call.attention)["mask"])
    return tuple(max(len(part) for part in positions(call.axes.sequence_parts, call.layout, seq, mask))
                 for seq in (call.seq_q, call.seq_kv))


@functools.lru_cache(maxsize=256)
def positions(parts, layout, seq, mask):
    """For each part of a sequence, the global positions of its rows: a tuple of numpy arrays. mask: JSON, for `balanced`."""
    if layout not in LAYOUTS:
        raise _c.BadInput(f"unknown layout '{layout}'; known: {', '.join(LAYOUTS)}")
    lib = _library.lib()
    attention = json.dumps({"mask": json.loads(mask)}).encode() if layout == "balanced" and mask else None
    found = []
    with _library.Handles(parts) as handles:
        for part in range(parts):
            sharding = handles.own(lib.dattn_sharding_destroy, _c.create(
                lib.dattn_sharding_create, handles.mesh(part, ring=parts), seq, layout.encode(), attention))
            found.append(np.array(_library.positions_of(sharding), np.int32))
    return tuple(found)
