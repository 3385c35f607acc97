"""Masks in tensors, and unmodified code that calls F.scaled_dot_product_attention."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import mesh, on_ranks
import dattn.torch
import reference
from dattn.torch import _masks, mask_of
from reference import close

S = 37
D = torch.arange(S)[None, :] - torch.arange(S)[:, None]
DOCUMENT = torch.bucketize(torch.arange(S), torch.tensor([10, 11, 30]), right=True)
BANDS = {
    "full": D == D, "causal": D <= 0, "window": (D <= 2) & (D >= -9), "none": D != D, "padding": (torch.arange(S) < 30).expand(S, S),
    "documents": (DOCUMENT[:, None] == DOCUMENT) & (D <= 0), "prefix": (D <= 0) | (torch.arange(S) < 7),
    "sinks": ((D <= 0) & (D >= -5)) | ((torch.arange(S) < 2) & (D <= 0)),
    "blocks": ((torch.arange(S) // 8)[:, None] % 2 == (torch.arange(S) // 8) % 2),
}


@pytest.mark.parametrize("name", BANDS)
def test_bands_are_recognised(name):
    mask = mask_of(BANDS[name])
    assert torch.equal(_masks.visible(mask, S, S, 1)[0], BANDS[name])
    assert len(mask.get("regions", [])) <= 20
    q, k, v, _ = reference.inputs()
    close(dattn.torch.attention(q, k, v, mask=mask), reference.attention(q, k, v, shown=BANDS[name])[0])


def test_recognised_masks_are_named_where_they_have_a_name():
    assert mask_of(BANDS["full"]) == {"kind": "full"} and mask_of(BANDS["causal"]) == {"kind": "causal"}


def test_random_masks_are_recognised_exactly():
    for density in (0.1, 0.5, 0.9):
        shown = torch.rand(S, S + 5) < density
        assert torch.equal(_masks.visible(mask_of(shown), S, S + 5, 1)[0], shown)


def test_what_is_no_band_is_refused():
    with pytest.raises(dattn.torch.BadInput, match="no small set of bands"):
        mask_of(torch.rand(300, 300) < 0.5)
    with pytest.raises(dattn.torch.BadInput, match="differs between heads"):
        mask_of(torch.rand(1, 4, S, S) < 0.5)
    with pytest.raises(dattn.torch.BadInput, match="True = seen"):
        mask_of(torch.zeros(S, S))


class Model(nn.Module):
    """Knows nothing of dattn."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2).flatten(2))


def masks():
    """Masks as models make them, by name."""
    added = torch.zeros(S, S).masked_fill(D > 0, float("-inf"))
    least = torch.zeros(2, 1, S, S).masked_fill(D > 0, torch.finfo(torch.float32).min)
    padding = (torch.arange(S) < torch.tensor([30, 37])[:, None])[:, None, None, :]
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])[:, None, None] * D
    return {"none": None, "bool": BANDS["documents"], "added": added, "least": least, "padding": padding,
            "padding and causal": padding & (D <= 0), "alibi": (slopes + added)[None], "heads alike": least.expand(2, 4, S, S)}


def run(model, x, dout, cut=lambda x: x, **arguments):
    x = cut(x).detach().requires_grad_()
    out = model(x, **arguments)
    gradients = torch.autograd.grad(out, [x, *model.parameters()], cut(dout))
    return out, gradients


def check(where, layout="zigzag"):
    torch.manual_seed(3)
    model, x, dout = Model(), torch.randn(2, S, 32), torch.randn(2, S, 32)
    cut = lambda x: dattn.torch.shard(x, where, layout)
    for name, mask in masks().items():
        for arguments in ([{"mask": mask}] if mask is not None else [{}, {"is_causal": True}]):
            want, gradients = run(model, x, dout, **arguments)
            with dattn.torch.sdpa(where, layout=layout):
                out, own = run(model, x, dout, cut, **arguments)
            close(out, cut(want)), close(own[0], cut(gradients[0]))
            for got, right in zip(own[1:], gradients[1:]):  # parameters: each rank has its rows' part
                if where is not None:
                    torch.distributed.all_reduce(got)
                close(got, right, 1e-5)


def test_unmodified_code_on_one_rank():
    check(None)


@on_ranks(2)
def test_unmodified_code_on_two_ranks():
    check(mesh(ring=2))
    check(mesh(ulysses=2), "striped")


@on_ranks(2)
def test_a_mask_of_this_ranks_rows_alone():
    where = mesh(ring=2)
    q = torch.randn(1, 4, S, 8)
    rows = dattn.torch.position_ids(where, seq_len=S)
    added = torch.randn(S, S)
    want = F.scaled_dot_product_attention(q, q, q, added)
    own = q[:, :, rows]
    with dattn.torch.sdpa(where):
        close(F.scaled_dot_product_attention(own, own, own, added[rows]), want[:, :, rows])
        with pytest.raises(dattn.torch.BadInput, match="does not say who sees keys of other ranks"):
            F.scaled_dot_product_attention(own, own, own, added[rows][:, rows])
        with pytest.raises(dattn.torch.BadInput, match="only floats can be taken"):
            F.scaled_dot_product_attention(own, own, own, added[rows] > 0)
    with dattn.torch.sdpa(where, mask={"kind": "window", "left": 5}):  # in place of the model's own
        shown = (D <= 0) | (D > 0)
        got = F.scaled_dot_product_attention(own, own, own, shown)
    close(got, F.scaled_dot_product_attention(q, q, q, D >= -5)[:, :, rows])


