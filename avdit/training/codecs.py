"""Stage 1: the two codecs, each on the rendered clips.

python -m avdit train codecs --out runs/codecs                     # this machine
accelerate launch -m avdit train codecs --out runs/codecs          # as accelerate is configured

``"trains": "decoder"`` improves the decoders of trained codecs (``video_from``, ``audio_from``) and leaves the latents
as they are, so that a model which was trained on them goes on as before. It pays on whole pictures (``"crop": 256``),
whose normalisation and borders are those of use. ``"video_channels"`` says how many channels the video latents have;
where ``video_from`` has another number, all but the layers at the latent begin with what it has learned.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdit.data.latents import RandomShards, Shards
from avdit.data.scenes import ALL_CLASSES, PACKS
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.codec import LatentCodec
from avdit.models.features import ImageFeatures, feature_distance
from avdit.models.video_codec import VideoCodec
from avdit.training.data import near, rendered_clips
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "clips": 60,  # rendered clips a class
    "crop": 128,  # pixels
    "kl_weight": 1e-6,
    "detail": 4.0,  # extra weight where the picture has fine detail
    "squared": 0.0,  # weight of the mean squared error beside the absolute one: for PSNR, at the cost of sharpness
    "perceptual": 0.25,  # weight of the distance of ImageNet features, on half of each batch; 0: none
    "video": {"steps": 20000, "batch_size": 8, "learning_rate": 1e-3, "minutes": 0.0, "sample_every": 2000},
    "audio": {"steps": 6000, "batch_size": 8, "learning_rate": 1e-3, "minutes": 0.0, "sample_every": 2000},
    "parts": ["audio", "video"],
    "video_channels": 16,  # of the video latents
    "trains": "codec",  # or "decoder": of codecs that are trained already
}


def with_channels(codec: VideoCodec, channels: int) -> VideoCodec:
    """A codec whose latents have so many ``channels``: that of ``codec`` but for the layers at the latent, anew.

    Raises:
        ValueError: for channels that are not a whole number of 1 or more.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"video_channels {channels!r} must be a whole number of 1 or more")
    vae = {**codec.published_config(codec.autoencoder), "latent_channels": channels}
    made = VideoCodec(vae, codec.config.unshuffle, slice_frames=codec.config.slice_frames)
    anew = ("encoder.conv_out.", "decoder.conv_in.", "quant_conv.")
    kept = {name: value for name, value in codec.state_dict().items() if not any(part in name for part in anew)}
    made.load_state_dict(kept, strict=False)
    return made


