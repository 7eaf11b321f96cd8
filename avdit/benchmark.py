"""What a clip costs on this machine, stage by stage, beside what the machine could do at best.

The best is a floor: the operations that a stage counts at the rate of a large matrix product, or the bytes that it
cannot but move (weights, what goes in, what comes out) at the rate of a large copy, whichever takes longer.
"""

import math
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
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from avdit.conditions import middle_blocks
from avdit.generate import TURBO, Request, Result, generate
from avdit.machine import processor
from avdit.models.inference import FoldedAVDiT
from avdit.pipeline import AVDiTPipeline

COPIED = 2**25  # bytes of the copy that measures the memory: with its source more than the caches hold


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


class Ceiling:
    """The rates of ``device`` in ``dtype``, measured: ``gflops`` of a matrix product, ``gb_s`` of a copy."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int = 1024) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.bytes_each = dtype.itemsize
        a = torch.randn(size, size, device=device).to(dtype)
        self.gflops = round(2 * size**3 / self.best_ms(lambda: a @ a) / 1e6, 1)
        source = torch.ones(COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.gb_s = round(2 * COPIED / self.best_ms(lambda: target.copy_(source)) / 1e6, 1)  # read and written

    def best_ms(self, work: Callable[[], object]) -> float:
        def done() -> None:
            work()
            self.wait()

        return measure(done, 10)["min_ms"]

    def stage(self, work: Callable[[], Any], runs: int, module: nn.Module, *inputs: Tensor) -> dict[str, float]:
        """The time of ``work``, which takes ``inputs`` through the weights of ``module``, its floor and its share.

        ``share_of_floor`` is 1 where no time is lost; ``counted`` is what the floor was made from.
        """

        def done() -> Any:
            out = work()
            self.wait()
            return out

        with FlopCounterMode(display=False, custom_mapping=LINEAR) as counter:
            out = done()
        operations = counter.get_total_flops()
        moved = self.bytes_each * sum(
            x.numel() for x in (*module.parameters(), *inputs, *(out if isinstance(out, tuple) else (out,)))
        )
        floor = max(operations / self.gflops / 1e6, moved / self.gb_s / 1e6)
        taken = measure(done, runs)
        counted = {"gflop": round(operations / 1e9, 2), "mb": round(moved / 1e6, 1)}
        share = {"floor_ms": round(floor, 2), "share_of_floor": round(floor / taken["median_ms"], 2)}
        return {**taken, **share, "counted": counted}


def linear_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# oneDNN's linear layers with their own layout of weights, which torch does not count.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
LINEAR = {} if _ONEDNN is None else {_ONEDNN: linear_flops}


def real_time(seconds: float, taken: dict[str, float]) -> dict[str, float]:
    """The time of a clip of ``seconds``, and seconds of clip per second of work."""
    median = taken["median_ms"] / 1000
    return {"seconds_per_clip": round(median, 3), "realtime_factor": round(seconds / median, 3)}


@torch.no_grad()
def bench(pipe: AVDiTPipeline, runs: int = 5, steps: int = 12, class_label: str | None = None) -> dict[str, Any]:
    """Time the making of one clip with guidance, and with turbo adapters where there are some.

    Args:
        class_label: What the clip shows; the first class where it is left out.

    Returns:
        ``seconds_per_clip`` (request to arrays), ``realtime_factor`` (seconds of clip per second of work), ``turbo``
        (both of these with turbo adapters), ``first_picture_s`` (request to the muxed file that the page plays),
        ``first_byte_s`` (the same with turbo adapters, the page's first choice), ``denoiser_forward_ms`` (both halves
        of guidance) and the ``stages``, each with its spread over ``runs`` and, where a network works, its floor; among
        them ``sound_for_a_picture``, a clip whose frames are those of a file.

    Raises:
        ValueError: for fewer than one run, or a class that does not exist.
    """
    if runs < 1:
        raise ValueError(f"--runs {runs} must be 1 or more")
    name = class_label or pipe.classes[0]
    pipe.use_pack(pipe.pack_of(pipe.label_ids(name))[0])
    clip, model, device = pipe.geometry, pipe.transformer, pipe.transformer.device
    auto = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if auto else model.dtype
    ceiling, denoiser = Ceiling(device, dtype), pipe.denoiser()
    video, audio = (x.to(device, model.dtype) for x in pipe.prepare_latents(1, None))
    picture, sound = pipe.video_codec, pipe.audio_codec
    mel = sound.decode_mel(audio)

    def denoising(guided: bool) -> dict[str, float]:
        times = [torch.full((1, n), 500, device=device) for n in (clip.frames, clip.audio_columns)]
        label, none = (torch.tensor([i], device=device) for i in (0, model.config.num_classes))
        whole = pipe.factorized and not pipe.eventful
        blind = middle_blocks(len(model.backbone.blocks)) if whole else ()
        less = {"joint": False, "temporal": whole, "blind": blind}  # as after the first steps of a clip

        def step() -> tuple[Tensor, ...]:
            wanted = denoiser(video, audio, *times, label)
            return (*wanted, *denoiser(video, audio, *times, none, **less)) if guided else wanted

        return ceiling.stage(step, runs, model, video, audio)

    results: list[Result] = []

    def make(**asked: Any) -> Result:
        results.append(generate(pipe, Request(name, **asked)))
        return results[-1]

    stages = {
        "noise": measure(lambda: pipe.prepare_latents(1, None), runs),
        "denoiser": denoising(guided=True),
        "denoiser_without_guidance": denoising(guided=False),
        "video_decode": ceiling.stage(lambda: picture.decode(video), runs, picture.autoencoder.decoder, video),
        "mel_decode": ceiling.stage(lambda: sound.decode_mel(audio), runs, sound.autoencoder.decoder, audio),
        "vocoder": measure(lambda: sound.synthesise(mel), runs),
    }
    whole = measure(lambda: make(steps=steps), runs)
    turbo = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        stages["mux"] = mux = measure(lambda: results[-1].save(path), runs)
        stages["sound_for_a_picture"] = measure(lambda: make(steps=steps, video=path), runs)
        if turbo_steps := pipe.turbo_steps(name):
            fast = measure(lambda: make(sampler=TURBO), runs)
            first_byte = measure(lambda: make(sampler=TURBO).save(path), runs)
            turbo = {"steps": turbo_steps, **real_time(clip.seconds, fast), "clip": fast, "first_byte": first_byte}
    first_picture = round((whole["median_ms"] + mux["median_ms"]) / 1000, 3)
    return {
        "machine": {
            "processor": processor(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "runs": runs,
        "steps": steps,
        "matmul_gflops": ceiling.gflops,
        "copy_gb_s": ceiling.gb_s,
        **real_time(clip.seconds, whole),
        "turbo": turbo,
        "first_picture_s": first_picture,
        "first_byte_s": round(turbo["first_byte"]["median_ms"] / 1000, 3) if turbo else first_picture,
        "denoiser": "folded" if isinstance(denoiser, FoldedAVDiT) else "plain",
        "denoiser_forward_ms": stages["denoiser"]["median_ms"],
        "stages": {"clip": whole, **stages},
        "peak_memory_mb": round(peak_memory(torch.device("cpu")) / 2**20),
    }