def test_other_arguments():
    q, k = torch.randn(2, 4, S, 8), torch.randn(2, 2, S, 8)
    want = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.2, enable_gqa=True)
    flat = F.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 0])
    with dattn.torch.sdpa():
        close(F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.2, enable_gqa=True), want)
        close(F.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 0]), flat)
        dropped = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        assert not torch.equal(dropped, F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
        with pytest.raises(dattn.torch.BadInput, match="enable_gqa"):
            F.scaled_dot_product_attention(q, k, k)
        with pytest.raises(dattn.torch.BadInput, match="is_causal"):
            F.scaled_dot_product_attention(q, q, q, D <= 0, is_causal=True)


def test_a_learned_mask_has_a_gradient():
    q = torch.randn(1, 4, S, 8)
    added = torch.randn(1, 4, S, S, requires_grad=True)
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q, added).sum(), added)
    with dattn.torch.sdpa():
        (got,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q, added).sum(), added)
    assert (got - want).abs().max() < 1e-6  # both are near 0


def test_a_mask_is_read_once(monkeypatch):
    calls = []
    split = _masks._split
    monkeypatch.setattr(_masks, "_split", lambda mask: calls.append(mask) or split(mask))
    q, mask = torch.randn(1, 4, S, 8), (D <= 0).clone()
    with dattn.torch.sdpa():
        first = F.scaled_dot_product_attention(q, q, q, mask)
        F.scaled_dot_product_attention(q, q, q, mask)
        assert len(calls) == 1
        mask.fill_(True)  # the same tensor, other values
        assert not torch.equal(F.scaled_dot_product_attention(q, q, q, mask), first)
    assert len(calls) == 2


@on_ranks(2)
def test_torchs_own_modules():
    torch.manual_seed(3)
    layer = dict(d_model=32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
    encoder, decoder = nn.TransformerEncoderLayer(**layer), nn.TransformerDecoderLayer(**layer)  # that attends to a memory too
    x, memory, dout = (torch.randn(2, S, 32) for _ in range(3))
    causal = torch.zeros(S, S).masked_fill(D > 0, float("-inf"))
    for where, options in ((mesh(ring=2), {}), (mesh(ulysses=2), {"seq_len": S})):
        cut = lambda x: dattn.torch.shard(x, where)
        for layer, arguments in ((encoder, {}), (encoder, {"src_mask": causal, "is_causal": True}), (decoder, {"memory": memory}),
                                 (decoder, {"memory": memory, "tgt_mask": causal, "tgt_is_causal": True})):
            own_arguments = {name: cut(value) if name == "memory" else value for name, value in arguments.items()}
            want, gradients = run(layer, x, dout, **arguments)
            with torch.device("cpu"), dattn.torch.sdpa(where, **options):  # a mode beneath ours, as set_default_device has
                out, own = run(layer, x, dout, cut, **own_arguments)
            close(out, cut(want)), close(own[0], cut(gradients[0]), 1e-5)
            for got, right in zip(own[1:], gradients[1:]):
                torch.distributed.all_reduce(got)
                close(got, right, 1e-5)
        with torch.no_grad():  # where PyTorch has a fast path past all of this
            want = encoder.eval()(x)
            with dattn.torch.sdpa(where):
                close(encoder(cut(x)), cut(want))
        encoder.train()


@on_ranks(2)
def test_what_torchs_module_would_do_with_this_ranks_keys_alone():
    where, x = mesh(ring=2), torch.randn(2, S, 32)
    own, taken = dattn.torch.shard(x, where), nn.MultiheadAttention(32, 4, batch_first=True)
    with dattn.torch.sdpa(where):
        with pytest.raises(dattn.torch.BadInput, match="need_weights looks at .* use dattn.torch.MultiheadAttention"):
            taken(own, own, own)
        for option in ("add_zero_attn", "add_bias_kv"):
            with pytest.raises(dattn.torch.BadInput, match=option):
                nn.MultiheadAttention(32, 4, batch_first=True, **{option: True})(own, own, own, need_weights=False)
        with pytest.raises(dattn.torch.BadInput, match="does not say who sees keys of other ranks"):
            taken(own, own, own, need_weights=False, key_padding_mask=torch.zeros(own.shape[:2], dtype=torch.bool))
        out, _ = taken(own, own, own, need_weights=False)
    close(out, dattn.torch.shard(taken(x, x, x, need_weights=False)[0], where))


def test_under_compile():
    model, x = Model(), torch.randn(2, S, 32)
    want = model(x, is_causal=True)

    def function(x):
        with dattn.torch.sdpa():
            return model(x, is_causal=True)

    close(torch.compile(function, backend="aot_eager")(x), want)
