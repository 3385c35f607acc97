"""`with dattn.torch.sdpa(mesh):` calls of F.scaled_dot_product_attention run sharded, in code that knows nothing of it."""
import inspect
from types import FunctionType

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dattn import _c
from dattn.torch import _masks, _mesh, _ops, sharding
from dattn.torch._attention import attention

_arguments_of_multi_head = inspect.signature(F.multi_head_attention_forward).bind


class sdpa(TorchFunctionMode):
    """Inside, q, k, v of F.scaled_dot_product_attention, [batch, heads, seq, dim], are this rank's rows.

    is_causal means the whole sequence's causality. attn_mask is the whole sequence's, [.., seq, keys] (equal on all ranks), or
    what is added to the scores of this rank's rows, [.., rows, keys]. Booleans, and floats of zeros and -inf, are recognised as
    bands; other floats are a bias. mask= takes the place of both in every call. seq_len= is the length of queries and keys of
    all calls. nn.MultiheadAttention and the layers made of it are taken too, but for what they would do with this rank's keys
    alone: need_weights, add_zero_attn, add_bias_kv (dattn.torch.MultiheadAttention has the first two). Keep the context around
    backward too where activations are recomputed."""

    def __init__(self, mesh=None, *, layout="zigzag", strategy="auto", mask=None, seq_len=None, determinism=None, timeout_s=None):
        super().__init__()
        self.mask, self.layout = mask, layout
        self.options = {"mesh": mesh, "layout": layout, "strategy": strategy, "seq_len": seq_len, "determinism": determinism,
                        "timeout_s": timeout_s}
        self.spec = _mesh.spec_of(mesh, strategy, timeout_s)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        if function is F.multi_head_attention_forward:
            self._check_multi_head(_arguments_of_multi_head(*args, **(kwargs or {})).arguments)
            return _multi_head_with(self.attend)(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        if query.dim() == 3:  # one head
            attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
            return self.attend(query[:, None], key[:, None], value[:, None], attn_mask, dropout_p, is_causal, scale=scale)[:, 0]
        if attn_mask is not None and is_causal:
            raise _c.BadInput("attn_mask and is_causal are both given; give one")
        if key.dim() == 4 and query.dim() == 4 and key.shape[1] != query.shape[1] and not enable_gqa:
            raise _c.BadInput(f"query has {query.shape[1]} heads and key {key.shape[1]}; set enable_gqa=True")
        mask, bias, options = "causal" if is_causal else "full", None, dict(self.options)
        if self.mask is not None:
            mask = self.mask
        elif attn_mask is not None:
            mask, bias = self._read(attn_mask, query, key, value, options)
        return attention(query, key, value, mask=mask, bias=bias, tensor_format="bhsd", scale=scale, dropout_p=dropout_p, **options)

    def _check_multi_head(self, given):
        """Refuses what F.multi_head_attention_forward would make of this rank's keys alone."""
        if self.spec.sequence_ranks == 1:
            return
        for name, is_given in (("need_weights", given.get("need_weights", True)), ("add_zero_attn", given["add_zero_attn"]),
                               ("add_bias_kv", given["bias_k"] is not None)):
            if is_given:
                raise _c.BadInput(f"nn.MultiheadAttention with {name} looks at this rank's keys alone, inside sdpa too; call it"
                                  " without, or use dattn.torch.MultiheadAttention")

    def _read(self, mask, query, key, value, options):
        """(mask, bias) of an attn_mask."""
        rows, keys, ranks = query.shape[-2], key.shape[-2], self.spec.sequence_ranks

        def total(*own):
            _ops.checked("bhsd", query, key, value)
            return sharding.total_rows(self.spec, *own)
        all_keys = mask.shape[-1] if mask.shape[-1] > 1 else None
        seq, seq_kv = sharding.whole_lengths(ranks, rows, keys, options["seq_len"], all_keys, total)
        if ranks > 1 and seq_kv == keys:
            raise _c.BadInput(
                f"attn_mask has {mask.shape[-2]} x {seq_kv} positions, this rank's own; it does not say who sees keys of other"
                " ranks: give the whole sequence's mask, or sdpa(mask=)")
        options["seq_len"], options["seq_len_kv"] = seq, seq_kv
        if mask.shape[-2] == 1 or mask.shape[-2] == seq:
            found, bias = _masks.split(mask.expand(*mask.shape[:-2], seq, seq_kv) if 1 in mask.shape[-2:] else mask)
            if bias is not None and ranks > 1:
                bias = sharding.shard(bias, self.spec, self.layout, dim=-2, mask=self.mask)
        elif mask.shape[-2] == rows and mask.is_floating_point():
            found, bias = {"kind": "full"}, mask
        else:
            raise _c.BadInput(f"attn_mask has {mask.shape[-2]} rows; give the whole sequence's {seq}"
                              + ("" if mask.dtype != torch.bool else f" (of this rank's {rows} rows alone, only floats can be taken)"))
        if bias is not None:
            bias = bias.to(query.dtype)
            while bias.dim() < 4:
                bias = bias[None]
        return found, bias


def _multi_head_with(attend):
    """F.multi_head_attention_forward with `attend` where it says scaled_dot_product_attention: PyTorch turns a mode off while
    that runs a function for it, so it would not see the call inside."""
    function = F.multi_head_attention_forward
    names = {**function.__globals__, "scaled_dot_product_attention": attend, "has_torch_function": lambda _: False}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
