"""What CoreAttention makes of Megatron's arguments: mask types, windows, packed documents, biases, offsets, dropout, groups."""
import warnings

import pytest
import torch
import torch.distributed as dist

from ranks import on_ranks, preload
from reference import close

pytest.importorskip("megatron.core")
preload("megatron_models")
import megatron_models as models
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType, AttnType
from megatron.core.transformer.transformer_config import TransformerConfig

import dattn.megatron
import reference
from dattn import BadInput

S, H, K, D = 32, 4, 2, 8  # positions, heads, key/value heads, dim of a head


def core(kind=AttnMaskType.causal, groups=None, cp=1, cp_comm_type=None, softmax_scale=None, layer=1, **options):
    options = {"use_cpu_initialization": True, "attention_dropout": 0.0, "hidden_dropout": 0.0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TransformerConfig(num_layers=2, hidden_size=H * D, num_attention_heads=H, num_query_groups=K,
                                   context_parallel_size=cp, **options)
    return dattn.megatron.CoreAttention(config, layer, kind, AttnType.self_attn, cp_comm_type=cp_comm_type,
                                        softmax_scale=softmax_scale, pg_collection=groups)


def inputs(seq=S, batch=2):
    """q, k, v and dout, [seq, batch, heads, dim]."""
    q, k, v, dout = reference.inputs(batch, seq, H, K, D)
    return tuple(tensor.detach().transpose(0, 1).contiguous() for tensor in (q, k, v, dout))


def rows(seq, ranks, rank):
    """Megatron's dual chunks."""
    return torch.arange(seq).view(2 * ranks, -1)[[rank, 2 * ranks - 1 - rank]].flatten()


def run(module, q, k, v, dout, **arguments):
    """(out, gradients) as [rows, batch, heads, dim]."""
    own = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    out = module(*own, **arguments)
    out.backward(dout.flatten(-2))
    return out.detach().unflatten(-1, (H, D)), [tensor.grad for tensor in own]


def formula(q, k, v, dout, **options):
    own = [tensor.detach().transpose(0, 1).requires_grad_() for tensor in (q, k, v)]
    out = reference.attention(*own, **options)[0]
    gradients = torch.autograd.grad(out, own, dout.transpose(0, 1))
    return out.detach().transpose(0, 1), [gradient.transpose(0, 1) for gradient in gradients]


def compare(got, want, at=slice(None)):
    close(got[0], want[0][at])
    for gradient, right in zip(got[1], want[1]):
        close(gradient, right[at])


def hidden_pairs():
    """An arbitrary mask in Megatron's sense, [batch, 1, seq, seq], True = hidden: two blocks, and a padding of the second row."""
    block = torch.arange(S) // 20
    hidden = (block[:, None] != block[None]).expand(2, 1, S, S).clone()
    hidden[1, :, :, 28:] = True
    return hidden


def check_masks(groups, cp, comm_type=None):
    rank = groups.cp.rank()
    at, q = rows(S, cp, rank), inputs()
    part = [tensor[at] for tensor in q]
    make = lambda kind, **options: core(kind, groups, cp, comm_type, **options)
    d = torch.arange(S)[None] - torch.arange(S)[:, None]
    padding = (torch.arange(S) >= torch.tensor([S, 25])[:, None])[:, None, None]  # [batch, 1, 1, seq]
    T = AttnMaskType
    cases = [
        (T.causal, {}, None, d <= 0), (T.no_mask, {}, None, d == d),
        (T.causal, {"window_size": (5, 0)}, None, (d <= 0) & (d >= -5)),
        (T.no_mask, {"window_size": (5, 3)}, None, (d <= 3) & (d >= -5)),
        (T.causal, {"window_size": (5, 0), "window_attn_skip_freq": 2, "layer": 2}, None, d <= 0),
        (T.causal, {"window_size": (5, 0)}, hidden_pairs()[:, :, at], (d <= 0) & (d >= -5)),  # causal reads no tensor
        (T.causal_bottom_right, {}, None, d <= 0),
        (T.padding, {}, padding, ~padding), (T.padding_causal, {}, padding, ~padding & (d <= 0)),
        (T.arbitrary, {}, hidden_pairs()[:, :, at], ~hidden_pairs()),
        (T.arbitrary, {"softmax_scale": 0.1}, hidden_pairs()[:1, :, at], ~hidden_pairs()[:1])]
    for kind, options, tensor, shown in cases:
        got = run(make(kind, **options), *part, attention_mask=tensor)
        compare(got, formula(*q, shown=shown, scale=options.get("softmax_scale")), at)
        other = make(T.no_mask, **options)  # a type given with the call comes first
        compare(run(other, *part, attention_mask=tensor, attn_mask_type=kind), got)
    bias = torch.randn(1, H, S, S)
    compare(run(make(T.causal), *part, attention_bias=bias[:, :, at]), formula(*q, shown=d <= 0, bias=bias), at)
    got = run(make(T.causal), *(tensor.transpose(0, 1) for tensor in part), packed_seq_params=PackedSeqParams(qkv_format="bshd"))
    close(got[0].transpose(0, 1), formula(*q, shown=d <= 0)[0][at])


def check_packed(groups, cp, comm_type=None):
    """Documents of 16, 8, 16 and 24 positions, of which 16, 5, 11 and 24 are no padding; each cut into dual chunks."""
    padded, ends = [0, 16, 24, 40, 64], [0, 16, 21, 32, 56]
    tensor = lambda values: torch.tensor(values, dtype=torch.int32)
    q = [tensor_[:, 0] for tensor_ in inputs(64, 1)]
    pieces = list(zip(padded[:-1], padded[1:]))
    at = torch.cat([begin + rows(end - begin, cp, groups.cp.rank()) for begin, end in pieces])
    real = torch.cat([torch.arange(b, e) - b < ends[i + 1] - ends[i] for i, (b, e) in enumerate(pieces)])
    number = torch.bucketize(torch.arange(64), torch.tensor(padded[1:]), right=True)
    same, d = number[:, None] == number[None], torch.arange(64)[None] - torch.arange(64)[:, None]
    dout = q[3] * real[:, None, None]  # what padding gives is not used
    for kind, window, shown in ((AttnMaskType.padding_causal, None, d <= 0), (AttnMaskType.causal, (4, 0), (d <= 0) & (d >= -4)),
                                (AttnMaskType.padding, None, d == d), (AttnMaskType.no_mask, (4, 2), (d <= 2) & (d >= -4))):
        params = PackedSeqParams("thd", tensor(ends), tensor(ends), tensor(padded), tensor(padded), 24, 24)
        got = run(core(kind, groups, cp, comm_type, window_size=window), *(tensor_[at] for tensor_ in q[:3]), dout[at],
                  packed_seq_params=params)
        want = formula(*(tensor_[:, None] for tensor_ in q[:3]), dout[:, None], shown=shown & same & real[None])
        keep = real[at]
        close(got[0][keep], want[0][at][keep][:, 0])
        for gradient, right in zip(got[1], want[1]):
            close(gradient, right[at][:, 0])


class Groups:
    """A pg_collection of what CoreAttention needs."""

    def __init__(self, tp, cp, hcp=None):
        self.tp, self.cp = tp, cp
        if hcp is not None:
            self.hcp = hcp


def alone():
    """A group of this rank."""
    mine = None
    for rank in range(dist.get_world_size()):
        group = dist.new_group([rank])
        mine = group if rank == dist.get_rank() else mine
    return mine


@on_ranks(1)
def test_one_rank():
    groups = Groups(alone(), alone())
    check_masks(groups, 1)
    check_packed(groups, 1)
    # Decoding: a query at the end of its keys.
    q, k, v, dout = inputs()
    for kind, window, left in ((AttnMaskType.no_mask, None, S), (AttnMaskType.no_mask, (6, 0), 6), (AttnMaskType.causal_bottom_right, None, S)):
        got = run(core(kind, groups, window_size=window), q[-1:], k, v, dout[-1:])
        close(got[0], formula(q, k, v, dout, shown=(torch.arange(S) >= S - 1 - left).expand(S, S))[0][-1:])


@on_ranks(2)
def test_two_ranks():
    groups = Groups(alone(), dist.group.WORLD)
    for comm_type in ("p2p", "a2a", "grid_gather"):
        check_masks(groups, 2, comm_type)
        check_packed(groups, 2, comm_type)
    # A packed batch may bring its own context parallel group, or none.
    q = inputs()
    for params in (PackedSeqParams(qkv_format="sbhd", local_cp_size=1), PackedSeqParams(qkv_format="sbhd", cp_group=alone())):
        compare(run(core(groups=groups, cp=2), *q, packed_seq_params=params), formula(*q, mask="causal"))


@on_ranks(4)
def test_four_ranks():
    models.initialize(cp=4, hierarchical=[2, 2])
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "hcp"])
    check_masks(groups, 4, "a2a+p2p")
    check_packed(groups, 4, "a2a+p2p")
    check_masks(groups, 4, "grid_gather(ring=2, rows=2)")


