"""attention() on meshes of 2 and 4 ranks: the same numbers as one rank has, whatever the mesh, strategy, layout and length."""
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from ranks import mesh, on_ranks
import dattn.torch
import reference
from reference import close, inputs

WINDOW = {"kind": "window", "left": 9}


def rows_of(layout, seq, where):
    return dattn.torch.position_ids(where, layout, seq_len=seq)


def heads_of(tensor, where):
    """This rank's heads, where the mesh has a tensor dimension."""
    names = where.mesh_dim_names if isinstance(where, dist.DeviceMesh) else ()
    if "tensor" not in names:
        return tensor
    ranks, index = where.size(names.index("tensor")), where.get_local_rank("tensor")
    return tensor.chunk(ranks, dim=2)[index]


def compare(where, layout="zigzag", strategy="auto", seq=38, mask="causal", give_length=True, **options):
    """out, lse and gradients of this rank's part against those of one rank."""
    q, k, v, dout = inputs(seq=seq)
    one, lse = dattn.torch.attention(q, k, v, mask=mask, return_lse=True, **options)
    one.backward(dout)
    rows = rows_of(layout, seq, where)
    part = lambda tensor: heads_of(tensor.detach()[:, rows], where)
    own = [part(tensor).requires_grad_() for tensor in (q, k, v)]
    out, own_lse = dattn.torch.attention(*own, mask=mask, mesh=where, layout=layout, strategy=strategy, return_lse=True,
                                         seq_len=seq if give_length else None, **options)
    out.backward(part(dout))
    close(out, part(one))
    close(own_lse, heads_of(lse.transpose(1, 2)[:, rows], where).transpose(1, 2))
    for tensor, whole in zip(own, (q, k, v)):
        close(tensor.grad, part(whole.grad), whole=whole.grad)


@on_ranks(2)
def test_two_ranks():
    for layout in ("contiguous", "zigzag", "striped"):
        compare(mesh(ring=2), layout)
        compare(mesh(ulysses=2), layout, give_length=False)
    compare(mesh(rows=2), strategy="grid")
    compare(mesh(ring=2), strategy="ring_q")
    compare(mesh(tensor=2))
    compare(dist.group.WORLD)
    compare(dist.group.WORLD, strategy="ulysses", mask=WINDOW)


@on_ranks(4)
def test_four_ranks_and_lengths_that_nothing_divides():
    for seq in (37, 6, 3):
        compare(mesh(ring=4), seq=seq, give_length=False)
    compare(mesh(ring=2, ulysses=2), "striped", "hybrid", seq=37, give_length=False)
    compare(mesh(ring_outer=2, ring=2), mask=WINDOW)
    compare(mesh(ring=2, tensor=2), mask="full")
    compare(mesh(rows=2, ulysses=2), strategy="grid")
    compare(mesh(ring=4), strategy="tree", mask={"kind": "documents", "cu_seqlens": [0, 11, 30, 38], "within": "causal"})


@on_ranks(4)
def test_other_dimensions_take_no_part():
    where = mesh(replicas=2, ring=2)
    compare(where)
    compare(mesh(data=2, ring=2))
    compare(where["ring"])
    compare(mesh(ring=2, ulysses=1, replicas=2))


@on_ranks(4)
def test_dropout_is_the_same_on_every_mesh():
    for where in (mesh(ring=4), mesh(ring=2, ulysses=2), mesh(ulysses=2, tensor=2)):
        compare(where, dropout_p=0.3, dropout_seed=11)
    torch.manual_seed(100 + dist.get_rank())  # ranks that draw other numbers agree on the first one's
    q, k, v, _ = inputs(seq=8, batch=1)
    for tensor in (q, k, v):
        dist.broadcast(tensor.detach(), 0)
    drop = torch.get_rng_state()
    out = dattn.torch.attention(*(t.detach()[:, rows_of("zigzag", 8, mesh(ring=4))] for t in (q, k, v)), mesh=mesh(ring=4),
                                dropout_p=0.5, seq_len=8)
    whole = dattn.torch.unshard(out, mesh(ring=4), seq_len=8)
    torch.set_rng_state(drop)
    one = dattn.torch.attention(q, k, v, dropout_p=0.5)
    dist.broadcast(one.detach(), 0)  # that of rank 0, whose number it was
    close(whole, one)


@on_ranks(4)
def test_dropout_differs_between_data_ranks():
    where = mesh(data=2, ring=2)
    torch.manual_seed(1)
    q, k, v, _ = inputs(batch=1, seq=16)
    rows = rows_of("zigzag", 16, where)
    out = dattn.torch.attention(q[:, rows], k[:, rows], v[:, rows], mesh=where, seq_len=16, dropout_p=0.5, dropout_seed=2)
    doubled = [torch.cat([tensor, tensor]) for tensor in (q, k, v)]
    one = dattn.torch.attention(*doubled, dropout_p=0.5, dropout_seed=2)
    index = where.get_local_rank("data")
    close(out, one[index:index + 1, rows])


