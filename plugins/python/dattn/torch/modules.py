"""Modules whose attention is sharded: SelfAttention, and MultiheadAttention with torch's own arguments and weights."""
import torch
from torch import nn

from dattn import _c
from dattn.torch import _masks, _mesh, _ops, sharding
from dattn.torch._attention import attention


class SelfAttention(nn.Module):
    """softmax(q k^T * head_dim ** -0.5) v of three linear maps of x, without an output map: [batch, rows, d_model] of this rank
    to the same. Parameters: query_linear, key_linear, value_linear; they hold the whole model's values on every rank."""

    def __init__(self, d_model, num_heads, *, mesh=None, mask="full", bias=True, device=None, dtype=None, **options):
        super().__init__()
        if d_model % num_heads != 0:
            raise _c.BadInput(f"d_model is {d_model} and num_heads {num_heads}; heads must divide d_model")
        for name in ("query_linear", "key_linear", "value_linear"):
            setattr(self, name, nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype))
        self.num_heads, self.mesh, self.mask, self.options = num_heads, mesh, mask, options

    def forward(self, x, *, seq_len=None):
        heads = lambda linear: linear(x).unflatten(-1, (self.num_heads, -1))
        q, k, v = heads(self.query_linear), heads(self.key_linear), heads(self.value_linear)
        return attention(q, k, v, mask=self.mask, mesh=self.mesh, seq_len=seq_len, **self.options).flatten(2)


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with its arguments, weights and results; query, key and value are this rank's rows.

    attn_mask is the whole sequence's, [seq, keys] or [batch * heads, seq, keys]; key_padding_mask this rank's keys',
    [batch, rows of key]. The weights that need_weights returns are this rank's rows, [batch, rows, all keys], before dropout:
    they take the memory that attention itself does not. Refused: add_bias_kv, nested tensors."""

    def __init__(self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False, kdim=None, vdim=None,
                 batch_first=False, device=None, dtype=None, *, mesh=None, layout="zigzag", strategy="auto", **options):
        if add_bias_kv:
            raise _c.BadInput("add_bias_kv appends a key to every rank's sequence, which is not available; use add_zero_attn, or a"
                              " sink (dattn.torch.attention)")
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self.mesh, self.layout, self.options = mesh, layout, dict(options, strategy=strategy)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
                is_causal=False, *, seq_len=None, seq_len_kv=None):
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in self._project(query, key, value))
        spec = _mesh.spec_of(self.mesh, self.options["strategy"])

        def total(*rows):
            _ops.checked("bshd", q, k, v)
            return sharding.total_rows(spec, *rows)
        seq, keys = sharding.whole_lengths(spec.sequence_ranks, q.shape[1], k.shape[1], seq_len, seq_len_kv, total)
        mask, bias = self._masks(spec, q, keys, seq, attn_mask, key_padding_mask, is_causal)
        sink = q.new_zeros(self.num_heads, dtype=torch.float32) if self.add_zero_attn else None  # a zero key with a zero value
        out = attention(q, k, v, mask=mask, mesh=self.mesh, layout=self.layout, bias=bias, sink=sink, seq_len=seq, seq_len_kv=keys,
                        dropout_p=self.dropout if self.training else 0.0, **self.options)
        out = self.out_proj(out.flatten(2))
        weights = self._weights(spec, q, k, keys, seq, mask, bias, average_attn_weights) if need_weights else None
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query, key, value):
        linear = nn.functional.linear
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases)]

    def _masks(self, spec, q, keys, seq, attn_mask, key_padding_mask, is_causal):
        """(mask, bias) for attention: what hides pairs, and what is added to this rank's scores."""
        batch = q.shape[0]
        if attn_mask is None and key_padding_mask is None:
            if is_causal:
                raise _c.BadInput("is_causal is a hint about attn_mask; give attn_mask too, as torch's module wants it")
            return "full", None
        if key_padding_mask is None and is_causal and attn_mask.dtype == torch.bool and seq == keys:
            return "causal", None
        added = q.new_zeros(1, 1, 1, 1)  # what is added to scores, torch's two masks together; -inf hides
        if attn_mask is not None:
            if attn_mask.shape[-2:] != (seq, keys):
                raise _c.BadInput(f"attn_mask has shape {list(attn_mask.shape)}; give the whole sequence's [.., {seq}, {keys}]")
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
            added = added + _as_added(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = _as_added(key_padding_mask, q.dtype)
            padding = sharding.unshard(padding, spec, self.layout, dim=1, seq_len=keys)
            added = added + padding[:, None, None, :]
        mask, bias = _masks.split(added.expand(-1, -1, seq, keys))
        if bias is not None and spec.sequence_ranks > 1:
            bias = sharding.shard(bias, spec, self.layout, dim=2)
        return mask, bias

    def _weights(self, spec, q, k, keys, seq, mask, bias, average):
        """Attention weights of this rank's rows, written out."""
        whole = sharding.unshard(k, spec, self.layout, dim=1, seq_len=keys, grad="sum")
        scores = torch.einsum("bshd,bthd->bhst", q, whole) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        visible = _masks.visible(mask, seq, keys, q.shape[0]).to(q.device)
        rows = sharding.position_ids(spec, self.layout, seq_len=seq, device=q.device)
        scores = scores.masked_fill(~visible[:, None, rows], float("-inf"))
        if self.add_zero_attn:
            scores = torch.nn.functional.pad(scores, (0, 1))
        weights = scores.softmax(-1)
        return weights.mean(1) if average else weights


def _as_added(mask, dtype):
    """A mask of nn.MultiheadAttention (True = hidden, or added to scores) as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
