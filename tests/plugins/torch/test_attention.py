"""attention() on one rank: against the formula, and as PyTorch wants operators to behave."""
import ctypes

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ranks  # noqa: F401  puts the package on the path
import dattn.torch
import reference
from dattn import _c
from reference import close, double, inputs

MASKS = ["full", "causal", {"kind": "window", "left": 9, "right": 3},
         {"kind": "documents", "cu_seqlens": torch.tensor([0, 10, 11, 37]), "within": "causal"}]


def compare(tensors, dout, tolerance=2e-6, turn=lambda x: x, **options):
    """attention and its gradients against the formula in fp64; turn: from bshd to the format of the call."""
    q, k, v = tensors
    want_in = double(q, k, v)
    learned = {name: options[name] for name in ("bias", "sink") if name in options}
    want_learned = {name: value.detach().double().requires_grad_() for name, value in learned.items()}
    known = {name: value for name, value in options.items() if name in ("mask", "scale", "softcap", "alibi_slopes")}
    want, want_lse = reference.attention(*want_in, **known, **want_learned)
    want.backward(dout.double())
    out, lse = dattn.torch.attention(turn(q), turn(k), turn(v), return_lse=True, **options)
    out.backward(turn(dout))
    close(out, turn(want), tolerance)
    close(lse.reshape(want_lse.shape), want_lse, tolerance)
    for got, right in zip(tensors, want_in):
        close(got.grad, right.grad, tolerance)
    for name in learned:
        close(learned[name].grad, want_learned[name].grad, tolerance)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_by_name_and_dict(mask):
    *tensors, dout = inputs()
    compare(tensors, dout, mask=mask)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_types(dtype, tolerance):
    *tensors, dout = inputs(dtype=dtype)
    compare(tensors, dout, tolerance)


@pytest.mark.parametrize("tensor_format, turn", [
    ("sbhd", lambda x: x.transpose(0, 1).contiguous()), ("bhsd", lambda x: x.transpose(1, 2).contiguous())])
def test_tensor_formats(tensor_format, turn):
    *tensors, dout = inputs(dim_v=24)
    compare(tensors, dout, turn=turn, tensor_format=tensor_format)


def test_packed_documents():
    *tensors, dout = inputs(batch=1)
    mask = {"kind": "documents", "cu_seqlens": [0, 5, 20, 37], "within": "causal"}
    compare(tensors, dout, turn=lambda x: x[0], tensor_format="thd", mask=mask)


def test_score_terms_and_their_gradients():
    *tensors, dout = inputs()
    bias = torch.randn(1, 4, 37, 37, requires_grad=True)
    sink = torch.randn(4, requires_grad=True)
    compare(tensors, dout, bias=bias, sink=sink, softcap=2.5, alibi_slopes=[0.1, 0.2, 0.3, 0.4], scale=0.3, tolerance=5e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4)])
def test_a_bias_is_shared_by_batch_and_heads(shape):
    *tensors, dout = inputs()
    compare(tensors, dout, bias=torch.randn(*shape, 37, 37, requires_grad=True), mask="full")


def test_queries_of_another_length():
    *tensors, dout = inputs(seq=20, keys=33)
    compare(tensors, dout, mask="full")


def test_strided_inputs_are_not_copied(monkeypatch):
    whole = torch.randn(2, 37, 4 + 2 + 2, 16, requires_grad=True)
    q, k, v = whole.split([4, 2, 2], dim=2)  # one fused projection
    seen = []
    forward = dattn.torch._plan.Plan.forward
    monkeypatch.setattr(dattn.torch._plan.Plan, "forward", lambda plan, q, k, v, *rest: seen.append(
        [x.data_ptr() for x in (q, k, v)]) or forward(plan, q, k, v, *rest))
    out = dattn.torch.attention(q, k, v)
    assert seen == [[q.data_ptr(), k.data_ptr(), v.data_ptr()]]
    close(out, reference.attention(q, k, v)[0])
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    close(dattn.torch.attention(*turned, tensor_format="bhsd").transpose(1, 2), out, 0)
    assert seen[1] == seen[0]
    out.sum().backward()  # a gradient of stride 0
    want = whole.detach().clone().requires_grad_()
    reference.attention(*want.split([4, 2, 2], dim=2))[0].sum().backward()
    close(whole.grad, want.grad)


def test_a_last_axis_of_other_stride_is_taken():
    q, k, v = (torch.randn(2, 37, 16, 4).transpose(2, 3) for _ in range(3))
    close(dattn.torch.attention(q, k, v), reference.attention(q, k, v)[0])