@on_ranks(2)
def test_bias_and_sink():
    for where in (mesh(ring=2), mesh(ulysses=2)):
        q, k, v, dout = inputs()
        bias, sink = torch.randn(2, 4, 37, 37, requires_grad=True), torch.randn(4, requires_grad=True)
        one = dattn.torch.attention(q, k, v, bias=bias, sink=sink)
        one.backward(dout)
        rows = rows_of("zigzag", 37, where)
        own_bias, own_sink = bias.detach()[:, :, rows].requires_grad_(), sink.detach().requires_grad_()
        out = dattn.torch.attention(q[:, rows], k[:, rows], v[:, rows], bias=own_bias, sink=own_sink, mesh=where, seq_len=37)
        out.backward(dout[:, rows])
        close(out, one[:, rows])
        close(own_bias.grad, bias.grad[:, :, rows])
        dist.all_reduce(own_sink.grad)
        close(own_sink.grad, sink.grad)


@on_ranks(2)
def test_alibi_slopes_are_the_models():
    compare(mesh(tensor=2), alibi_slopes=None)
    q, k, v, _ = inputs()
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    one = dattn.torch.attention(q, k, v, alibi_slopes=slopes)
    out = dattn.torch.attention(*(heads_of(t, mesh(tensor=2)) for t in (q, k, v)), alibi_slopes=slopes, mesh=mesh(tensor=2))
    close(out, heads_of(one, mesh(tensor=2)))


@on_ranks(2)
def test_queries_and_keys_of_other_lengths():
    where = mesh(ring=2)
    q, k, v, dout = inputs(seq=21, keys=30)
    one = dattn.torch.attention(q, k, v, mask="full")
    one.backward(dout)
    q_rows, k_rows = rows_of("zigzag", 21, where), rows_of("zigzag", 30, where)
    own = [q.detach()[:, q_rows].requires_grad_(), *(t.detach()[:, k_rows].requires_grad_() for t in (k, v))]
    for lengths in ({}, {"seq_len": 21, "seq_len_kv": 30}):
        for tensor in own:
            tensor.grad = None
        out = dattn.torch.attention(*own, mask="full", mesh=where, **lengths)
        out.backward(dout[:, q_rows])
        close(out, one[:, q_rows])
        close(own[1].grad, k.grad[:, k_rows])
    with pytest.raises(dattn.torch.BadInput, match="seq_len_kv where there are more or fewer keys"):
        dattn.torch.attention(*own, mask="full", mesh=where, seq_len=21)


@on_ranks(2)
def test_lengths_are_told_in_one_gather():
    """Of 21 queries and 22 keys one rank holds 11 and 11, the other 10 and 11: both must ask."""
    where, gathers, gather = mesh(ring=2), [], dattn.torch._ops._gather
    q, k, v, _ = (tensor.detach() for tensor in inputs(seq=21, keys=22))
    cut = lambda tensor, dim=1: dattn.torch.shard(tensor, where, dim=dim)
    own, mask = [cut(tensor) for tensor in (q, k, v)], torch.randn(21, 22)
    heads = lambda tensor: tensor.transpose(1, 2).repeat_interleave(4 // tensor.shape[2], 1)
    module = dattn.torch.MultiheadAttention(16, 4, batch_first=True, mesh=where)
    alone = dattn.torch.MultiheadAttention(16, 4, batch_first=True)
    alone.load_state_dict(module.state_dict())
    calls = [(1, lambda: dattn.torch.attention(*own, mask="full", mesh=where), dattn.torch.attention(q, k, v, mask="full")),
             (0, lambda: dattn.torch.attention(*own, mask="full", mesh=where, seq_len=21, seq_len_kv=22),
              dattn.torch.attention(q, k, v, mask="full")),
             (1, lambda: module(own[0][:, :, 0], *(x[:, :, 0] for x in own[1:]), need_weights=False)[0],
              alone(q[:, :, 0], k[:, :, 0], v[:, :, 0], need_weights=False)[0])]
    for attn_mask in (mask, mask[:, :1]):
        want = torch.nn.functional.scaled_dot_product_attention(*map(heads, (q, k, v)), attn_mask).transpose(1, 2)
        calls.append((1, lambda attn_mask=attn_mask: in_sdpa(where, *map(heads, own), attn_mask).transpose(1, 2), want))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dattn.torch._ops, "_gather", lambda *arguments: gathers.append(1) or gather(*arguments))
        for count, call, want in calls:
            gathers.clear()
            close(call(), cut(want), 3e-6)
            assert len(gathers) == count


