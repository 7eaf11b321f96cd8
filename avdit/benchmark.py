"""What a clip costs on this machine, stage by stage, beside what its arithmetic would cost at the matmul rate."""

import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from avdit.generate import TURBO, Request, Result, generate
from avdit.pipeline import AVDiTPipeline


def measure(work: Callable[[], object], runs: int) -> dict[str, float]:
    """Median, least and greatest milliseconds of ``work`` over ``runs`` runs, after one that does not count."""
    work()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return {
        "median_ms": round(float(np.median(taken)), 2),
        "min_ms": round(min(taken), 2),
        "max_ms": round(max(taken), 2),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at its most: of the GPU where it has one, else of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_gflops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Billions of operations a second in a product of two square matrices."""
    a = torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def product() -> None:
        a @ a
        wait()

    return round(2 * size**3 / measure(product, 10)["min_ms"] / 1e6, 1)


def real_time(seconds: float, taken: dict[str, float]) -> dict[str, float]:
    """The time of a clip of ``seconds``, and seconds of clip per second of work."""
    median = taken["median_ms"] / 1000
    return {"seconds_per_clip": round(median, 3), "realtime_factor": round(seconds / median, 3)}


@torch.no_grad()
def bench(pipe: AVDiTPipeline, runs: int = 5, steps: int = 12) -> dict[str, Any]:
    """Time the making of one clip with guidance.

    Returns:
        ``seconds_per_clip`` (request to arrays), ``realtime_factor`` (seconds of clip per second of work), ``turbo``
        (both of these with turbo adapters, where there are some), ``first_picture_s`` (request to the muxed file that
        the page plays), ``denoiser_forward_ms`` (both halves of guidance) and the ``stages``, each with its spread
        over ``runs``; ``floor_ms`` is the denoiser's arithmetic at ``matmul_gflops``.

    Raises:
        ValueError: for fewer than one run.
    """
    if runs < 1:
        raise ValueError(f"--runs {runs} must be 1 or more")
    clip, model, device = pipe.geometry, pipe.transformer, pipe.transformer.device
    auto = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if auto else model.dtype
    video, audio = (x.to(device, model.dtype).repeat(2, *[1] * (x.ndim - 1)) for x in pipe.prepare_latents(1, None))
    t_video = torch.full((2, clip.frames), 500, device=device)
    t_audio = torch.full((2, clip.audio_columns), 500, device=device)
    labels = torch.tensor([0, model.config.num_classes], device=device)

    def forward() -> None:
        model(video, audio, t_video, t_audio, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        forward()
    rate = matmul_gflops(device, dtype)
    results: list[Result] = []
    whole = measure(lambda: results.append(generate(pipe, Request(pipe.classes[0], steps=steps))), runs)
    with tempfile.TemporaryDirectory() as folder:
        mux = measure(lambda: results[-1].save(Path(folder) / "clip.mp4"), runs)
    denoiser = measure(forward, runs)
    turbo = None
    if turbo_steps := pipe.turbo_steps(pipe.classes[0]):
        fast = measure(lambda: generate(pipe, Request(pipe.classes[0], sampler=TURBO)), runs)
        turbo = {"steps": turbo_steps, **real_time(clip.seconds, fast), "clip": fast}
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
        },
        "runs": runs,
        "steps": steps,
        "matmul_gflops": rate,
        **real_time(clip.seconds, whole),
        "turbo": turbo,
        "first_picture_s": round((whole["median_ms"] + mux["median_ms"]) / 1000, 3),
        "denoiser_forward_ms": denoiser["median_ms"],
        "stages": {
            "clip": whole,
            "noise": measure(lambda: pipe.prepare_latents(1, None), runs),
            "denoiser": {**denoiser, "floor_ms": round(counter.get_total_flops() / rate / 1e6, 2)},
            "video_decode": measure(lambda: pipe.video_codec.decode(video[:1]), runs),
            "audio_decode": measure(lambda: pipe.audio_codec.decode(audio[:1]), runs),
            "mux": mux,
        },
        "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 2**20),
    }