def test_dlpack_capsules_are_tensors_of_the_c_interface():
    tensor_in = ctypes.pythonapi.PyCapsule_GetPointer
    tensor_in.restype, tensor_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    q, k, v, _ = (tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs())  # strided
    out = torch.empty(q.shape)
    capsules = {"q": q.__dlpack__(), "k": k.__dlpack__(), "v": v.__dlpack__(), "out": out.__dlpack__()}
    call = _c.Forward(**{name: ctypes.cast(tensor_in(capsule, b"dltensor"), ctypes.POINTER(_c.Tensor))
                         for name, capsule in capsules.items()})
    plan = dattn.torch._plan.call_of(call_text()).plan(q, k, v, None, None, 37, 37)
    _c.check(_c.lib().dattn_attention_forward(plan.handle, ctypes.byref(call)))
    close(out, reference.attention(q, k, v)[0])


def call_text(mask="causal", tensor_format="bshd"):
    """What operators have of a call on one rank."""
    return dattn.torch._attention._call(None, mask, "zigzag", "auto", tensor_format, None, None, None, 0.0, None, None)[0]


CALLS = [dict(), dict(mask="full", tensor_format="bhsd"), dict(bias=True, sink=True)]


@pytest.mark.parametrize("options", CALLS)
def test_opcheck(options):
    q, k, v, _ = inputs(seq=16)
    options = dict(options)
    bias = torch.randn(1, 4, 16, 16, requires_grad=True) if options.pop("bias", False) else None
    sink = torch.randn(4, requires_grad=True) if options.pop("sink", False) else None
    if options.get("tensor_format") == "bhsd":
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, bias, sink, None, call_text(**options), 16, 16, 0)
    torch.library.opcheck(torch.ops.dattn.attention_forward, arguments)
    out, lse = torch.ops.dattn.attention_forward(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.dattn.attention_backward, (torch.randn_like(out), *detached[:5], out, lse, *detached[5:],
                                                               bias is not None, sink is not None))


def test_opcheck_of_the_others():
    sharding = dattn.torch.sharding._text(dattn.torch._mesh.ONE_RANK, "zigzag", None)
    x = torch.randn(2, 16, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.dattn.unshard, (x, sharding, 16, 1, True))
    torch.library.opcheck(torch.ops.dattn.unshard, (x, sharding, 16, 1, False))
    torch.library.opcheck(torch.ops.dattn.reduce_shard, (x, sharding, 16, 1))
    torch.library.opcheck(torch.ops.dattn.positions, (x.detach(), sharding, 16))
    torch.library.opcheck(torch.ops.dattn.agree, (torch.tensor([5]), call_text()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    class Settings:
        left, softcap = 9, 3.5

    def function(q, k, v, bias, sink):
        out, lse = dattn.torch.attention(q * 2, k, v, mask={"kind": "window", "left": Settings.left}, bias=bias, sink=sink,
                                         softcap=Settings.softcap, return_lse=True)
        return out.sin() + lse.transpose(1, 2)[..., None]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if dynamic else "inductor", dynamic=dynamic)
    for seq in (32, 48):
        q, k, v, dout = inputs(seq=seq)
        bias, sink = torch.randn(1, 1, seq, seq, requires_grad=True), torch.randn(4, requires_grad=True)
        want = function(q, k, v, bias, sink)
        gradients = torch.autograd.grad(want, (q, k, v, bias, sink), dout)
        got = compiled(q, k, v, bias, sink)
        close(got, want)
        for one, other in zip(torch.autograd.grad(got, (q, k, v, bias, sink), dout), gradients):
            close(one, other)
        if not dynamic:
            break


def test_dropout_under_compile_and_checkpoint():
    q, k, v, dout = inputs()
    function = lambda q, k, v: dattn.torch.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    want = function(q, k, v)
    gradients = torch.autograd.grad(want, (q, k, v), dout)
    torch.manual_seed(3)
    again = checkpoint(function, q, k, v, use_reentrant=False)  # draws the same seed when it runs again
    close(again, want, 0)
    for one, other in zip(torch.autograd.grad(again, (q, k, v), dout), gradients):
        close(one, other, 0)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    close(compiled(q, k, v), want, 0)
    assert not torch.equal(compiled(q, k, v), want)  # another call, another seed


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    q, k, v, dout = inputs()
    want = torch.autograd.grad(dattn.torch.attention(q, k, v), (q, k, v), dout)
    for tensor in (q, k, v):
        tensor.grad = None
    checkpoint(dattn.torch.attention, q, k, v, use_reentrant=reentrant).backward(dout)
    for tensor, gradient in zip((q, k, v), want):
        close(tensor.grad, gradient, 0)


def test_gradcheck():
    q, k, v, _ = inputs(batch=1, seq=6, heads=2, kv_heads=1, dim=4, dtype=torch.float64)
    bias = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    function = lambda q, k, v, bias: dattn.torch.attention(q, k, v, bias=bias, softcap=3.0)
    assert torch.autograd.gradcheck(function, (q, k, v, bias))
    assert torch.autograd.gradcheck(lambda q, k, v: dattn.torch.attention(q, k, v, mask="full", dropout_p=0.3, dropout_seed=1), (q, k, v))


def test_a_graph_is_used_twice():
    q, k, v, dout = inputs()
    out = dattn.torch.attention(q, k, v)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out, (q, k, v), dout)):
        close(one, other, 0)