def in_sdpa(where, *arguments):
    with dattn.torch.sdpa(where):
        return torch.nn.functional.scaled_dot_product_attention(*arguments)


@on_ranks(4)
def test_packed_documents():
    q, k, v, dout = inputs(batch=1, seq=38)
    options = {"tensor_format": "thd", "mask": {"kind": "documents", "cu_seqlens": [0, 11, 30, 38], "within": "causal"}}
    one, lse = dattn.torch.attention(q[0], k[0], v[0], return_lse=True, **options)
    one.backward(dout[0])
    for where in (mesh(ring=4), mesh(ring=2, ulysses=2)):
        rows = rows_of("zigzag", 38, where)
        own = [tensor.detach()[0, rows].requires_grad_() for tensor in (q, k, v)]
        out, own_lse = dattn.torch.attention(*own, mesh=where, return_lse=True, **options)
        out.backward(dout[0, rows])
        close(out, one[rows]), close(own_lse, lse[:, rows])
        for tensor, whole in zip(own, (q, k, v)):
            close(tensor.grad, whole.grad[0, rows], whole=whole.grad)


@on_ranks(2)
def test_balanced_layout():
    q, k, v, _ = inputs(seq=64)
    mask = {"kind": "window", "left": 20}
    x = dattn.torch.shard(torch.arange(64), mesh(ring=2), "balanced", dim=0, mask=mask)
    one = dattn.torch.attention(q, k, v, mask=mask)
    own = [dattn.torch.shard(tensor, mesh(ring=2), "balanced", mask=mask) for tensor in (q, k, v)]
    out = dattn.torch.attention(*own, mask=mask, mesh=mesh(ring=2), layout="balanced", seq_len=64)
    close(out, one[:, x])


@on_ranks(4)
def test_dtensors():
    where = mesh(data=1, ring=2, tensor=2)
    q, k, v, dout = inputs(seq=40)
    one = dattn.torch.attention(q, k, v, mask="full")
    one.backward(dout)
    placements = [Replicate(), Shard(1), Shard(2)]
    rows = lambda tensor: DTensor.from_local(heads_of(tensor.detach()[:, rows_of("zigzag", 40, where)], where).contiguous(), where,
                                             placements, run_check=False)
    own = [rows(tensor).requires_grad_() for tensor in (q, k, v)]
    out, lse = dattn.torch.attention(*own, mask="full", return_lse=True)
    assert isinstance(out, DTensor) and out.placements == tuple(placements) and out.shape == (2, 40, 4, 16)
    assert lse.placements == (Replicate(), Shard(2), Shard(1)) and lse.shape == (2, 4, 40)
    out.backward(rows(dout))
    close(out.to_local(), rows(one).to_local())
    for tensor, whole in zip(own, (q, k, v)):
        assert isinstance(tensor.grad, DTensor)
        close(tensor.grad.to_local(), rows(whole.grad).to_local())
    # In layout contiguous a DTensor's own order is the sequence's.
    own = [dist.tensor.distribute_tensor(tensor.detach(), where, placements) for tensor in (q, k, v)]
    close(dattn.torch.attention(*own, mask="full", layout="contiguous").full_tensor(), one)
    with pytest.raises(dattn.torch.BadInput, match="seq_len is 39, but the DTensor has 40 rows"):
        dattn.torch.attention(*own, seq_len=39)
    with_whole_keys = [own[0], *(tensor.redistribute(placements=[Replicate(), Replicate(), Shard(2)]) for tensor in own[1:])]
    with pytest.raises(dattn.torch.BadInput, match="redistribute it to"):
        dattn.torch.attention(*with_whole_keys)


@on_ranks(2)
def test_compile_on_a_mesh():
    where = mesh(ring=2)
    q, k, v, dout = inputs(seq=32)
    rows = rows_of("zigzag", 32, where)
    own = [tensor.detach()[:, rows].requires_grad_() for tensor in (q, k, v)]

    def function(q, k, v):
        q = q + dattn.torch.position_ids(where, seq_len=32)[None, :, None, None]
        return dattn.torch.attention(q, k, v, mesh=where, seq_len=32).sin()

    want = torch.autograd.grad(function(*own), own, dout[:, rows])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(*own), own, dout[:, rows]), want):
        close(one, other)
    with pytest.raises(Exception, match="seq_len must be given"):
        torch.compile(lambda q: dattn.torch.attention(q, q, q, mesh=where), fullgraph=True, backend="aot_eager")(own[0])
