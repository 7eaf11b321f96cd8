"""Batches of noised clips for the stages that train adapters, with what each task gives clean."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avdit.geometry import ClipGeometry
from avdit.models.noise import draw_noise
from avdit.training.data import TrainingData
from avdit.training.diffusion import Diffusion, ddim_step, masked_error, moving_weight
from avdit.training.trainer import Trainer


def given_parts(
    tasks: dict[str, float],
    number: int,
    geometry: ClipGeometry,
    generator: torch.Generator,
    factorized: bool = False,
) -> tuple[Tensor, Tensor]:
    """What each of ``number`` clips is given: frames (number, F) and audio columns (number, M), bool.

    A picture for a sound has its first frame, too, where clips are ``factorized``: the pipeline makes that one first.
    """
    names = list(tasks)
    weights = torch.tensor([tasks[name] for name in names])
    frames = torch.zeros(number, geometry.frames, dtype=torch.bool)
    columns = torch.zeros(number, geometry.audio_columns, dtype=torch.bool)
    for i, choice in enumerate(torch.multinomial(weights, number, True, generator=generator).tolist()):
        match names[choice]:
            case "v2a":
                frames[i] = True
            case "a2v":
                columns[i] = True
                frames[i, 0] = factorized
            case "image":
                frames[i, 0] = True
            case "continuation":
                count = int(torch.randint(2, geometry.frames * 3 // 4, (), generator=generator))
                frames[i, :count] = True
                columns[i, : geometry.columns_of(count)] = True
    return frames, columns


@dataclass
class ClipBatch:
    """One process's noised clips; ``video`` (B, F, C, h, w) and ``audio`` (B, C, T, f), each with its target.

    ``given_video`` (B, F, 1, 1, 1) and ``given_audio`` (B, 1, T, 1) tell what is given; ``share_video`` and
    ``share_audio`` what the sums of errors are divided by (see :func:`masked_error`). ``weight_video`` (B, 1, 1, h, w)
    is what the error of each cell counts for, ``steady`` what its change from frame to frame counts for beside it.
    """

    video: Tensor
    audio: Tensor
    video_target: Tensor
    audio_target: Tensor
    t_video: Tensor
    t_audio: Tensor
    labels: Tensor
    given_video: Tensor
    given_audio: Tensor
    weight_video: Tensor
    share_video: float
    share_audio: float
    steady: float = 0.0

    def to(self, device: torch.device) -> "ClipBatch":
        values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return ClipBatch(**values)

    def rows(self, chosen: Tensor) -> "ClipBatch":
        """Those clips alone of which ``chosen`` (B,) is true."""
        return ClipBatch(**{k: v[chosen] if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def replaced(self, chosen: Tensor, others: "ClipBatch") -> "ClipBatch":
        """These clips, but those of which ``chosen`` (B,) is true as they are in ``others``."""
        told = zip(vars(self).items(), vars(others).values(), strict=True)
        return ClipBatch(**{k: v.index_put((chosen,), new) if isinstance(v, Tensor) else v for (k, v), new in told})

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model is shown: noised picture and sound, their timesteps and the classes."""
        return self.video, self.audio, self.t_video, self.t_audio, self.labels

    @property
    def given_frames(self) -> Tensor:
        """Which frames are given, (B, F) bool."""
        return self.given_video.flatten(1)

    @property
    def given_columns(self) -> Tensor:
        """Which audio columns are given, (B, M) bool."""
        return self.given_audio.flatten(1).unflatten(1, (self.t_audio.shape[1], -1))[..., 0]

    def clips(self, alphas: Tensor, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """The clips that velocities of picture and sound lead to from the noised ones.

        Args:
            alphas: Cumulative shares of signal of the noise schedule, (timesteps,).
        """
        moved = zip((self.video, self.audio), (video, audio), self.shares(alphas), strict=True)
        return tuple(alpha.sqrt() * x - (1 - alpha).sqrt() * v.float() for x, v, alpha in moved)

    def shares(self, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Cumulative share of signal of each frame, (B, F, 1, 1, 1), and of each step of the sound, (B, 1, T, 1)."""
        patch = self.audio.shape[2] // self.t_audio.shape[1]
        t_audio = self.t_audio.repeat_interleave(patch, 1)
        return alphas[self.t_video][..., None, None, None], alphas[t_audio][:, None, :, None]

    def stepped(
        self, alphas: Tensor, video: Tensor, audio: Tensor, ends: Tensor, eta: float, noise: tuple[Tensor, Tensor]
    ) -> "ClipBatch":
        """These clips after one step of DDIM by predicted velocities, to be led to the same ends as before.

        Args:
            alphas: As for :meth:`clips`.
            ends: Timesteps (B,) to step to. A clip stays where something that is not given has less noise already.
            eta: New noise that the step adds, as the pipeline's.
            noise: That noise of picture and sound.
        """
        ends, given = ends.unsqueeze(1), (self.given_frames, self.given_columns)
        pairs = list(zip((self.t_video, self.t_audio), given, strict=True))
        moves = torch.stack([(part | (ends < t)).all(1) for t, part in pairs]).all(0).unsqueeze(1)
        times = [ends.where(moves & ~part, t) for t, part in pairs]
        after = replace(self, t_video=times[0], t_audio=times[1])
        real = self.clips(alphas, self.video_target, self.audio_target)
        made = self.clips(alphas, video, audio)
        out = []
        for x, clean, wanted, target, fresh, old, new in zip(
            (self.video, self.audio),
            made,
            real,
            (self.video_target, self.audio_target),
            noise,
            self.shares(alphas),
            after.shares(alphas),
            strict=True,
        ):
            stays = (new == old).expand_as(x)
            state = x.where(stays, ddim_step(x, clean, old, new, eta, fresh))
            out.append((state, target.where(stays, (new.sqrt() * state - wanted) / (1 - new).sqrt())))
        (video, video_target), (audio, audio_target) = out
        return replace(after, video=video, audio=audio, video_target=video_target, audio_target=audio_target)

    def behind(self, alphas: Tensor, lag: Tensor, times: Tensor | None = None) -> "ClipBatch":
        """These clips with more of their own noise in their sounds, but for those of which one modality is given.

        Args:
            alphas: As for :meth:`clips`.
            lag: How much more for each clip, as shares (B,) of the schedule.
            times: Those timesteps (n,) alone that a sound may come to, of which it has the nearest.
        """
        moves = ~(self.given_frames.all(1) | self.given_columns.all(1)).unsqueeze(1) & ~self.given_columns
        later = self.t_audio + (lag * len(alphas)).round().long().unsqueeze(1)
        if times is not None:
            later = times[(later.unsqueeze(-1) - times).abs().argmin(-1)]
        late = replace(self, t_audio=later.clamp(max=len(alphas) - 1).where(moves, self.t_audio))
        old, new = (each.shares(alphas)[1] for each in (self, late))
        _, clean = self.clips(alphas, self.video_target, self.audio_target)
        noise = (1 - old).sqrt() * self.audio + old.sqrt() * self.audio_target
        audio, target = new.sqrt() * clean + (1 - new).sqrt() * noise, new.sqrt() * noise - (1 - new).sqrt() * clean
        stays = (new == old).expand_as(audio)
        return replace(late, audio=self.audio.where(stays, audio), audio_target=self.audio_target.where(stays, target))

    def finished(self, alphas: Tensor) -> "ClipBatch":
        """These clips with their picture without noise, but for those whose sound is given: these are for the picture.

        Args:
            alphas: As for :meth:`clips`.
        """
        made = ~(self.given_columns.all(1, keepdim=True) | self.given_frames)
        video, _ = self.clips(alphas, self.video_target, self.audio_target)
        return replace(
            self,
            video=video.where(made[..., None, None, None], self.video),
            t_video=self.t_video.masked_fill(made, 0),
        )

    def video_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the frames that were noised, its cells weighted, and of how it changes between them."""
        counted = ~self.given_video
        error = masked_error(predicted, target, counted * self.weight_video, self.share_video)
        if not self.steady:
            return error
        wrong = (predicted - target) * counted
        return error + self.steady * masked_error(wrong[:, 1:], wrong[:, :-1], self.weight_video, self.share_video)

    def audio_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the sound that was noised."""
        return masked_error(predicted, target, ~self.given_audio, self.share_audio)


@dataclass
class ClipBatches:
    """Draws the batches of a stage.

    Args:
        tasks: Weight of each task (see :func:`given_parts`).
        dropout: Share of clips whose class is left out.
        timesteps: Draws the timesteps of a whole batch, (n,), from a generator.
        shared_noise: That of the model.
        moving: Most that a cell's error counts for (see :func:`moving_weight`); 1: all count alike.
        steady: What the error of how each frame differs from the next counts for beside that of the frames. Most of a
            frame's error is the whole clip's, such as where a dancer stands, and cannot be known; what the frames do
            not have in common is small beside it, but is all that is seen of a pose that is held (as MotionDirector,
            Zhao et al. 2023, arXiv 2310.08465, takes looks out of its temporal loss). What is best stays the same.
        context_noise: Most noise, as a share of the schedule, of what continuations are given. Each clip has its own
            timestep there, which the model is told (as in diffusion forcing, Chen et al. 2024, arXiv 2407.01392), so
            that a stream can distrust its own last window.
        context_contrast: Most by which the logarithm of the contrast of the pictures that continuations are given is
            changed, up or down, while what follows has its own. So a stream whose windows come out a little too strong,
            each the next one's example, is led back.
        context_anchor: Share of the continuations whose first frame is one from elsewhere in the clip, as it is in a
            stream, whose windows all look back to the first frame of its scene.

    Raises:
        ValueError: for a weight below 1, a share that is not from 0 to 1, or a change below 0.
    """

    data: TrainingData
    geometry: ClipGeometry
    diffusion: Diffusion
    trainer: Trainer
    tasks: dict[str, float]
    dropout: float
    timesteps: Callable[[torch.Generator, int], Tensor]
    shared_noise: float
    moving: float = 1.0
    steady: float = 0.0
    context_noise: float = 0.0
    context_contrast: float = 0.0
    context_anchor: float = 0.0
    factorized: bool = False

    @classmethod
    def configured(cls, config: dict[str, Any], data: TrainingData, *args: Any, **kwargs: Any) -> "ClipBatches":
        """With the tasks, weights and contexts of a stage's configuration; the other arguments are as above."""
        return cls(
            data,
            data.geometry,
            *args,
            tasks=config["tasks"],
            moving=config["moving_weight"],
            steady=config["steady_weight"],
            factorized=config["factorized"],
            **{name: config[name] for name in ("context_noise", "context_contrast", "context_anchor")},
            **kwargs,
        )

    def __post_init__(self) -> None:
        if not self.moving >= 1:
            raise ValueError(f"moving_weight {self.moving!r} must be 1 or more")
        for name in ("context_noise", "context_anchor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)!r} must be from 0 to 1")
        for name, value in (("context_contrast", self.context_contrast), ("steady_weight", self.steady)):
            if not value >= 0:
                raise ValueError(f"{name} {value!r} must be 0 or more")

    def draw(self, generator: torch.Generator) -> ClipBatch:
        """This process's rows of the next batch, on its device."""
        trainer, geometry, shards = self.trainer, self.geometry, self.data.shards
        number = trainer.global_batch
        items = torch.randint(len(shards), (number,), generator=generator)
        dropped = torch.rand(number, generator=generator) < self.dropout
        frames, columns = given_parts(self.tasks, number, geometry, generator, self.factorized)
        t = self.timesteps(generator, number)
        continued = frames.any(1) & columns.any(1) & ~columns.all(1)
        most = round(self.context_noise * (len(self.diffusion.alphas) - 1))
        context = torch.randint(most + 1, (number,), generator=generator) * continued
        gain = (self.context_contrast * (2 * torch.rand(number, generator=generator) - 1) * continued).exp()
        looks_back = (torch.rand(number, generator=generator) < self.context_anchor) & continued
        anchor = torch.randint(geometry.frames, (number,), generator=generator) * looks_back
        # What is noised in the whole batch, so that a part in which much is given does not count for more.
        noised_frames, noised_columns = int((~frames).sum()), int((~columns).sum())
        items, device = trainer.mine(items), trainer.accelerator.device
        drawn = dropped, frames, columns, t, context, gain, anchor
        dropped, frames, columns, t, context, gain, anchor = map(trainer.here, drawn)
        video = shards.get("video", items).to(device).float()
        # The audio latent's time axis leads, so that it lines up with its timesteps.
        sound = shards.get("audio", items).to(device).float().transpose(1, 2)
        t, context = t.unsqueeze(1), context.unsqueeze(1)
        t_video, t_audio = context.where(frames, t), context.where(columns, t)
        patch = geometry.audio_patch[0]
        rows = columns.repeat_interleave(patch, 1)
        noise = [draw_noise(geometry, self.shared_noise, g, clips=(n,)) for g, n in trainer.draws()]
        weight = moving_weight(video, self.moving).unsqueeze(1)
        mean, gain = video.mean((1, 3, 4), keepdim=True), gain.view(-1, 1, 1, 1, 1)
        shown = torch.where(frames[..., None, None, None], mean + gain * (video - mean), video)
        # Where a frame from elsewhere comes first it has its own contrast, as a stream's first one has.
        elsewhere = video[torch.arange(len(video), device=device), anchor]
        shown[:, 0] = torch.where((anchor > 0).view(-1, 1, 1, 1), elsewhere, shown[:, 0])
        noised_video, video_target = self.diffusion.noised(
            shown, torch.cat([v for v, _ in noise]).to(device), t_video, frames & (context == 0)
        )
        noised_sound, sound_target = self.diffusion.noised(
            sound,
            torch.cat([a for _, a in noise]).to(device).transpose(1, 2),
            t_audio.repeat_interleave(patch, 1),
            rows & (context == 0),
        )
        frame_size = math.prod(geometry.video_latent_shape)
        column_size = math.prod(geometry.audio_latent_shape) // geometry.audio_columns
        return ClipBatch(
            video=noised_video,
            audio=noised_sound.transpose(1, 2),
            video_target=video_target,
            audio_target=sound_target.transpose(1, 2),
            t_video=t_video,
            t_audio=t_audio,
            labels=self.data.labels(items, dropped),
            given_video=frames[..., None, None, None],
            given_audio=rows[:, None, :, None],
            weight_video=weight,
            share_video=noised_frames * frame_size / trainer.parts,
            share_audio=noised_columns * column_size / trainer.parts,
            steady=self.steady,
        ).to(trainer.accelerator.device)