def test_lse_has_no_gradient():
    q, k, v, _ = inputs()
    out, lse = dattn.torch.attention(q, k, v, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_second_derivatives_are_refused():
    q, k, v, dout = inputs()
    (dq,) = torch.autograd.grad(dattn.torch.attention(q, k, v), q, dout, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="derivative|differentiate"):
        dq.sum().backward()


@pytest.mark.parametrize("transform", ["jvp", "dual tensors", "grad"])
def test_transforms_that_would_lose_the_derivative_are_refused(transform):
    q, k, v, _ = (tensor.detach() for tensor in inputs())
    attend = lambda x: dattn.torch.attention(x, k, v)
    if transform == "grad":
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda x: attend(x).sum())(q)
        return
    with pytest.raises(NotImplementedError, match="forward mode"):
        if transform == "jvp":
            torch.func.jvp(attend, (q,), (q,))
        else:
            with torch.autograd.forward_ad.dual_level():
                attend(torch.autograd.forward_ad.make_dual(q, q))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    q, k, v, dout = (torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in inputs())
    many = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = torch.vmap(dattn.torch.attention)(*many)
    gradients = torch.autograd.grad(out, many, dout)
    for row in range(2):
        own = [tensor[row].detach().requires_grad_() for tensor in many]
        want = dattn.torch.attention(*own)
        close(out[row], want, 0)
        for got, right in zip(gradients, torch.autograd.grad(want, own, dout[row])):
            close(got[row], right, 1e-6)
    shared = torch.vmap(lambda x: dattn.torch.attention(x, k[0], v[0]))(q)
    close(shared[1], dattn.torch.attention(q[1], k[0], v[0]), 0)


def test_inference_mode_and_no_grad():
    q, k, v, _ = inputs()
    want = dattn.torch.attention(q, k, v)
    with torch.no_grad():
        close(dattn.torch.attention(q, k, v), want, 0)
    with torch.inference_mode():
        out, lse = dattn.torch.attention(q.detach(), k.detach(), v.detach(), return_lse=True)
    close(out, want, 0)
    assert out.is_inference() and lse.shape == (2, 4, 37)


def test_autocast():
    q, k, v, dout = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = dattn.torch.attention(q, k, v)
        operator, _ = torch.ops.dattn.attention_forward(q, k, v, None, None, None, call_text(), 37, 37, 0)
    assert out.dtype == torch.bfloat16
    close(operator, out, 0)
    out.backward(dout.bfloat16())
    assert q.grad.dtype == torch.float32
    close(out, reference.attention(q, k, v)[0], 2e-2)


def test_dropout():
    q, k, v, dout = inputs(batch=1, seq=200, heads=2, kv_heads=2, dim=8)
    k = torch.zeros_like(k)  # all weights are equal: out is the mean of what is kept
    ones = torch.ones_like(v)
    drop = lambda **options: dattn.torch.attention(q, k, ones, mask="full", dropout_p=0.25, **options)
    one, same, other = drop(dropout_seed=5), drop(dropout_seed=5), drop(dropout_seed=6)
    close(one, same, 0)
    assert not torch.equal(one, other)
    assert abs(one.mean().item() - 1) < 0.01 and 0.005 < one.std().item() < 0.1
    torch.manual_seed(1)
    first, second = drop(), drop()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    close(drop(), first, 0)


def test_determinism_is_passed_on():
    q, k, v, _ = inputs()
    close(dattn.torch.attention(q, k, v, determinism="invariant"), dattn.torch.attention(q, k, v))
    with pytest.raises(dattn.torch.BadInput, match="sometimes"):
        dattn.torch.attention(q, k, v, determinism="sometimes")


def test_an_operator_call_is_seen_by_dispatch_modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    q, k, v, _ = inputs()
    with Record():
        dattn.torch.attention(q, k, v)
    assert "dattn.attention_forward.default" in names


def test_plain_and_dispatched_calls_are_one_function():
    q, k, v, dout = inputs()
    call = call_text()
    out, _ = torch.ops.dattn.attention_forward(q, k, v, None, None, None, call, 37, 37, 0)
    close(dattn.torch.attention(q, k, v), out, 0)
    own = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    operator, _ = torch.ops.dattn.attention_forward(*own, None, None, None, call, 37, 37, 0)
    plain = torch.autograd.grad(dattn.torch.attention(q, k, v), (q, k, v), dout)
    for one, other in zip(torch.autograd.grad(operator, own, dout), plain):
        close(one, other, 0)