@on_ranks(4)
def test_packed_documents_in_a_model():
    """The rows of a batch behind each other, as documents: loss and gradients are those of the batch."""
    want, whole = models.one_process(models.Formula), models.batch()
    ends = torch.arange(0, models.B * models.S + 1, models.S, dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=models.S, max_seqlen_kv=models.S)
    for mesh, comm_type in (({"tp": 2, "cp": 2}, "p2p"), ({"cp": 4}, "grid_gather")):
        models.initialize(**mesh)
        own = rows(models.S, mesh["cp"], models.parallel_state.get_context_parallel_rank())
        at = (ends[:-1, None] + own).flatten()
        part = {name: None if tensor is None else tensor.reshape(1, -1)[:, at] for name, tensor in whole.items()}
        net = models.model(cp_comm_type=comm_type)
        models.compare(models.step(net, part, whole["loss_mask"].sum(), packed), want)


@on_ranks(2)
def test_softmax_offsets():
    offset = torch.randn(H)
    groups, q = Groups(alone(), dist.group.WORLD), inputs()
    at = rows(S, 2, dist.get_rank())
    for kind in ("off-by-one", "learnable"):
        module = core(groups=groups, cp=2, softmax_type=kind, init_method=lambda tensor: tensor.data.copy_(offset))
        sink = (torch.zeros(H) if kind == "off-by-one" else offset.clone()).requires_grad_()
        want = formula(*q, mask="causal", sink=sink)
        compare(run(module, *(tensor[at] for tensor in q)), want, at)
        if kind == "learnable":
            whole = [tensor.transpose(0, 1) for tensor in q]
            reference.attention(*whole[:3], mask="causal", sink=sink)[0].backward(whole[3])
            gradient = module.softmax_offset.grad.clone()
            dist.all_reduce(gradient)
            close(gradient, sink.grad)
            assert list(module.state_dict()) == ["softmax_offset"]
        else:
            assert not module.state_dict()


