"""What is refused, with which words; nothing has been sent then: other ranks go on."""
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ranks import mesh, on_ranks
import dattn
import dattn.torch
from dattn.torch import _comm
from reference import close, inputs


def q(*shape, **options):
    return torch.randn(*(shape or (2, 8, 4, 16)), **options)


REFUSED = {
    "q is torch.float8_e4m3fn": (lambda: (q().to(torch.float8_e4m3fn),) * 3, {}),
    "q is torch.float32 but k is torch.bfloat16": (lambda: (q(), q().bfloat16(), q()), {}),
    "they must be on one device": (lambda: (q(), q(device="meta"), q()), {}),
    "tensor_format bshd has 4 axes": (lambda: (q(8, 4, 16),) * 3, {}),
    "unknown tensor_format 'hbsd'": (lambda: (q(),) * 3, {"tensor_format": "hbsd"}),
    "q has 2 batch rows, k 1": (lambda: (q(), q(1, 8, 4, 16), q(1, 8, 4, 16)), {}),
    "must be a multiple": (lambda: (q(), q(2, 8, 3, 16), q(2, 8, 3, 16)), {}),
    "q has head dim 16 but k 12": (lambda: (q(), q(2, 8, 4, 12), q()), {}),
    "k has 8 rows of 4 heads but v 7 rows": (lambda: (q(), q(), q(2, 7, 4, 16)), {}),
    "bias has shape": (lambda: (q(),) * 3, {"bias": torch.zeros(2, 3, 8, 8)}),
    "bias is torch.float64": (lambda: (q(),) * 3, {"bias": torch.zeros(1, 1, 8, 8).double()}),
    "sink has shape": (lambda: (q(),) * 3, {"sink": torch.zeros(3)}),
    "dropout_p is 1.5": (lambda: (q(),) * 3, {"dropout_p": 1.5}),
    "dropout_seed is -1": (lambda: (q(),) * 3, {"dropout_p": 0.5, "dropout_seed": -1}),
    "mask is a Tensor": (lambda: (q(),) * 3, {"mask": torch.ones(8, 8)}),
    "mask is a int": (lambda: (q(),) * 3, {"mask": 3}),
    "give a torch DeviceMesh": (lambda: (q(),) * 3, {"mesh": "ring"}),
    "diagonal": (lambda: (q(),) * 3, {"mask": "diagonal"}),
    "lef": (lambda: (q(),) * 3, {"mask": {"kind": "window", "lef": 3}}),
    "snake": (lambda: (q(),) * 3, {"layout": "snake"}),
    "teleport": (lambda: (q(),) * 3, {"strategy": "teleport"}),
    "alibi": (lambda: (q(),) * 3, {"alibi_slopes": [1.0, 2.0]}),
}

OF_THE_PLAN = ("diagonal", "lef", "snake", "teleport", "alibi")  # refused once lengths are known, and the seed


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words):
    make, options = REFUSED[words]
    with pytest.raises(ValueError, match=words) as caught:
        dattn.torch.attention(*make(), **options)
    assert isinstance(caught.value, dattn.BadInput) and isinstance(caught.value, dattn.Error)


@on_ranks(2)
def test_refused_on_meshes_and_the_mesh_still_works():
    where = mesh(ring=2)
    x, k, v, _ = inputs(seq=8)
    x, k, v = x.detach(), k.detach(), v.detach()
    rows = dattn.torch.position_ids(where, seq_len=8)
    own = [tensor[:, rows] for tensor in (x, k, v)]
    for options, words in [({"seq_len": 9}, "gives this rank"), ({"seq_len": 8, "strategy": "ulysses"}, "ulysses"),
                           ({"seq_len": 8, "timeout_s": -1}, "timeout_s"), ({"seq_len": 8, "mesh": mesh(x=2)}, "none is one of ours"),
                           ({"seq_len": 8, "mesh": dist.init_device_mesh("cpu", (2,))}, "no dimension names")]:
        if dist.get_rank() == 0 or options["seq_len"] == 8:
            with pytest.raises(dattn.BadInput, match=words):
                dattn.torch.attention(*own, **{"mesh": where, **options})
    close(dattn.torch.attention(*own, mesh=where, seq_len=8), dattn.torch.attention(x, k, v)[:, rows])


@pytest.mark.parametrize("given", [{"seq_len": 16}, {}, {"seq_len": 16, "dropout_p": 0.5}], ids=["length", "no length", "seed drawn"])
@on_ranks(2)
def test_refusals_send_nothing(given):
    """One rank alone makes the calls that are refused; the other hears nothing of it."""
    where, x = mesh(ring=2), q()
    attend = lambda *tensors, **options: dattn.torch.attention(*tensors, **{"mesh": where, **given, **options})
    module = dattn.torch.MultiheadAttention(16, 4, mesh=where, batch_first=True)
    attend(x, x, x)  # the mesh is made: from here on, only calls send
    transfers, exchange = [], _comm.GroupComm._exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_comm.GroupComm, "_exchange", lambda *arguments: transfers.append(1) or exchange(*arguments))
        if dist.get_rank() == 0:
            for words, (make, options) in REFUSED.items():
                if words not in OF_THE_PLAN or given == {"seq_len": 16}:
                    with pytest.raises(dattn.BadInput, match=words):
                        attend(*make(), **options)
            with pytest.raises(dattn.BadInput, match="k has 8 rows of 4 heads but v 7 rows"):
                module(x[:, :, 0], x[:, :, 0], x[:, :7, 0])
            with dattn.torch.sdpa(where), pytest.raises(dattn.BadInput, match="q has head dim 16 but k 12"):
                torch.nn.functional.scaled_dot_product_attention(x, q(2, 8, 4, 12), x, torch.ones(8, 8))
            for sequence, words in ((17, "gives this rank"), (0, "seq")) if "dropout_p" not in given else ():
                with pytest.raises(dattn.BadInput, match=words):
                    attend(x, x, x, seq_len=sequence)
            assert not transfers
        attend(x, x, x)
        assert transfers  # what would have been counted


@on_ranks(4)
def test_refused_dimensions():
    with pytest.raises(dattn.BadInput, match="in the order ulysses, ring"):
        dattn.torch.attention(q(), q(), q(), mesh=mesh(ulysses=2, ring=2))
    with pytest.raises(dattn.BadInput, match="heads"):
        dattn.torch.attention(q(1, 2, 3, 8), q(1, 2, 3, 8), q(1, 2, 3, 8), mesh=mesh(ulysses=4), seq_len=8, strategy="nothing-heads")


def test_nothing_is_printed(capfd):
    for words, (make, options) in REFUSED.items():
        with pytest.raises(ValueError):
            dattn.torch.attention(*make(), **options)
    dattn.torch.attention(q(), q(), q())
    assert capfd.readouterr() == ("", "")


def test_a_program_prints_only_what_it_prints():
    program = """
import torch, dattn.torch
import dattn.transformers
q = torch.randn(1, 8, 4, 16, requires_grad=True)
dattn.transformers.register()
dattn.torch.attention(q, q, q).sum().backward()
dattn.torch.attention(q, q, q, strategy="ring", determinism="invariant")
with dattn.torch.sdpa(): torch.nn.functional.scaled_dot_product_attention(q, q, q)
dattn.torch.SelfAttention(16, 2)(q[0])
"""
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path[:2])))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tensors_without_data_give_shapes():
    out, lse = dattn.torch.attention(*(q(device="meta"),) * 3, return_lse=True)
    assert out.is_meta and out.shape == (2, 8, 4, 16) and lse.shape == (2, 4, 8)
