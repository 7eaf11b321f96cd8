"""Stage 2: the image-only backbone, on single frames' latents with their class.

python -m avdit train backbone --out runs/backbone                 # this machine
accelerate launch -m avdit train backbone --out runs/backbone      # as accelerate is configured
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from avdit.data.latents import Shards, encode_shards, render_shards
from avdit.data.scenes import CLASSES
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.training.diffusion import Diffusion, masked_error
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, trainer_config

DEFAULTS = {
    "codecs": "runs/codecs",  # folder of video_codec and audio_codec
    "clips": 160,  # rendered clips a class
    "class_dropout": 0.1,
    "model": {"hidden_size": 192, "depth": 8, "num_heads": 3},
    "train": {"steps": 40000, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 100, "sample_every": 500},
}


def latent_shards(config: dict, out: Path) -> tuple[Shards, VideoCodec, AudioCodec]:
    """The latents of the rendered clips, made where they are missing, and the codecs that made them."""
    codecs, cache = Path(config["codecs"]), Path(config.get("cache", out))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    video = VideoCodec.from_pretrained(codecs / "video_codec").to(device).eval()
    audio = AudioCodec.from_pretrained(codecs / "audio_codec").to(device).eval()
    if config["clips"]:
        render_shards(cache / "clips", config["clips"])
    if (cache / "clips").is_dir():
        encode_shards(cache / "clips", cache / "latents", video, audio)
    return Shards(cache / "latents"), video, audio


@torch.no_grad()
def sample_images(model: DiT, labels: Tensor, steps: int = 20, guidance: float = 2.0) -> Tensor:
    """Latents (N, C, h, w) of the classes ``labels`` (N,) by DDIM with classifier-free guidance."""
    scheduler = xs_scheduler()
    scheduler.set_timesteps(steps)
    size, channels = model.config.input_size, model.config.in_channels
    x = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(0)).to(labels.device)
    empty = torch.full_like(labels, model.config.num_classes)
    for t in scheduler.timesteps:
        time = t.expand(2 * len(x)).to(x.device)
        wanted, free = model(torch.cat([x, x]), time, torch.cat([labels, empty])).chunk(2)
        x = scheduler.step(free + guidance * (wanted - free), t, x).prev_sample
    return x


def run(config: dict, out: Path, resume: bool = False) -> None:
    """Train the backbone and save it in ``out``/backbone."""
    config = {**DEFAULTS, **config}
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    geometry = ClipGeometry()
    shards, codec, _ = latent_shards(config, out)
    start = config.get("start")
    shape = {"input_size": geometry.video_latent_shape[1], "in_channels": geometry.video_channels}
    shape |= {"patch_size": geometry.video_patch, "num_classes": len(CLASSES), "learn_sigma": False}
    model = DiT.from_pretrained(start) if start else DiT(**shape, **config["model"])
    diffusion = Diffusion(xs_scheduler())

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        number = settings.batch_size
        items = torch.randint(len(shards), (number,), generator=generator)
        clean = shards.get("video", items, torch.randint(geometry.frames, (number,), generator=generator)).float()
        labels = shards.get("label", items)
        dropped = torch.rand(number, generator=generator) < config["class_dropout"]
        labels = labels.where(~dropped, torch.tensor(len(CLASSES)))
        t = diffusion.timesteps(generator, number)
        noise = torch.randn(clean.shape, generator=generator)
        noised, target = diffusion.noised(clean, noise, t, torch.zeros_like(t, dtype=torch.bool))
        device = trainer.accelerator.device
        predicted = module(noised.to(device), t.to(device), labels.to(device))
        return {"loss": masked_error(predicted, target.to(device), torch.ones(1, device=device, dtype=torch.bool))}

    def sheet(path: Path) -> None:
        model.eval()
        labels = torch.arange(len(CLASSES), device=next(model.parameters()).device).repeat(2)
        frames = codec.decode(sample_images(model, labels).unsqueeze(1)).squeeze(1)
        save_png(image_grid(frames / 2 + 0.5, len(CLASSES)), path)
        model.train()

    trainer = Trainer(model, loss, settings, out, sheet)
    if resume:
        trainer.resume()
    trainer.run()
    model.to(torch.bfloat16).save_pretrained(Path(out) / "backbone")