@on_ranks(4)
def test_dropout_is_that_of_one_process():
    """It is keyed by batch row, head and positions of the whole: every mesh of ranks drops the same pairs."""
    want = models.one_process(attention_dropout=0.2)
    for tensor in (want[0], *want[1].values()):
        dist.broadcast(tensor, 0)  # the other ranks are data ranks: they have other rows
    without = models.one_process()
    assert abs(want[0] - without[0]) > 1e-4
    whole = models.batch()
    for mesh in ({"tp": 2, "cp": 2}, {"cp": 2}, {"tp": 2}):
        models.initialize(**mesh)
        net = models.model(attention_dropout=0.2)
        models.compare(models.step(net, models.own_part(whole), whole["loss_mask"].sum()), want)


@on_ranks(2)
def test_refusals():
    groups, q = Groups(alone(), dist.group.WORLD), inputs()
    part = [tensor[:S // 2] for tensor in q[:3]]
    with pytest.raises(BadInput, match="cp_comm_type is 'pp'; known: p2p, a2a, all_gather"):
        core(groups=groups, cp=2, cp_comm_type="pp")
    with pytest.raises(BadInput, match="has 4 ranks, but the context parallel group has 2"):
        core(groups=groups, cp=2, cp_comm_type="grid(ring=2, rows=2)")
    with pytest.raises(BadInput, match="slowest first"):
        core(groups=groups, cp=2, cp_comm_type="hybrid(ulysses=2, ring=1)")
    for option in ("qk_clip", "log_max_attention_logit"):
        with pytest.raises(BadInput, match="the greatest score, which is not kept"):
            core(groups=groups, cp=2, **{option: True})
    with pytest.raises(BadInput, match="is a pair of masks"):
        core(AttnMaskType.padding, groups, 2)(*part, attention_mask=(torch.zeros(2, 1, 1, S, dtype=torch.bool),) * 2)
    with pytest.raises(BadInput, match="arbitrary, but there is no attention_mask"):
        core(AttnMaskType.arbitrary, groups, 2)(*part)
    with pytest.raises(BadInput, match=r"attention_mask has shape \[2, 1, 32, 16\]; give \[batch or 1, 1, 1 or 16, 32\]"):
        core(AttnMaskType.padding, groups, 2)(*part, attention_mask=torch.zeros(2, 1, S, S // 2, dtype=torch.bool))
    flat = [tensor[:, 0] for tensor in part]
    packed = lambda ends: PackedSeqParams("thd", torch.tensor(ends), torch.tensor(ends))
    with pytest.raises(BadInput, match="document 1 has 18 positions .* pad documents to multiples of 4"):
        core(groups=groups, cp=2)(*flat, packed_seq_params=packed([0, 8, 26]))
    with pytest.raises(BadInput, match="describe 12 tokens of this rank, but query has 16"):
        core(groups=groups, cp=2)(*flat, packed_seq_params=packed([0, 8, 24]))
    with pytest.raises(BadInput, match="qkv_format thd, but no cu_seqlens_q"):
        core(groups=groups, cp=2)(*flat, packed_seq_params=PackedSeqParams("thd"))
    with pytest.raises(BadInput, match="attention_bias came with packed sequences"):
        core(groups=groups, cp=2)(*flat, packed_seq_params=packed([0, 32]), attention_bias=torch.zeros(1))
    with pytest.raises(BadInput, match="float8"):
        core(groups=groups, cp=2)(*(tensor.to(torch.float8_e4m3fn) for tensor in part))
