"""What the sound of a pack's clips may be, told from the picture: a small network that the adapters then listen to.

    python -m avdit train foley --config foley.json --out runs/foley    # {"pipeline": DIR, "pack": "dance"}

Adapters round a frozen image transformer learn slowly when a dancer steps on the beat or a boot lands; a network that
compares frames learns it in minutes (:class:`avdit.models.foley.Foley`). It is asked for the latents of the sound, less
their class's mean, with the picture clean, clean in its first frame alone, or noised as a whole. Nothing else moves,
and nothing sounds otherwise yet: ``train adapters`` with ``"pipeline": "runs/foley/pipeline"`` teaches the model to
heed it.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.models.avdit import AVDiT
from avdit.models.noise import draw_noise
from avdit.pipeline import AVDiTPipeline
from avdit.training.adapters import from_pipeline, geometry_of, save_pipeline
from avdit.training.batches import given_parts
from avdit.training.data import TrainingData, held_out_data, training_data
from avdit.training.diffusion import Diffusion
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "pipeline": "runs/adapters/pipeline",  # pipeline folder of one pack
    "pack": "landscape",
    "clips": 160,  # rendered clips a class
    "factorized": None,  # as the pipeline
    "foley_width": 64,
    "class_dropout": 0.1,
    "tasks": {"v2a": 0.4, "image": 0.3, "joint": 0.3},  # what of the picture is clean
    "class_repeats": {},
    "train": {
        "steps": 1200,  # with 2,160 clips; later it knows them by heart
        "batch_size": 64,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "ema_decay": 0.99,
        "warmup_steps": 100,
        "final_rate": 0.02,
        "sample_every": 0,
    },
}
COUNTED = 4096  # clips of which the classes' means are taken at most


class Listener(nn.Module):
    """The joint model as what tells the sound from the picture, and no more."""

    def __init__(self, model: AVDiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, t_video: Tensor, labels: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) at timesteps (B, F) of classes (B,) to those of the sound (B, C, T, f)."""
        c = self.model.backbone.t_embedder(t_video.flatten()).unflatten(0, t_video.shape)
        return self.model.foley(video, c + self.model.class_embedder(labels).unsqueeze(1))


def class_means(data: TrainingData) -> Tensor:
    """Means (classes, C, 1, f) of the sound's latents over the clips of each class and their time."""
    every = torch.arange(len(data.shards))[:: -(-len(data.shards) // COUNTED)]
    labels = data.labels(every, torch.zeros_like(every, dtype=torch.bool)).cpu()
    means = data.shards.get("audio", every).float().cpu().mean(2, keepdim=True)
    found = [means[labels == k] for k in range(len(data.classes))]
    return torch.stack([rows.mean(0) if len(rows) else torch.zeros_like(means[0]) for rows in found])


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train what tells a pack's sound from its picture, and save its pipeline with it in ``out``/pipeline.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for a width that differs from the pipeline's, or is no multiple of 4.
    """
    config = {**DEFAULTS, **config}
    config, classes, scheduler = from_pipeline(config)
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    torch.manual_seed(settings.seed)
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"])
    known, width = pipe.transformer.config.foley_width, config["foley_width"]
    if known and width != known:
        raise ValueError(f"foley_width {width} differs from the pipeline's, which is {known}")
    if isinstance(width, bool) or not isinstance(width, int) or width < 4 or width % 4:
        raise ValueError(f"foley_width {width!r} must be a multiple of 4")
    if not known:
        pipe.register_modules(transformer=pipe.transformer.with_parts(foley_width=width))
    geometry = geometry_of(config)
    data = training_data(config, out, geometry, classes, dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    means = class_means(data).to(processes().device)
    data = data.repeated(config["class_repeats"])
    model = Listener(pipe.transformer.requires_grad_(False))
    model.model.foley.requires_grad_(True)
    diffusion, shared = Diffusion(scheduler, processes().device), pipe.transformer.config.shared_noise

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        number, device = trainer.global_batch, trainer.accelerator.device
        items = torch.randint(len(data.shards), (number,), generator=generator)
        dropped = torch.rand(number, generator=generator) < config["class_dropout"]
        mirrored = torch.rand(number, generator=generator) < 0.5
        frames, _ = given_parts(config["tasks"], number, geometry, generator)
        t = diffusion.timesteps(generator, number)
        items = trainer.mine(items)
        dropped, mirrored, frames, t = map(trainer.here, (dropped, mirrored, frames, t))
        clean = data.shards.get("video", items).to(device).float()
        # Left and right sound alike, and latents of a mirrored picture are nearly the mirrored ones.
        clean = torch.where(mirrored.view(-1, 1, 1, 1, 1), clean.flip(-1), clean)
        t = t.unsqueeze(1).masked_fill(frames, 0)
        noise = torch.cat([draw_noise(geometry, shared, g, clips=(n,))[0] for g, n in trainer.draws()]).to(device)
        noised, _ = diffusion.noised(clean, noise, t, frames)
        labels = data.labels(items, torch.zeros_like(dropped)).to(device)
        sound = data.shards.get("audio", items).to(device).float() - means[labels]
        guess = module(noised, t, labels.masked_fill(dropped, len(data.classes)))
        return {"loss": (guess - sound).square().mean(), "unheard": sound.square().mean()}

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, held_out=checked)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        save_pipeline(pipe, out)
    return None
