"""The two functions that `dattn.transformers.register` registers: a model's mask, and its attention.

    activations "sharded":     q, k, v are this rank's rows, of a batch that shard_batch cut; so is the result
    activations "replicated":  q, k, v are whole and equal on all ranks; each rank attends with its rows, and gathers the result"""
import dataclasses
from typing import Any, Optional

import torch

from dattn import _c
from dattn.torch import _masks as tensor_masks
from dattn.torch import _mesh, _ops, sharding
from dattn.torch._attention import attention
from dattn.transformers import _masks


@dataclasses.dataclass(frozen=True)
class Settings:
    mesh: Any = None
    layout: str = "zigzag"
    strategy: str = "auto"
    activations: str = "sharded"
    determinism: Optional[str] = None
    timeout_s: Optional[float] = None

    def spec(self):
        return _mesh.spec_of(self.mesh, self.strategy, self.timeout_s)

    def shards_activations(self):
        return self.activations == "sharded" and self.spec().sequence_ranks > 1

    def options(self):
        return {"layout": self.layout, "strategy": self.strategy, "determinism": self.determinism, "timeout_s": self.timeout_s}


def make_mask(settings, *, batch_size, q_length, kv_length, q_offset=0, kv_offset=0,
              mask_function=_masks.masking_utils.causal_mask_function, attention_mask=None, **_):
    """Our entry of transformers' AttentionMaskInterface."""
    q_offset = int(q_offset)  # static caches give a tensor
    if not settings.shards_activations():
        return _masks.of_function(mask_function, attention_mask, batch_size, q_length, kv_length, q_offset, kv_offset)
    if q_offset != 0 or kv_offset != 0:
        raise _c.BadInput("a cache with past keys cannot be used where activations are sharded; for generate(), use"
                          " register(activations='replicated')")
    if attention_mask is None or attention_mask.shape[-1] == q_length:
        given = "no attention_mask" if attention_mask is None else f"an attention_mask of this rank's {q_length} positions"
        raise _c.BadInput(f"the batch has {given}; where activations are sharded, ranks need that of the whole sequence: cut"
                          " batches with dattn.transformers.shard_batch, or use register(activations='replicated')")
    seq = attention_mask.shape[-1]
    return _masks.of_function(mask_function, attention_mask, batch_size, seq, seq, evaluate=False)


def attend(settings, module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, softcap=None,
           s_aux=None, position_bias=None, cu_seq_lens_q=None, output_attentions=False, **_):
    """Our entry of transformers' AttentionInterface. query [batch, heads, rows, dim], key and value [batch, kv_heads, rows,
    dim] -> [batch, rows, heads, dim], None. s_aux: sink logits, [heads]. position_bias: added to scores. attention_mask: a
    SequenceMask, or a tensor [batch, heads or 1, seq, keys] of the whole sequence that the user gave, or None."""
    if output_attentions:
        raise _c.BadInput("output_attentions: attention weights are never formed; use attn_implementation='eager' for them")
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask, bias = _mask_and_bias(module, attention_mask, is_causal, query, key)
    if position_bias is not None:
        position_bias = position_bias.to(query.dtype)
        bias = position_bias if bias is None else bias + position_bias
    options = {"scale": scaling, "softcap": softcap, "dropout_p": dropout, "sink": s_aux}
    if settings.shards_activations():
        if bias is not None:
            raise _c.BadInput("what is added to scores depends on the whole sequence; use register(activations='replicated')")
        if isinstance(attention_mask, _masks.SequenceMask):
            options["seq_len"] = options["seq_len_kv"] = attention_mask.shape[-1]
        elif attention_mask is not None:
            options["seq_len"], options["seq_len_kv"] = attention_mask.shape[-2:]
        if cu_seq_lens_q is not None:
            mask = _in_documents(mask, cu_seq_lens_q, query)
        out = attention(query, key, value, mask=mask, mesh=settings.mesh, **options, **settings.options())
    elif query.shape[1] < 2 * settings.spec().sequence_ranks or settings.spec().sequence_ranks == 1:
        # One position at a time (decoding): all ranks hold all of it.
        out = attention(query, key, value, mask=mask, bias=bias, **options, determinism=settings.determinism)
    else:
        out = _attend_replicated(settings, query, key, value, mask, bias, options)
    return out, None


def _mask_and_bias(module, attention_mask, is_causal, query, key):
    if isinstance(attention_mask, _masks.SequenceMask):
        return attention_mask.kind, None
    rows, keys = query.shape[1], key.shape[1]
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        return "causal" if causal and rows > 1 else "full", None
    mask, bias = tensor_masks.split(attention_mask.expand(-1, -1, rows, -1)[..., :keys] if attention_mask.shape[-2] == 1
                                    else attention_mask)
    return mask, None if bias is None else bias.to(query.dtype)


def _in_documents(mask, cu_seq_lens, query):
    """cu_seq_lens: boundaries of documents packed into one row, [documents + 1], of the whole sequence."""
    if query.shape[0] != 1:
        raise _c.BadInput(f"cu_seq_lens_q came with a batch of {query.shape[0]} rows; documents are packed into a batch of one row")
    if mask["kind"] not in ("full", "causal", "window"):
        raise _c.BadInput("cu_seq_lens_q came with an attention_mask that hides keys; packed documents have no padding")
    return _masks.within(mask, cu_seq_lens.tolist())


# ---- activations that are whole on every rank ----


def _attend_replicated(settings, query, key, value, mask, bias, options):
    spec = settings.spec()
    text = sharding._text(spec, settings.layout, None)
    seq, keys = query.shape[1], key.shape[1]
    own = [OwnRows.apply(tensor, text, 1) for tensor in (query, key, value)]
    if bias is not None:
        bias = OwnRows.apply(bias.expand(-1, -1, seq, keys), text, 2)
    if options["sink"] is not None:
        options["sink"] = OwnPart.apply(options["sink"], spec)
    out = attention(*own, mask=mask, mesh=settings.mesh, bias=bias, seq_len=seq, seq_len_kv=keys, **options, **settings.options())
    return sharding.unshard(out, spec, settings.layout, dim=1, seq_len=seq)


class OwnRows(torch.autograd.Function):
    """This rank's rows of a tensor that is whole on all ranks; so is its gradient, gathered."""

    @staticmethod
    def forward(ctx, whole, text, dim):
        ctx.call = (text, whole.shape[dim], dim)
        return whole.index_select(dim, _ops.ops.positions(whole, text, whole.shape[dim]))

    @staticmethod
    def backward(ctx, gradient):
        text, seq, dim = ctx.call
        return _ops.ops.unshard(gradient.contiguous(), text, seq, dim, False), None, None


class OwnPart(torch.autograd.Function):
    """A parameter that every rank uses on its rows: its gradient is the sum of the ranks' parts."""

    @staticmethod
    def forward(ctx, parameter, spec):
        ctx.spec = spec
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient):
        text = sharding._text(ctx.spec, "contiguous", None)
        return _ops.ops.unshard(gradient[None].contiguous(), text, ctx.spec.sequence_ranks, 0, False).sum(0), None
