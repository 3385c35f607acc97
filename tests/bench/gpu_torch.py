"""PyTorch's attention (cuDNN, FlashAttention) and its matrix product on this GPU, on the grid of launch/gpu_check.sh.

usage: gpu_torch.py [--cpu] SEQ..
  prints one JSON line: TFLOP/s forward and backward by (seq, dim, mask), and of a bf16 product
  --cpu  small, on the processor: whether it runs
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU = "--cpu" in sys.argv
DEVICE = "cpu" if CPU else "cuda"
BACK_ENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def milliseconds(body, repeat=10):
    """Median time of one call, by events on the device."""
    if CPU:
        start = time.perf_counter()
        body()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        body()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        body()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def attention(seq, dim, causal, back_end):
    heads, batch = (1, 1) if CPU else (2048 // dim, max(1, 16384 // seq))
    q, k, v = (torch.randn(batch, heads, seq, dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    flops = 4 * batch * heads * seq * seq * dim * (0.5 if causal else 1.0)
    with sdpa_kernel(SDPBackend.MATH if CPU else back_end):
        forward = milliseconds(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        dout = torch.randn_like(out)
        backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    return {"forward_tflops": round(flops / forward * 1e-9, 1), "backward_tflops": round(2.5 * flops / backward * 1e-9, 1)}


def product(size):
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return round(2 * size**3 / milliseconds(lambda: a @ b) * 1e-9, 1)


def main():
    result = {"torch": torch.__version__, "gpu": DEVICE if CPU else torch.cuda.get_device_name(), "product_tflops": product(64 if CPU else 8192)}
    for seq in (int(word) for word in sys.argv[1:] if word != "--cpu"):
        for dim in (64, 128):
            for causal in (False, True):
                for name, back_end in BACK_ENDS.items():
                    result[f"{name} {seq},{dim},{'causal' if causal else 'full'}"] = attention(seq, dim, causal, back_end)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
