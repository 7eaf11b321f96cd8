"""What the paper's scale costs on this machine: ``python -m benchmarks.xl --device cuda``.

Random weights in the sizes of DiT-XL/2, of Stable Diffusion's VAE and of AudioLDM's VAE and vocoder stand in for the
published ones, which cost the same; ``--checkpoint DIR`` takes an assembled pipeline instead. Prints one JSON object:
for each batch size the seconds a clip takes (classes to arrays, with guidance) and the share that the denoiser reaches
of the matmul rate measured in the same run, eager and compiled, then the rate of training. What this machine has no
means to measure is ``"n/a"``.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from avdit.data.scenes import CLASSES
from avdit.generate import load_pipeline
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xl_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline
from avdit.xl import XL_ADAPTERS

NONE = "n/a"
GUIDANCE = 2.0


def published_vae(channels: int, latents: int, widths: Sequence[int], scaling: float) -> AutoencoderKL:
    """A VAE of random weights in a published shape: Stable Diffusion's or AudioLDM's."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * len(widths)}
    kinds |= {"up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    sizes = {"in_channels": channels, "out_channels": channels, "latent_channels": latents, "layers_per_block": 2}
    return AutoencoderKL(**kinds, **sizes, block_out_channels=tuple(widths), scaling_factor=scaling)


def random_pipeline(name: str = "DiT-XL/2") -> AVDiTPipeline:
    """``avdit-xl`` as it is assembled, with random weights; nothing in it is zero, since zeros cost less power."""
    geometry = ClipGeometry.xl()
    with torch.device("meta"):
        shape = dict(DiT.from_name(name).config)
    adapters = XL_ADAPTERS if name == "DiT-XL/2" else {**XL_ADAPTERS, "temporal_width": 64, "lora_rank": 8}
    model = AVDiT(dit=shape, geometry=geometry.as_dict(), num_classes=len(CLASSES), **adapters)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    video = VideoCodec.from_vae(published_vae(3, 4, (128, 256, 512, 512), 0.18215))
    voice = {"model_in_dim": geometry.mel_bins, "upsample_initial_channel": 1024, "normalize_before": False}
    voice |= {"upsample_rates": [5, 4, 2, 2, 2], "upsample_kernel_sizes": [16, 16, 8, 4, 4]}
    voice |= {"sampling_rate": geometry.sampling_rate}
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**voice))
    audio = AudioCodec.from_parts(published_vae(1, 8, (128, 256, 512), 0.9227914), vocoder)
    return AVDiTPipeline(model, video, audio, xl_scheduler(), classes=list(CLASSES))


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Trillions of operations a second in a product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = timed(lambda: a @ b, device, runs=10)
    return 2 * size**3 / seconds / 1e12


def timed(work: Callable[[], Any], device: torch.device, runs: int) -> float:
    """The median of the seconds that ``work`` takes, after one run that does not count."""
    taken = []
    for _ in range(runs + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[runs // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> dict[str, float | str]:
    """The most memory held so far, by this process and on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else NONE
    return {"process": round(own / 1e9, 2), "gpu": gpu}


def one_forward(pipe: AVDiTPipeline, batch: int) -> Callable[[], Any]:
    """The denoiser's work in one step for ``batch`` clips: both halves of guidance."""
    device, clip = pipe.device, pipe.geometry
    video, audio = (x.to(device, pipe.dtype) for x in pipe.prepare_latents(batch, None))
    t_video = torch.full((batch, clip.frames), 500, device=device)
    t_audio = torch.full((batch, clip.audio_columns), 500, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    inputs = video, audio, t_video, t_audio, labels
    return lambda: (pipe.transformer(*inputs), pipe.transformer(*inputs, joint=False))


@torch.no_grad()
def forward_flops(pipe: AVDiTPipeline) -> int:
    """Operations of :func:`one_forward` for one clip, counted while nothing is compiled."""
    with FlopCounterMode(display=False) as counter:
        one_forward(pipe, 1)()
    return counter.get_total_flops()


@torch.no_grad()
def sampling(pipe: AVDiTPipeline, batch: int, steps: int, runs: int, rate: float, flops: int) -> dict[str, Any]:
    """Seconds a clip, and the denoiser's share of ``rate`` (TFLOP/s), at one batch size."""
    device = pipe.device
    # Of one pack, so that they are made in one call.
    known = next(iter(pipe.packs.values()))
    labels = [known[i % len(known)] for i in range(batch)]

    def clips() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        pipe(labels, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators)

    forward = timed(one_forward(pipe, batch), device, runs)
    return {
        "seconds_a_clip": round(timed(clips, device, runs) / batch, 3),
        "denoiser_forward_ms": round(1000 * forward, 1),
        "denoiser_share_of_matmul": float(f"{batch * flops / forward / 1e12 / rate:.3g}"),
        "peak_gb": peak_gb(device),
    }


def training(pipe: AVDiTPipeline, batch: int, precision: str) -> dict[str, Any]:
    """One step of ``train adapters`` with this pipeline, by its own dry run."""
    from avdit.training import adapters

    train = {"batch_size": batch, "mixed_precision": precision, "gradient_checkpointing": True}
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        told = adapters.run({"pipeline": folder, "train": train}, Path(folder) / "out", dry_run=True)
    rate = round(1 / told["seconds_per_step"], 3) if told["seconds_per_step"] else NONE
    return {"batch": batch, "steps_a_second": rate, "peak_gb": told["peak_gb"], "precision": told["precision"]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a pipeline folder in place of random weights")
    parser.add_argument("--size", default="DiT-XL/2", help="of the random weights' backbone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    parser.add_argument("--training-batch", type=int, default=16, help="0: no training")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    pipe = load_pipeline(args.checkpoint) if args.checkpoint else random_pipeline(args.size)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device, dtype)
    rate = matmul_tflops(device, dtype, 8192 if device.type == "cuda" else 2048)
    flops = forward_flops(pipe)
    how = (args.steps, args.runs, rate, flops)
    values: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "parameters": sum(pipe.transformer.parameter_table().values()),
        "steps": args.steps,
        "matmul_tflops": float(f"{rate:.4g}"),
        "tflop_a_step_and_clip": float(f"{flops / 1e12:.4g}"),
        "eager": {str(batch): sampling(pipe, batch, *how) for batch in args.batches},
        "compiled": NONE,
        "training": NONE,
    }
    if args.training_batch:
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        values["training"] = training(pipe, args.training_batch, precision)
    if not args.no_compile:
        pipe.transformer.compile()
        values["compiled"] = {str(batch): sampling(pipe, batch, *how) for batch in args.batches}
    print(json.dumps(values, indent=1))
    return values


if __name__ == "__main__":
    main()
