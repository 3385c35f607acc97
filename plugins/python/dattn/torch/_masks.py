"""Masks: as a user gives them, as the YAML has them, and recognised in tensors.

A mask tensor is read row by row as runs of visible keys. Rows below each other whose runs begin and end at the same keys, or
each one key later, are one band: a region lo <= k - q <= hi of a rectangle. So causal masks, windows, padding, documents and
blocks of any size become a few regions, exactly."""
import weakref

import torch

from dattn import _c, _mask

MOST_REGIONS = 4096  # of one batch row; a mask with more has no structure that planning could use


def plain_mask(mask):
    """A mask as the YAML has it, tensors as lists."""
    return _mask.plain_mask(mask, _plain_value, _hint)


def _hint(mask):
    return "; dattn.torch.mask_of turns a mask tensor into one" if isinstance(mask, torch.Tensor) else ""


def _plain_value(value, _):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def mask_of(visible):
    """The mask that a boolean tensor shows, [seq, keys] or [batch, 1, seq, keys] (all heads alike), True = seen: a dict for
    attention(mask=). Raises BadInput where it has no such structure."""
    if visible.dtype != torch.bool:
        raise _c.BadInput(f"the mask tensor is {visible.dtype}; give booleans, True = seen")
    rows = rows_of_batch(visible)
    masks = [_mask_of_row(row) for row in rows]
    return masks[0] if all(mask == masks[0] for mask in masks) else {"kind": "per_row", "masks": masks}


def rows_of_batch(mask):
    """The [seq, keys] masks of the batch rows; one where they are shared. Refuses heads that differ."""
    if mask.dim() < 2 or mask.dim() > 4:
        raise _c.BadInput(f"the mask tensor has shape {list(mask.shape)}; give [seq, keys] or [batch, heads, seq, keys]")
    while mask.dim() < 4:
        mask = mask[None]
    if mask.shape[1] > 1 and mask.stride(1) != 0:
        if not bool((mask == mask[:, :1]).all()):
            raise _c.BadInput("the mask tensor differs between heads; pass it as bias=, or mask the heads in separate calls")
    mask = mask[:, 0]
    return [mask[0]] if mask.shape[0] == 1 or mask.stride(0) == 0 else list(mask)


def _mask_of_row(visible):
    seq, keys = visible.shape
    if bool(visible.all()):
        return {"kind": "full"}
    regions = _regions(visible)
    if seq == keys and regions == [{"q": [0, seq], "k": [0, keys], "lo": None, "hi": 0}]:
        return {"kind": "causal"}
    return {"kind": "regions", "regions": regions}


def _regions(visible):
    edges = torch.nn.functional.pad(visible.to(torch.int8), (1, 1)).diff(dim=1)
    firsts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()  # [run, (row, key)], by row
    counts = torch.bincount(firsts[:, 0], minlength=visible.shape[0]).tolist()
    firsts, ends = firsts[:, 1].tolist(), ends[:, 1].tolist()
    regions, open_runs, begin, at = [], [], 0, 0
    for row, count in enumerate(counts):
        runs = list(zip(firsts[at:at + count], ends[at:at + count]))
        at += count
        grown = _grow(open_runs, runs)
        if grown is None:
            _close(regions, open_runs, begin, row)
            open_runs, begin = [(run, run, None) for run in runs], row
        else:
            open_runs = grown
        if len(regions) > MOST_REGIONS:
            raise _c.BadInput(f"the mask tensor is no small set of bands (more than {MOST_REGIONS} regions); pass it as bias=,"
                              " or name the mask: attention(mask=)")
    _close(regions, open_runs, begin, len(counts))
    return regions


def _grow(open_runs, runs):
    """The open runs (first row's, last row's, step) with one more row; None where its runs do not go on like that."""
    if len(open_runs) != len(runs):
        return None
    grown = []
    for (first, last, step), run in zip(open_runs, runs):
        now = (run[0] - last[0], run[1] - last[1])
        if now not in ((0, 0), (0, 1), (1, 0), (1, 1)) or step not in (None, now):
            return None
        grown.append((first, run, now))
    return grown


def _close(regions, open_runs, begin, end):
    for first, last, step in open_runs:
        step = step or (0, 0)
        regions.append({"q": [begin, end], "k": [first[0], last[1]], "lo": first[0] - begin if step[0] else None,
                        "hi": first[1] - 1 - begin if step[1] else None})


# ---- masks of scaled_dot_product_attention: booleans, or floats that are added to scores ----

_recognised = {}  # id of a mask tensor -> (weak reference, version, result): layers share one tensor


def split(mask):
    """(mask dict, bias or None) of an attn_mask of the whole sequence: what hides pairs, and what remains to be added."""
    if mask.requires_grad:
        return {"kind": "full"}, mask
    known = _recognised.get(id(mask))
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    result, key = _split(mask), id(mask)
    _recognised[key] = (weakref.ref(mask, lambda _, known=_recognised: known.pop(key, None)), mask._version, result)
    return result


def _split(mask):
    if mask.dtype == torch.bool:
        return mask_of(mask), None
    if not mask.is_floating_point():
        raise _c.BadInput(f"attn_mask is {mask.dtype}; give booleans or what is added to scores")
    hidden = mask <= torch.finfo(mask.dtype).min / 2  # -inf, or the least finite value
    if bool((hidden | (mask == 0)).all()):
        return mask_of(~hidden), None
    if not bool(hidden.any()):
        return {"kind": "full"}, mask
    return mask_of(~hidden), mask.masked_fill(hidden, 0)


def visible(mask, seq, keys, batch):
    """[batch or 1, seq, keys] booleans of a mask that mask_of gave, or a band's name."""
    mask = plain_mask(mask)
    if mask["kind"] == "per_row":
        return torch.cat([visible(one, seq, keys, 1) for one in mask["masks"]])
    k_minus_q = torch.arange(keys)[None, :] - torch.arange(seq)[:, None]
    if mask["kind"] in ("full", "causal"):
        return (k_minus_q <= (0 if mask["kind"] == "causal" else keys))[None]
    shown = torch.zeros(seq, keys, dtype=torch.bool)
    for region in mask["regions"]:
        (q0, q1), (k0, k1) = region["q"], region["k"]
        lo, hi = -seq if region["lo"] is None else region["lo"], keys if region["hi"] is None else region["hi"]
        shown[q0:q1, k0:k1] |= (k_minus_q[q0:q1, k0:k1] >= lo) & (k_minus_q[q0:q1, k0:k1] <= hi)
    return shown[None]
