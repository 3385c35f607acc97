"""shard, unshard, position_ids."""
import pytest
import torch
import torch.distributed as dist

from ranks import mesh, on_ranks
import dattn.torch
from dattn.torch import position_ids, shard, unshard
from reference import close


@on_ranks(4)
def test_positions_of_the_layouts():
    where, rank = mesh(ring=4), dist.get_rank()
    assert position_ids(where, seq_len=16).tolist() == [2 * rank, 2 * rank + 1, 14 - 2 * rank, 15 - 2 * rank]
    assert position_ids(where, "contiguous", seq_len=16).tolist() == list(range(4 * rank, 4 * rank + 4))
    assert position_ids(where, "striped", seq_len=16).tolist() == list(range(rank, 16, 4))
    for seq in (16, 37):
        own = position_ids(where, seq_len=seq)
        assert position_ids(where, rows=len(own)).tolist() == own.tolist()  # lengths are exchanged
    with pytest.raises(dattn.torch.BadInput, match="seq_len"):
        position_ids(where)


@on_ranks(4)
def test_shard_and_unshard_are_inverse():
    for where in (mesh(ring=4), mesh(ring=2, ulysses=2), mesh(ulysses=2, tensor=2), dist.group.WORLD):
        for x, dim in ((torch.randn(2, 37, 3), 1), (torch.arange(37), 0), (torch.randn(3, 2, 21).bfloat16(), -1),
                       (torch.rand(37, 2) > 0.5, 0)):
            for layout in ("zigzag", "striped"):
                own = shard(x, where, layout, dim)
                assert torch.equal(own, x.index_select(dim, position_ids(where, layout, seq_len=x.shape[dim])))
                assert torch.equal(unshard(own, where, layout, dim), x)
                assert torch.equal(unshard(own, where, layout, dim, seq_len=x.shape[dim]), x)


@on_ranks(4)
def test_gradients():
    where, rank = mesh(ring=2, ulysses=2), dist.get_rank()
    x = torch.randn(2, 37, dtype=torch.float64, requires_grad=True)
    rows = position_ids(where, seq_len=37)
    weights = [torch.randn(2, 37, dtype=torch.float64) for _ in range(4)]  # each rank has a use of its own for the whole
    weight = weights[0][:, rows]
    shard(x, where).backward(weight)
    want = torch.zeros_like(x)
    want[:, rows] = weight
    assert torch.equal(x.grad, want)  # zero outside this rank's rows
    own = x.detach()[:, rows].requires_grad_()
    unshard(own, where).backward(weights[rank])
    assert torch.equal(own.grad, weights[rank][:, rows])
    own.grad = None
    unshard(own, where, grad="sum").backward(weights[rank])
    close(own.grad, sum(weights)[:, rows], 1e-14)
    with pytest.raises(dattn.torch.BadInput, match="'own' or 'sum'"):
        unshard(own, where, grad="mean")


@on_ranks(2)
def test_under_compile():
    where = mesh(ring=2)
    x = torch.randn(2, 16, 3, requires_grad=True)
    function = lambda x: unshard(shard(x, where).sin(), where, seq_len=16, grad="sum").cos()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(x), x.sin().cos())
    close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(function(x).sum(), x)[0])
    with pytest.raises(Exception, match="seq_len must be given"):
        torch.compile(lambda x: unshard(x, where), fullgraph=True, backend="aot_eager")(x)


def test_one_rank_has_all():
    x = torch.randn(2, 5)
    assert shard(x, None) is x and unshard(x, None) is x
    assert position_ids(None, seq_len=5).tolist() == [0, 1, 2, 3, 4]
