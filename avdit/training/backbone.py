"""Stage 2: the image-only backbone, on single frames' latents with their class.

python -m avdit train backbone --out runs/backbone                 # this machine
accelerate launch -m avdit train backbone --out runs/backbone      # as accelerate is configured

All classes of all packs are trained on, for one backbone stands behind every pack.
``"data": {"folder": DIR}`` trains on the frames of a folder of mp4 files in place of rendered clips.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.geometry import ClipGeometry
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline
from avdit.training.data import TrainingData, clip_geometry, held_out_data, training_data
from avdit.training.diffusion import Diffusion, moving_weight
from avdit.training.keeping import KeptPacks
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "codecs": "runs/codecs",  # folder of video_codec and audio_codec
    "clips": 160,  # rendered clips a class
    "class_dropout": 0.1,
    "class_repeats": {},  # {"pop": 3}: frames of that class are drawn three times as often as the others
    # {"pipeline": DIR, "packs": ["landscape"]}: what these make stays as it is, a clip a step, at this weight.
    "keeps": {"pipeline": None, "packs": [], "weight": 10.0, "clips": 1},
    "moving_weight": 3.0,  # most that a cell's error counts for moving more than the clip's mean; 1: all count alike
    "model": {"hidden_size": 192, "depth": 8, "num_heads": 3},
    "train": {
        "steps": 40000,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "optimiser": "muon",
        "warmup_steps": 100,
        "sample_every": 500,
    },
}


def new_backbone(geometry: ClipGeometry, num_classes: int, sizes: dict[str, int]) -> DiT:
    """An untrained backbone over the latents of ``geometry``; ``sizes`` as in ``DEFAULTS["model"]``."""
    shape = {"input_size": geometry.video_latent_shape[1], "in_channels": geometry.video_channels}
    shape |= {"patch_size": geometry.video_patch, "num_classes": num_classes, "learn_sigma": False}
    return DiT(**shape, **sizes)


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


def class_sheet(model: DiT, codec: VideoCodec, path: Path) -> None:
    """Write two images of every class as a PNG."""
    model.eval()
    count = model.config.num_classes
    labels = torch.arange(count, device=next(model.parameters()).device).repeat(2)
    frames = codec.decode(sample_images(model, labels).unsqueeze(1)).squeeze(1)
    save_png(image_grid(frames / 2 + 0.5, count), path)
    model.train()


def frame_error(
    data: TrainingData,
    module: nn.Module,
    generator: torch.Generator,
    trainer: Trainer,
    diffusion: Diffusion,
    class_dropout: float,
    most: float,
) -> dict[str, Tensor]:
    """Loss of ``module`` on one noised frame each of clips of ``data``, and its error with all cells alike.

    Args:
        class_dropout: Share of the frames whose class is not told.
        most: What a cell's error counts for at most for moving more than the clip's mean.
    """
    number, device = trainer.global_batch, trainer.accelerator.device
    items = torch.randint(len(data.shards), (number,), generator=generator)
    frames = torch.randint(data.geometry.frames, (number,), generator=generator)
    dropped = torch.rand(number, generator=generator) < class_dropout
    t = diffusion.timesteps(generator, number)
    items, (frames, dropped, t) = trainer.mine(items), map(trainer.here, (frames, dropped, t))
    clips = data.shards.get("video", items).to(device).float()  # (N, F, C, h, w)
    clean = clips[torch.arange(len(clips), device=device), frames]
    labels = data.labels(items, dropped)
    shape = clean.shape[1:]
    noise = torch.cat([torch.randn(n, *shape, generator=g, device=g.device) for g, n in trainer.draws()]).to(device)
    noised, target = diffusion.noised(clean, noise, t, torch.zeros_like(t, dtype=torch.bool))
    error = (module(noised, t, labels.to(device)) - target).square()
    return {"loss": (moving_weight(clips, most) * error).mean(), "error": error.mean()}


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train the backbone and save it in ``out``/backbone; a dry run says what it would cost and writes nothing."""
    config = {**DEFAULTS, **config}
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    geometry = clip_geometry(config.get("geometry", {}))
    data = training_data(config, out, geometry, dry_run=dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    codec, classes, keeps = data.video_codec, data.classes, {**DEFAULTS["keeps"], **config["keeps"]}
    if keeps["packs"] and (processes().num_processes > 1 or not keeps["pipeline"]):
        raise ValueError("keeps is for one process and names the pipeline of its packs")
    start = config.get("start")
    torch.manual_seed(settings.seed)
    model = DiT.from_pretrained(start) if start else new_backbone(geometry, len(classes), config["model"])
    if model.config.num_classes != len(classes):
        raise ValueError(f"{start} has {model.config.num_classes} classes, the data {len(classes)}")
    diffusion, kept = Diffusion(xs_scheduler(), processes().device), None
    if keeps["packs"]:
        kept = KeptPacks(AVDiTPipeline.from_pretrained(keeps["pipeline"]), keeps["packs"], model, data)
    data = data.repeated(config["class_repeats"])

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        settings = config["class_dropout"], config["moving_weight"]
        terms = frame_error(data, module, generator, trainer, diffusion, *settings)
        if kept is None or data is held_out:
            return terms
        change = kept.error(trainer, generator, step, keeps["clips"])
        return {**terms, "loss": terms["loss"] + keeps["weight"] * change, "change": change.detach()}

    def sheet(path: Path) -> None:
        class_sheet(model, codec, path)

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, sheet, held_out=checked)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        model.to(torch.bfloat16).save_pretrained(Path(out) / "backbone")
    return None
