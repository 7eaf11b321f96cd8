"""First frames in few steps without guidance, learned beside an adversary: what a pack's updates for images make.

    python -m avdit train frames --config frames.json --out runs/frames   # {"pipeline": DIR, "pack": "dance"}

Where the first frame of a clip is made alone, all that follows has its faults: a third arm stays. Here an adversary
(noised.py) says what each of a few steps may lead to. The updates for images alone train. The less noise there is, the
more are they held to what they predicted before.

``"openings": ["explosion"]`` names classes whose clips begin as they do not go on.

``"shown_weight": 0.5`` adds another one for the last steps, which make what is fine: it judges their images as the
decoder shows them (pictures.py).

``"moments": true`` has neither: what many of the images have in common is led to what rendered ones have (moments.py).
"""

import copy
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.generate import between, whole
from avdit.models.dit import DiT
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline
from avdit.training.adapters import from_pipeline, geometry_of, save_pipeline
from avdit.training.adversary import Led, Together
from avdit.training.data import TrainingData, training_data
from avdit.training.images import Images, give_updates
from avdit.training.moments import FrameMoments
from avdit.training.noised import NoisedAdversary, noise_after
from avdit.training.pictures import ImageAdversary
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "pipeline": "runs/adapters/pipeline",  # pipeline folder of one pack
    "pack": "landscape",
    "clips": 160,  # rendered clips a class
    "factorized": None,  # as the pipeline
    "image_rank": 0,  # of the updates for images, which may rise; 0: as the pipeline
    "steps": 8,
    "adversarial_weight": 0.5,  # as a share of the velocity's own size
    "shown_weight": 0.0,  # the same of another one, which judges what the last steps lead to as the decoder shows it
    "moments": False,  # lead to both in place of adversaries, with the same weights (see StepMoments)
    "class_repeats": {},
    "openings": [],  # classes of whose clips the first frame alone is learned, as something is yet to happen in it
    "train": {
        "steps": 4000,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "optimiser": "muon",
        "weight_decay": 0.0,
        "ema_decay": 0.99,
        "warmup_steps": 20,
        "sample_every": 200,
    },
}
ADVERSARY_WARMUP = 30  # steps in which its weight rises
SHOWN_MOST = 0.4  # most noise, as a share of the schedule, from which a step's images are shown
SHOWN_DRAWS = 0.75  # share of the training steps that are about these, where they are


