"""SelfAttention and MultiheadAttention against the plain modules, on one rank and on meshes."""
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ranks import mesh, on_ranks
import dattn.torch
from reference import close

S = 37


class Textbook(nn.Module):
    """Multi-head self-attention as textbooks write it."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.query_linear = nn.Linear(d_model, d_model)
        self.key_linear = nn.Linear(d_model, d_model)
        self.value_linear = nn.Linear(d_model, d_model)

    def forward(self, x):
        batch, seq, _ = x.shape
        split = lambda y: y.view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        q, k, v = split(self.query_linear(x)), split(self.key_linear(x)), split(self.value_linear(x))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), dim=-1)
        return (weights @ v).transpose(1, 2).reshape(batch, seq, -1)


def check_self_attention(where, layout="zigzag", **options):
    torch.manual_seed(5)
    plain = Textbook(48, 4)
    sharded = dattn.torch.SelfAttention(48, 4, mesh=where, layout=layout, **options)
    sharded.load_state_dict(plain.state_dict())
    plain.load_state_dict(sharded.state_dict())
    x, dout = torch.randn(2, S, 48, requires_grad=True), torch.randn(2, S, 48)
    want = plain(x)
    want.backward(dout)
    cut = lambda x: dattn.torch.shard(x, where, layout)
    own = cut(x.detach()).requires_grad_()
    out = sharded(own)
    out.backward(cut(dout))
    close(out, cut(want)), close(own.grad, cut(x.grad))
    for got, right in zip(sharded.parameters(), plain.parameters()):
        if where is not None:
            dist.all_reduce(got.grad)
        if right is plain.key_linear.bias:  # its gradient is 0 but for rounding
            assert (got.grad - right.grad).abs().max() < 1e-5
        else:
            close(got.grad, right.grad, 1e-5)


def test_self_attention_on_one_rank():
    check_self_attention(None)
    causal = dattn.torch.SelfAttention(48, 4, mask="causal")
    x = torch.randn(1, S, 48)
    assert torch.equal(causal(x)[:, :5], causal(x[:, :5])) or (causal(x)[:, :5] - causal(x[:, :5])).abs().max() < 1e-6
    with pytest.raises(dattn.torch.BadInput, match="heads must divide"):
        dattn.torch.SelfAttention(48, 5)


@on_ranks(4)
def test_self_attention_on_every_mesh():
    for where in (mesh(ring=4), mesh(ulysses=4), mesh(ring=2, ulysses=2), mesh(ring_outer=2, ring=2), dist.group.WORLD):
        check_self_attention(where)
    check_self_attention(mesh(ring=2, rows=2), "striped", strategy="grid")


CASES = {
    "plain": ({}, {}), "seq first": ({"batch_first": False}, {}), "no bias": ({"bias": False}, {}),
    "other key sizes": ({"kdim": 20, "vdim": 12}, {}), "zero key": ({"add_zero_attn": True}, {}),
    "causal": ({}, {"attn_mask": "causal", "is_causal": True}), "added": ({}, {"attn_mask": "added"}),
    "per head": ({}, {"attn_mask": "heads"}), "padding": ({}, {"key_padding_mask": "bool"}),
    "padding and causal": ({}, {"key_padding_mask": "bool", "attn_mask": "causal"}),
    "added padding": ({}, {"key_padding_mask": "added"}), "weights of each head": ({}, {"average_attn_weights": False}),
    "no weights": ({}, {"need_weights": False}),
}


def masks(arguments):
    d = torch.arange(S)[None, :] - torch.arange(S)[:, None]
    padding = torch.arange(S) >= torch.tensor([30, 37])[:, None]
    known = {"attn_mask": {"causal": d > 0, "added": torch.randn(S, S), "heads": torch.randn(8, S, S)},
             "key_padding_mask": {"bool": padding, "added": torch.randn(2, S)}}
    return {name: known[name].get(value, value) if name in known else value for name, value in arguments.items()}


def check_multihead(where, case):
    torch.manual_seed(5)
    made, given = CASES[case]
    made = {"batch_first": True, **made}
    plain = nn.MultiheadAttention(48, 4, **made)
    sharded = dattn.torch.MultiheadAttention(48, 4, **made, mesh=where)
    sharded.load_state_dict(plain.state_dict())
    given = masks(given)
    dim = 1 if made["batch_first"] else 0
    shape = lambda width: (2, S, width) if dim == 1 else (S, 2, width)
    x, key, value = torch.randn(shape(48)), torch.randn(shape(made.get("kdim", 48))), torch.randn(shape(made.get("vdim", 48)))
    cut = lambda x, axis=dim: dattn.torch.shard(x, where, dim=axis)
    own = dict(given)
    if "key_padding_mask" in own:
        own["key_padding_mask"] = cut(own["key_padding_mask"], 1)
    inputs = [tensor.requires_grad_() for tensor in (x, key, value)]
    parts = [cut(tensor.detach()).requires_grad_() for tensor in inputs]
    want, want_weights = plain(*inputs, **given)
    out, weights = sharded(*parts, **own)
    close(out, cut(want))
    loss = lambda out, weights: out.square().sum() + (0 if weights is None else weights.square().sum())
    if want_weights is None:
        assert weights is None
    else:
        close(weights, cut(want_weights, -2), 5e-6)
    loss(want, want_weights).backward()
    loss(out, weights).backward()
    for part, whole in zip(parts, inputs):
        close(part.grad, cut(whole.grad), 1e-5)
    for got, right in zip(sharded.parameters(), plain.parameters()):
        if where is not None:
            dist.all_reduce(got.grad)
        close(got.grad, right.grad, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_multihead_attention(case):
    check_multihead(None, case)


@on_ranks(2)
def test_multihead_attention_on_two_ranks():
    for case in CASES:
        check_multihead(mesh(ring=2), case)
    check_multihead(mesh(ulysses=2), "padding")


@on_ranks(4)
def test_multihead_attention_on_four_ranks():
    for case in CASES:
        check_multihead(mesh(ring=2, ulysses=2), case)


def test_multihead_attention_refuses():
    with pytest.raises(dattn.torch.BadInput, match="add_bias_kv"):
        dattn.torch.MultiheadAttention(48, 4, add_bias_kv=True)
    module = dattn.torch.MultiheadAttention(48, 4, batch_first=True)
    x = torch.randn(2, S, 48)
    with pytest.raises(dattn.torch.BadInput, match="whole sequence's"):
        module(x, x, x, attn_mask=torch.zeros(S, 5))
    out, weights = module(x[0], x[0], x[0])  # no batch
    close(out, module(x, x, x)[0][0]), close(weights, module(x, x, x)[1][0])


def test_dropout_is_for_training():
    module = dattn.torch.MultiheadAttention(48, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, S, 48)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])
