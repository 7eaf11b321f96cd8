"""Turbo adapters that learn on from the clips that they make, held against rendered ones.

    python -m avdit train rollouts --config on.json --out runs/on   # {"pipeline": DIR, "student": DIR of a turbo pack}

Distilled steps see rendered clips that were noised; in sampling each sees what the steps before it made, and all take
something away: clips of a class grow alike, and differ from rendered ones in the same way. Here a batch of clips goes
step by step through the student's own sampling (backward simulation: Yin et al. 2024, arXiv 2405.14867), each at
another place, so that a training step costs no more sampling than the one step that it learns from. Where that leads is
held against rendered clips of the class, which need not be like it in anything else, by means of features (moments.py):
the backbone's, of frames in the noise of the step's end, and ImageNet's, of the last steps as the decoder shows them.

All else is to stay: the less noise there is, the more is the picture held to what the student predicted before, and the
sound, and clips of which something is given, are held to that throughout.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.generate import between
from avdit.geometry import ClipGeometry
from avdit.models.dit import DiT
from avdit.models.noise import draw_noise
from avdit.models.video_codec import VideoCodec
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training.adapters import from_pipeline, geometry_of, sample_sheet
from avdit.training.batches import ClipBatches
from avdit.training.data import TrainingData, training_data
from avdit.training.diffusion import Diffusion, ddim_step, timesteps_of
from avdit.training.moments import FrameMoments
from avdit.training.noised import noise_after
from avdit.training.trainer import Trainer, trainer_config
from avdit.training.turbo import DEFAULTS as TURBO
from avdit.training.turbo import fast

TAKEN = "pipeline", "pack", "clips", "factorized", "moving_weight", "steady_weight", "class_repeats"
CONTEXT = "context_noise", "context_contrast", "context_anchor"
DEFAULTS = {name: TURBO[name] for name in (*TAKEN, *CONTEXT)} | {
    "student": None,  # folder of the turbo pack that learns on
    "noised_weight": 0.2,  # of what leads to the moments of noised frames, as a share of the velocity's own size
    "shown_weight": 0.2,  # the same of what the last steps lead to as the decoder shows it
    "keeping": 0.2,  # share of the training steps that are about clips of which something is given
    "tasks": {"joint": 0.1, "v2a": 0.15, "a2v": 0.15, "image": 0.2, "continuation": 0.4},  # of these
    "train": {
        "steps": 1000,
        "batch_size": 8,
        "learning_rate": 3e-4,
        "optimiser": "muon",
        "weight_decay": 0.0,
        "warmup_steps": 20,
        "ema_decay": 0.99,
        "sample_every": 100,
    },
}
LEAST_KEPT = 0.25  # what the picture's change counts for where there is little but noise
FRAMES = 3  # of each clip that are looked at
SHOWN = 0.375  # share of the clips, those with the least noise, that are shown: of eight steps the last three


@dataclass
class Rollouts:
    """Clips on their way through the steps of a sampler, each at its own place.

    Args:
        times: Timesteps at which its steps begin, (steps,).
        lag: How many steps the sound stays behind the picture. A clip is done with its picture.
        eta: New noise that a step adds.
        alphas: Cumulative shares of signal of the noise schedule, (timesteps,).
        from_first: Whether the first frame is a rendered clip's.
    """

    geometry: ClipGeometry
    times: Tensor
    lag: int
    eta: float
    alphas: Tensor
    from_first: bool
    places: Tensor | None = None  # (B,)
    labels: Tensor | None = None  # (B,)
    video: Tensor | None = None  # (B, F, C, h, w)
    audio: Tensor | None = None  # (B, C, T, f)

    def begin(self, places: Tensor, labels: Tensor, real: Sequence[Tensor], noise: Sequence[Tensor]) -> None:
        """Place the first clips: rendered ones with as much noise as belongs to ``places``.

        Args:
            places: (B,).
            labels: (B,).
            real: Latents of picture (B, F, C, h, w) and sound (B, C, T, f).
            noise: The same.
        """
        self.places, self.labels = places, labels
        self.video, self.audio = (
            alpha.sqrt() * clip + (1 - alpha).sqrt() * new
            for alpha, clip, new in zip(self.shares(places), real, noise, strict=True)
        )
        if self.from_first:
            self.video[:, :1] = real[0][:, :1]

    def times_of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) of picture and sound at ``places``; 0 for a picture that is done."""
        video = torch.cat([self.times, self.times.new_zeros(1)])[places]
        return video, self.times[(places - self.lag).clamp(min=0)]

    def shares(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cumulative shares of signal of picture and sound at ``places``, shaped to broadcast over them."""
        alphas = torch.cat([self.alphas[self.times], self.alphas.new_ones(1)])
        video, audio = alphas[places], alphas[(places - self.lag).clamp(min=0)]
        return video.view(-1, 1, 1, 1, 1), audio.view(-1, 1, 1, 1)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model is shown: noised picture and sound, their timesteps and the classes."""
        video, audio = (t.unsqueeze(1) for t in self.times_of(self.places))
        video = video.repeat(1, self.geometry.frames)
        if self.from_first:
            video[:, 0] = 0
        return self.video, self.audio, video, audio.repeat(1, self.geometry.audio_columns), self.labels

    def led_to(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """The clips that velocities of picture and sound lead to."""
        told = zip((self.video, self.audio), (video, audio), self.shares(self.places), strict=True)
        made = [alpha.sqrt() * x - (1 - alpha).sqrt() * v.float() for x, v, alpha in told]
        if self.from_first:
            made[0] = torch.cat([self.video[:, :1], made[0][:, 1:]], 1)
        return tuple(made)

    def go_on(self, made: Sequence[Tensor], labels: Tensor, real: Tensor, noise: Sequence[Tensor]) -> None:
        """Take a step towards the clips ``made``; what is done gives way to new noise of the class in ``labels``.

        Args:
            made: Picture and sound, as :meth:`led_to` tells them.
            labels: (B,).
            real: Pictures (B, F, C, h, w) of rendered clips of these classes.
            noise: Of picture and sound.
        """
        then = self.places + 1
        over, first = then == len(self.times), self.video[:, :1]
        told = zip((self.video, self.audio), made, self.shares(self.places), self.shares(then), noise, strict=True)
        moved = []
        for x, clean, old, new, fresh in told:
            x = x.where((old == new).expand_as(x), ddim_step(x, clean, old, new, self.eta, fresh))
            moved.append(fresh.where(over.view(-1, *(1,) * (x.ndim - 1)), x))
        self.video, self.audio = moved
        if self.from_first:
            self.video[:, :1] = real[:, :1].where(over.view(-1, 1, 1, 1, 1), first)
        self.places, self.labels = then.masked_fill(over, 0), labels.where(over, self.labels)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the clips are."""
        return {name: getattr(self, name) for name in ("places", "labels", "video", "audio")}

    def load_state_dict(self, told: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` told."""
        for name, value in told.items():
            setattr(self, name, value.to(self.alphas.device))


class RolloutMoments(FrameMoments):
    """Moments of the frames that steps lead to, and beside them the clips that are on their way; saved as one.

    Of several processes the first one's clips are saved; those of others begin anew where a run goes on.

    Args:
        backbone: The frozen one, whose features noised frames are looked at with.
        codec: Shows frames.
        classes: Their number. Each is held apart, and so is each place.
        weights: Of noised and of shown frames, as shares of the velocities' own size.
    """

    def __init__(
        self,
        trainer: Trainer,
        backbone: DiT,
        codec: VideoCodec,
        classes: int,
        weights: Sequence[float],
        clips: Rollouts,
    ) -> None:
        super().__init__(trainer, backbone, codec, classes * len(clips.times), weights)
        self.classes, self.rollouts = classes, clips
        self.parts["rollouts"] = clips

    def __call__(
        self,
        velocities: tuple[Tensor, ...],
        made: Tensor,
        real: Tensor,
        loss: Tensor,
        generator: torch.Generator,
        step: int,
    ) -> dict[str, Tensor]:
        """``loss`` and what leads the moments of both to those of rendered clips, as its gradient.

        Args:
            velocities: Of picture and sound, from which all is computed.
            made: Pictures to which they lead, (B, F, C, h, w).
            real: Pictures of rendered clips of the same classes, alike.
        """
        trainer, clips, number = self.trainer, self.rollouts, len(made)
        drawn = torch.rand(trainer.global_batch, made.shape[1], generator=generator)
        frames = trainer.here(drawn).argsort(1)[:, :FRAMES]
        every = torch.arange(number, device=made.device).unsqueeze(1)
        pair = made[every, frames], real[every, frames]  # (B, FRAMES, C, h, w)
        groups = (clips.places * self.classes + clips.labels).unsqueeze(1).expand(-1, FRAMES)

        def size(rows: Tensor) -> Tensor:
            return velocities[0][rows].square().sum() / velocities[0].numel()

        ends, _ = clips.times_of(clips.places + 1)
        ends = ends.unsqueeze(1).expand(-1, FRAMES)
        levels, noise = noise_after(trainer, ends, pair[0], len(clips.alphas), generator)
        flat = tuple(x.flatten(0, 1) for x in pair)
        judged = groups.flatten(), step, size(every[:, 0])
        loss = self.in_noise(velocities, loss, flat, noise.flatten(0, 1), levels.flatten(), clips.alphas, *judged)
        last = clips.places.argsort(descending=True, stable=True)[: max(1, round(SHOWN * number))]
        flat = tuple(x[last].flatten(0, 1) for x in pair)
        loss = self.as_shown(velocities, loss, flat, groups[last].flatten(), step, size(last))
        return {"loss": loss, **self.apart()}


class Drawn:
    """Rendered clips, drawn at random or of given classes."""

    def __init__(self, data: TrainingData) -> None:
        every = torch.arange(len(data.shards))
        labels = data.labels(every, torch.zeros_like(every, dtype=torch.bool)).cpu()
        self.data, self.known = data, labels  # the class of each clip
        self.items = [every[labels == k] for k in range(len(data.classes))]

    def labels(self, trainer: Trainer, generator: torch.Generator) -> Tensor:
        """Classes (B,) of this process's rows, each as often as the data have it."""
        return trainer.here(self.known[torch.randint(len(self.known), (trainer.global_batch,), generator=generator)])

    def clips(self, labels: Tensor, trainer: Trainer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (B, F, C, h, w) and sounds (B, C, T, f) of clips of the classes ``labels`` (B,)."""
        chance = trainer.mine(torch.rand(trainer.global_batch, generator=generator)).tolist()
        of_class = (self.items[label] for label in labels.tolist())
        items = torch.stack([items[int(u * len(items))] for u, items in zip(chance, of_class, strict=True)])
        shards, device = self.data.shards, trainer.accelerator.device
        return tuple(shards.get(kind, items).to(device).float() for kind in ("video", "audio"))


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train a turbo pack on, and save it in ``out``/pack; a dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for a pipeline or a turbo pack that cannot be used, a number that is out of range, or parts of a
            batch that are accumulated.
    """
    config = {**DEFAULTS, **config}
    for name in ("noised_weight", "shown_weight"):
        between(config[name], name, 0, 10)
    between(config["keeping"], "keeping", 0, 1)
    config, classes, scheduler = from_pipeline(config)
    if scheduler.config.prediction_type != "v_prediction":
        raise ValueError("few steps are taught to a model that predicts the velocity")
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    if settings.accumulation > 1:
        raise ValueError("rollouts learn from whole batches: leave accumulation at 1")
    geometry = geometry_of(config)
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"])
    model = pipe.transformer
    if not config["student"]:
        raise ValueError("rollouts go on from a turbo pack: name its folder as student")
    pack = Pack.load(Path(config["student"]), lambda _: model.adapter_state_dict())
    if pack.steps is None:
        raise ValueError(f"student {config['student']} is no turbo pack")
    if pack.classes != classes:
        raise ValueError(f"student {config['student']} has other classes than the pipeline")
    data = training_data(config, out, geometry, classes, dry_run).repeated(config["class_repeats"])
    torch.manual_seed(settings.seed)
    model.load_adapter_state_dict(pack.state)
    model.freeze_backbone()
    model.class_embedder.requires_grad_(False)
    master = copy.deepcopy(model, {id(model.backbone): model.backbone}).requires_grad_(False)
    scheduler.set_timesteps(pack.steps)
    lag = round(pack.audio_lag * pack.steps)
    drawn = Drawn(data)

    def noise() -> tuple[Tensor, Tensor]:
        """Of picture and sound, this process's rows."""
        parts = [draw_noise(geometry, model.config.shared_noise, g, clips=(n,)) for g, n in trainer.draws()]
        return tuple(torch.cat(part).to(trainer.accelerator.device) for part in zip(*parts, strict=True))

    def kept(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """The error of rendered clips, of which the tasks give some, against what was predicted of them before."""
        batch = batches.draw(generator)
        batch = batch.behind(diffusion.alphas, torch.full_like(batch.labels, pack.audio_lag, dtype=torch.float))
        with trainer.accelerator.autocast(), torch.no_grad():
            wanted = [v.float() for v in begun(*batch.inputs)]
        video, audio = module(*batch.inputs)
        return {"loss": batch.video_error(video, wanted[0]) + batch.audio_error(audio, wanted[1])}

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        if torch.rand((), generator=generator) < config["keeping"]:
            return kept(module, generator)
        labels = drawn.labels(trainer, generator)
        if rollouts.places is None:
            places = trainer.here(torch.arange(trainer.global_batch) % pack.steps)
            rollouts.begin(places, labels, drawn.clips(labels, trainer, generator), noise())
        real, _ = drawn.clips(rollouts.labels, trainer, generator)
        with trainer.accelerator.autocast(), torch.no_grad():
            wanted = [v.float() for v in begun(*rollouts.inputs)]
        velocities = [v.float() for v in module(*rollouts.inputs)]
        made = rollouts.led_to(*velocities)
        clear = rollouts.shares(rollouts.places)[0].clamp(min=LEAST_KEPT)
        errors = [(v - w).square() for v, w in zip(velocities, wanted, strict=True)]
        terms = {"video": (clear * errors[0]).mean(), "audio": errors[1].mean()}
        told = trainer.beside(tuple(velocities), made[0], real, sum(terms.values()), generator, step)
        first = drawn.clips(labels, trainer, generator)[0] if rollouts.from_first else real
        rollouts.go_on([clip.detach() for clip in made], labels, first, noise())
        return {**told, **{name: term.detach() for name, term in terms.items()}}

    def sheet(path: Path) -> None:
        unguided = {"guidance_scale": 1.0, "joint_guidance_scale": 1.0, "eta": pack.eta, "audio_lag": pack.audio_lag}
        sample_sheet(model, data, scheduler, config, path, num_inference_steps=pack.steps, **unguided)

    trainer = Trainer(model, loss, settings, out, sheet)
    begun, diffusion = fast(master, trainer), Diffusion(scheduler, trainer.accelerator.device)
    batches = ClipBatches.configured(
        config,
        data,
        diffusion,
        trainer,
        dropout=0.0,
        timesteps=partial(timesteps_of, scheduler.timesteps),
        shared_noise=model.config.shared_noise,
    )
    times = scheduler.timesteps.to(diffusion.alphas.device)
    rollouts = Rollouts(geometry, times, lag, pack.eta, diffusion.alphas, config["factorized"])
    weights = config["noised_weight"], config["shown_weight"]
    parts = model.backbone, data.video_codec, len(data.classes)
    trainer.beside = RolloutMoments(trainer, *parts, weights, rollouts)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        state = {name: value.to(torch.bfloat16) for name, value in model.adapter_state_dict().items()}
        replace(pack, state=state, compact=False).save(Path(out) / "pack")
    return None
