#!/usr/bin/env python3
"""Microseconds of an eager dattn.torch.attention call beside the C call it makes, on one rank and a tiny problem. Run in
build/venv. (Larger problems: compare.py --only plugin.)"""
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "plugins", "python"))
import torch
import torch.nn.functional as F

import dattn.torch
from dattn.torch import _attention, _plan


def least_us(function, calls=100, rounds=100):
    """Processor time of a call, the least of some rounds: other programs on the machine do not count."""
    for _ in range(50):
        function()
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(calls):
            function()
        times.append((time.thread_time() - began) / calls * 1e6)
    return min(times)


def overhead():
    torch.set_num_threads(1)
    q = torch.randn(1, 8, 1, 16)
    call, _ = _attention._call(None, "causal", "zigzag", "auto", "bshd", None, None, None, 0.0, None, None)
    plan = _plan.call_of(call).plan(q, q, q, None, None, 8, 8)
    out, lse = plan.forward(q, q, q, None, None, 0)  # what the structs point to is kept
    c_forward = least_us(lambda: plan._forward(plan.handle, plan.forward_reference))
    with torch.no_grad():
        eager = least_us(lambda: dattn.torch.attention(q, q, q))
        operator = least_us(lambda: torch.ops.dattn.attention_forward(q, q, q, None, None, None, call, 8, 8, 0))
        sdpa = least_us(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    grad = [q.clone().requires_grad_() for _ in range(3)]
    with_graph = least_us(lambda: dattn.torch.attention(*grad))
    dout = torch.randn_like(q)
    both = least_us(lambda: torch.autograd.grad(dattn.torch.attention(*grad), grad, dout))
    kept = plan.forward(q, q, q, None, None, 0), plan.backward(dout, q, q, q, None, None, out, lse, 0, False, False)
    c_backward = least_us(lambda: plan._backward(plan.handle, plan.backward_reference))
    del kept
    print(f"C call forward {c_forward:.1f} us, backward {c_backward:.1f} us")
    print(f"eager without graph {eager:.1f} us (+{eager - c_forward:.1f}), with graph {with_graph:.1f} us (+{with_graph - c_forward:.1f}),"
          f" through the dispatcher {operator:.1f} us (+{operator - c_forward:.1f})")
    print(f"forward and backward {both:.1f} us (+{both - c_forward - c_backward:.1f} over both C calls); torch's own forward {sdpa:.1f} us")


if __name__ == "__main__":
    overhead()