class Reconstruction(nn.Module):
    """A codec's reconstruction of its input from a sample of its posterior, and the KL term."""

    def __init__(self, codec: LatentCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.codec.posterior(x)
        return self.codec.reconstruct(posterior.sample()), posterior.kl().mean()


def detail_weight(x: Tensor, gain: float) -> Tensor:
    """1 in flat regions of ``x`` (N, C, H, W), more where it differs from its surroundings; mean 1."""
    detail = (x - F.avg_pool2d(x, 7, 1, 3, count_include_pad=False)).abs().mean(1, keepdim=True)
    weight = 1 + gain * detail / (detail.mean((1, 2, 3), keepdim=True) + 0.02)
    return weight / weight.mean()


def picture_error(x: Tensor, y: Tensor, detail: float, squared: float) -> tuple[Tensor, Tensor]:
    """How far pictures ``y`` (N, 3, H, W) are from ``x``: the error that decoders learn by, and its first term alone.

    Args:
        detail: Extra weight where ``x`` has fine detail.
        squared: Weight of the mean squared error beside the absolute one.
    """
    error = (detail_weight(x, detail) * (y - x).abs()).mean()
    grid = (y[..., 1:] - y[..., :-1] - x[..., 1:] + x[..., :-1]).abs().mean()
    grid = grid + (y[..., 1:, :] - y[..., :-1, :] - x[..., 1:, :] + x[..., :-1, :]).abs().mean()
    # Detail takes weight from flat areas, whose colour the eye still sees.
    colour = F.avg_pool2d(y - x, 8).abs().mean()
    total = error + 0.5 * grid + colour
    if squared:
        total = total + squared * (y - x).square().mean()
    return total, error


def train_video(
    codec: VideoCodec, shards: Shards | RandomShards, config: dict, out: Path, resume: bool, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train on random crops of random frames; a dry run says what that would cost."""
    settings = trainer_config(config["video"])
    crop = config["crop"]

    def draw(generator: torch.Generator, number: int, size: int | None, mine: Callable = lambda x: x) -> Tensor:
        items = torch.randint(len(shards), (number,), generator=generator)
        parts = torch.randint(16, (number,), generator=generator)
        frames = shards.get("frames", mine(items), mine(parts)).to(trainer.accelerator.device)
        x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        if size is None:
            return x.contiguous()
        # Corners on the codec's grid of 16 would always show the same phase; any corner will do.
        tops = torch.randint(x.shape[2] - size + 1, (number, 2), generator=generator)
        corners = zip(x, mine(tops).tolist(), strict=True)
        return torch.stack([p[:, a : a + size, b : b + size] for p, (a, b) in corners])

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        x = draw(generator, trainer.global_batch, crop, trainer.mine)
        y, kl = module(x)
        total, error = picture_error(x, y, config["detail"], config["squared"])
        total = total + config["kl_weight"] * kl
        terms = {"l1": error.detach(), "kl": kl.detach()}
        if features is not None:
            half = (len(x) + 1) // 2  # these features cost as much as the codec itself
            with trainer.accelerator.autocast():
                with torch.no_grad():
                    wanted = features(x[:half])
                distance = feature_distance(features(y[:half]), wanted).mean()
            total = total + config["perceptual"] * distance
            terms["features"] = distance.detach()
        return {"loss": total, **terms}

    def sheet(path: Path) -> None:
        x = draw(torch.Generator().manual_seed(1), 9, None)
        y = codec.reconstruct(codec.posterior(x).mode()).clamp(-1, 1)
        psnr = -10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3))).mean()
        trainer.accelerator.print(f"{path.name}: PSNR {psnr:.2f} dB on 9 frames")
        save_png(image_grid(torch.cat([x, y]) / 2 + 0.5, 9), path)

    trainer = Trainer(Reconstruction(codec), loss, settings, out, sheet)
    features = ImageFeatures().to(trainer.accelerator.device) if config["perceptual"] else None
    if dry_run:
        return trainer.dry_run()
    trainer.run(resume)
    if config["trains"] == "codec":
        measure(codec, [draw(torch.Generator().manual_seed(2 + k), 16, None) for k in range(8)])
    return None


def train_audio(
    codec: AudioCodec, shards: Shards | RandomShards, config: dict, out: Path, resume: bool, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train the mel VAE on whole clips; a dry run says what that would cost."""
    settings = trainer_config(config["audio"])

    def draw(generator: torch.Generator, number: int, mine: Callable = lambda x: x) -> Tensor:
        items = torch.randint(len(shards), (number,), generator=generator)
        gain = 10 ** (torch.rand(number, 1, generator=generator) * -0.6)  # 0 to -12 dB
        return codec.mel(shards.get("audio", mine(items)).to(codec.device) * mine(gain).to(codec.device))

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        x = draw(generator, trainer.global_batch, trainer.mine)
        y, kl = module(x)
        error = (y - x).abs().mean()
        slope = (y[:, :, 1:] - y[:, :, :-1] - x[:, :, 1:] + x[:, :, :-1]).abs().mean()
        return {"loss": error + 0.5 * slope + config["kl_weight"] * kl, "l1": error.detach(), "kl": kl.detach()}

    def sheet(path: Path) -> None:
        x = draw(torch.Generator().manual_seed(1), 9)
        y = codec.reconstruct(codec.posterior(x).mode())
        trainer.accelerator.print(f"{path.name}: log-mel L1 {(x - y).abs().mean() * codec.config.mel_std:.3f}")
        picture = (torch.cat([x, y]).transpose(2, 3).flip(2) / 4 + 0.5).clamp(0, 1)
        save_png(image_grid(picture.expand(-1, 3, -1, -1), 9), path)

    trainer = Trainer(Reconstruction(codec), loss, settings, out, sheet)
    if dry_run:
        return trainer.dry_run()
    trainer.run(resume)
    if config["trains"] == "codec":
        measure(codec, [draw(torch.Generator().manual_seed(2 + k), 16) for k in range(8)])
    return None


@torch.no_grad()
def measure(codec: LatentCodec, batches: list[Tensor]) -> None:
    """Store the mean and scale of every latent channel over ``batches``."""
    raw = torch.cat([codec.posterior(x.to(codec.device)).mode() for x in batches])
    codec.set_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Render the clips where they are missing, train the codecs, and save them in ``out``.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for another ``trains`` than "codec" and "decoder", or decoders of codecs that are not given.
    """
    config = {**DEFAULTS, **config}
    if config["trains"] not in ("codec", "decoder"):
        raise ValueError(f"trains {config['trains']!r} must be 'codec' or 'decoder'")
    for part in config["parts"]:
        if config["trains"] == "decoder" and not config.get(f"{part}_from"):
            raise ValueError(f"decoders are trained on the latents of trained codecs: give {part}_from")
    for part in ("video", "audio"):
        config[part] = {**DEFAULTS[part], **config[part]}
    if dry_run:
        shards: Shards | RandomShards = RandomShards(
            ClipGeometry(), len(ALL_CLASSES), latents=False, device=processes().device
        )
    else:
        shards = near(Shards(rendered_clips(Path(config.get("cache", out)), config["clips"], list(PACKS))))
    costs = {}
    for part in config["parts"]:
        kind, train = (AudioCodec, train_audio) if part == "audio" else (VideoCodec, train_video)
        start = config.get(f"{part}_from")
        codec = kind.from_pretrained(start) if start else kind()
        if part == "video" and codec.channels != config["video_channels"]:
            codec = with_channels(codec, config["video_channels"])
        if config["trains"] == "decoder":
            codec.requires_grad_(False)
            codec.autoencoder.decoder.requires_grad_(True)
        codec.to(memory_format=torch.channels_last)  # trains a seventh faster on a CPU
        costs[part] = train(codec, shards, config, Path(out) / part, resume, dry_run)
        if not dry_run and processes().is_main_process:
            codec.to(torch.bfloat16).save_pretrained(Path(out) / f"{part}_codec")
    return costs if dry_run else None
