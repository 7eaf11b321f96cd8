"""How much of the machine a training step uses: its floating-point operations, and those that it could have had."""

import contextlib
import time
import warnings
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_attention(query: list[int], key: list[int], value: list[int], *args, **kwargs) -> int:
    """Operations of fused attention on a CPU, which PyTorch's own table leaves out; arguments are shapes."""
    return sdpa_flop_count(query, key, value)


def cpu_attention_backward(
    gradient: list[int], query: list[int], key: list[int], value: list[int], *args, **kwargs
) -> int:
    """Those of its gradient."""
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward,
}


@contextlib.contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the operations of matrix products, convolutions and attention inside; two for a multiply-add.

    Compiled modules run as they were written, for what a compiler makes of them cannot be counted.
    """
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # of the counter's hooks on modules
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as count:
            yield count


def matmul_flops(device: torch.device, precision: str, runs: int = 5) -> float:
    """Operations a second of one large product of matrices in ``precision`` ("no", "bf16", "fp16").

    The best of ``runs``: what this machine reaches here and now, with as many threads as torch has.
    """
    side = 8192 if device.type == "cuda" else 2048
    dtype = PRECISIONS.get(precision, torch.bfloat16)  # accelerate knows 8 bits, too, which torch does not multiply
    x, best = torch.ones(side, side, dtype=dtype, device=device), float("inf")
    for _ in range(runs + 1):  # the first one is slower
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