class FrameAdversaries(Together):
    """The adversary of noised frames and, where there is one, that of shown ones; saved as one.

    Args:
        times: Timesteps at which the steps begin.
        late: Places among them from which images are shown.
    """

    def __init__(
        self, noised: NoisedAdversary, shown: ImageAdversary | None, times: Sequence[int], late: Collection[int]
    ) -> None:
        self.ends, self.late = [*times[1:], 0], late
        self.parts = {"noised": noised, **({"shown": shown} if shown else {})}

    def __call__(self, led: Led, place: int, loss: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """What both make of ``loss``, the latter where the step at ``place`` is a late one."""
        told = self.parts["noised"](led, self.ends[place], loss, generator, step)
        if place not in self.late or "shown" not in self.parts:
            return told
        shown = self.parts["shown"](led, told["loss"], generator, step)
        return {"loss": shown["loss"], "told": told["told"], "told_shown": shown["told"]}


class StepMoments(FrameMoments):
    """Moments of the images that steps lead to (moments.py) in place of adversaries; each class and place is apart.

    Args:
        backbone, codec, weights: As those of :class:`FrameMoments`.
        classes: Their number.
        alphas: Cumulative shares of signal of the noise schedule, (timesteps,).
        times, late: As those of :class:`FrameAdversaries`.
    """

    def __init__(
        self,
        trainer: Trainer,
        backbone: DiT,
        codec: VideoCodec,
        classes: int,
        weights: Sequence[float],
        alphas: Tensor,
        times: Sequence[int],
        late: Collection[int],
    ) -> None:
        super().__init__(trainer, backbone, codec, classes * len(times), weights)
        self.classes, self.alphas, self.ends, self.late = classes, alphas, [*times[1:], 0], late

    def __call__(self, led: Led, place: int, loss: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """``loss`` and what leads the moments of images made to those of rendered ones, as its gradient."""
        outputs, pair, groups = (led.velocity,), (led.made, led.real), place * self.classes + led.labels
        judged, ends = (groups, step, led.velocity.square().mean()), torch.full_like(led.labels, self.ends[place])
        levels, noise = noise_after(self.trainer, ends, led.real, len(self.alphas), generator)
        loss = self.in_noise(outputs, loss, pair, noise, levels, self.alphas, *judged)
        if place in self.late and self.weights[1]:
            loss = self.as_shown(outputs, loss, pair, *judged)
        return {"loss": loss, **self.apart()}


def drawn_frames(
    data: TrainingData, trainer: Trainer, generator: torch.Generator, openings: Tensor
) -> tuple[Tensor, Tensor]:
    """This process's frames (N, C, h, w) of clips of ``data``, and their classes (N,).

    Args:
        openings: Classes (n,) of which there are first frames alone.
    """
    number, device = trainer.global_batch, trainer.accelerator.device
    items = trainer.mine(torch.randint(len(data.shards), (number,), generator=generator))
    frames = trainer.here(torch.randint(data.geometry.frames, (number,), generator=generator))
    clips = data.shards.get("video", items).to(device).float()
    labels = data.labels(items, torch.zeros(len(items), dtype=torch.bool))
    frames = frames.masked_fill(torch.isin(labels, openings).to(device), 0)
    return clips[torch.arange(len(clips), device=device), frames], labels.to(device)


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train what a pipeline's pack makes first frames with, and save that pipeline with it in ``out``/pipeline.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: where nothing would train, the pipeline predicts no velocity or has updates of a higher rank, or a
            number is out of range.
    """
    config = {**DEFAULTS, **config}
    whole(config["steps"], "steps", 1, 1000)
    for name in ("adversarial_weight", "shown_weight"):
        between(config[name], name, 0, 10)
    config, classes, scheduler = from_pipeline(config)
    if scheduler.config.prediction_type != "v_prediction":
        raise ValueError("few steps are taught to a model that predicts the velocity")
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    torch.manual_seed(settings.seed)
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"])
    give_updates(pipe, config["image_rank"])
    if not pipe.transformer.config.image_rank:
        raise ValueError("the pipeline has no updates for images: give image_rank")
    for name in config["openings"]:
        if name not in classes:
            raise ValueError(f"openings of {name!r}: choose from {', '.join(classes)}")
    openings = torch.tensor([classes.index(name) for name in config["openings"]], dtype=torch.long)
    data = training_data(config, out, geometry_of(config), classes, dry_run).repeated(config["class_repeats"])
    model = Images(pipe.transformer.requires_grad_(False))
    begun = copy.deepcopy(model).to(processes().device)
    model.model.image_parts().requires_grad_(True)
    scheduler.set_timesteps(config["steps"])
    times = scheduler.timesteps.tolist()
    last = [place for place, time in enumerate(times) if time <= SHOWN_MOST * times[0]]
    pipe.register_modules(video_codec=data.video_codec)
    pipe.set_facts(image_steps=config["steps"])

    def led_to(module: nn.Module, state: Tensor, time: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity at ``state`` (N, C, h, w) and the images that it leads to."""
        velocity = module(state, torch.full_like(labels, time), labels).float()
        alpha = alphas[time]
        return velocity, alpha.sqrt() * state - (1 - alpha).sqrt() * velocity

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        real, labels = drawn_frames(data, trainer, generator, openings)
        place = int(torch.randint(config["steps"], (), generator=generator))
        if config["shown_weight"] and last and torch.rand((), generator=generator) < SHOWN_DRAWS:
            place = last[place % len(last)]
        rows = trainer.draws()

        def noise() -> Tensor:
            return torch.cat([torch.randn(n, *real.shape[1:], generator=g, device=g.device) for g, n in rows]).to(real)

        with trainer.accelerator.autocast():
            state = noise()
            with torch.no_grad():
                for now, then in pairwise(times[: place + 1]):
                    made = led_to(trainer.raw, state, now, labels)[1]
                    state = alphas[then].sqrt() * made + (1 - alphas[then]).sqrt() * noise()
                held, _ = led_to(begun, state, times[place], labels)
            velocity, made = led_to(module, state, times[place], labels)
        kept = alphas[times[place]] * (velocity - held).square().mean()
        told = trainer.beside(Led(velocity, made, real, labels), place, kept, generator, step)
        return {**told, "kept": kept.detach()}

    def sheet(path: Path) -> None:
        model.eval()
        classes = torch.arange(len(data.classes), device=alphas.device).repeat(4)
        latents = pipe.first_frame(classes, torch.Generator().manual_seed(0))
        save_png(image_grid(pipe.video_codec.decode(latents)[:, 0] / 2 + 0.5, len(data.classes)), path)
        model.train()

    trainer = Trainer(model, loss, settings, out, sheet)
    alphas = scheduler.alphas_cumprod.to(trainer.accelerator.device)
    count = len(data.classes)
    weights = config["adversarial_weight"], config["shown_weight"]
    if config["moments"]:
        frozen = begun.model.backbone, data.video_codec
        trainer.beside = StepMoments(trainer, *frozen, count, weights, alphas, times, last)
    else:
        noised = NoisedAdversary(trainer, begun.model.backbone, count, alphas, weights[0], ADVERSARY_WARMUP)
        shown = ImageAdversary(trainer, data.video_codec, count, weights[1], ADVERSARY_WARMUP) if weights[1] else None
        trainer.beside = FrameAdversaries(noised, shown, times, last)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        save_pipeline(pipe, out)
    return None
