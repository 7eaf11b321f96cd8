"""Adversaries: small networks that tell the real from the made, first of all for few-step adapters.

What a student of few steps is asked for at high noise has more than one answer, and a squared error is content with
their mean: pictures that are soft and motion that drifts. An adversary is content with any answer that might be a real
clip's (adversarial diffusion distillation: Sauer et al. 2023, arXiv 2311.17042; in latents: 2024, arXiv 2403.12015).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from avdit.geometry import ClipGeometry
from avdit.training.batches import ClipBatch
from avdit.training.trainer import Trainer

WIDTHS = 96, 192, 256  # channels of the discriminator's stages
LEARNING_RATE = 5e-4
BLUR = 0.1  # deviation of the noise to which verdicts must be blind; what is judged has one of about 1
PENALTY = 1.0  # of verdicts that change by that noise


class Discriminator(nn.Module):
    """Verdicts on clips of latents, picture and sound together, of every place at three scales.

    Args:
        num_classes: Classes; one more stands for none.
    """

    def __init__(self, geometry: ClipGeometry, num_classes: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        channels, bands = geometry.audio_channels, geometry.audio_latent_shape[-1]
        first = widths[0]
        self.stem = nn.Conv3d(geometry.video_channels, first, 3, (1, 2, 2), 1)
        self.sound = nn.Sequential(
            nn.Conv1d(channels * bands, first, 3, 1, 1), nn.SiLU(), nn.Conv1d(first, first, 3, 1, 1)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv3d(a, b, 3, 2, 1), nn.SiLU(), nn.Conv3d(b, b, 3, 1, 1))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.heads = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Conv3d(w, w, 1), nn.SiLU()) for w in widths)
        self.places = nn.ModuleList(nn.Conv3d(w, 1, 1) for w in widths)
        # A verdict leans on the class by a product (Miyato & Koyama 2018, arXiv 1802.05637).
        self.classes = nn.ModuleList(nn.Embedding(num_classes + 1, w) for w in widths)
        for table in self.classes:
            nn.init.zeros_(table.weight)

    def forward(self, video: Tensor, audio: Tensor, labels: Tensor) -> list[Tensor]:
        """Verdicts (B, places) at every scale, high for real clips.

        Args:
            video: (B, F, C, h, w).
            audio: (B, C, T, f).
            labels: (B,).
        """
        x = self.stem(video.transpose(1, 2))
        sound = self.sound(audio.transpose(2, 3).flatten(1, 2))
        x = x + F.interpolate(sound, x.shape[2])[..., None, None]  # what is heard at the time of each frame
        found = []
        for i, (head, place, table) in enumerate(zip(self.heads, self.places, self.classes, strict=True)):
            x = self.stages[i - 1](x) if i else x
            seen = head(x)
            found.append((place(seen)[:, 0] + by_class(seen, table(labels))).flatten(1).float())
        return found


def by_class(seen: Tensor, classes: Tensor) -> Tensor:
    """What classes (B, C) add to the verdicts on features (B, C, ...) of every place, (B, ...)."""
    return (seen * classes.view(*classes.shape, *(1,) * (seen.ndim - 2))).sum(1) / seen.shape[1] ** 0.5


class Led(NamedTuple):
    """Images to which a step of a student leads, and such as they should be like."""

    velocity: Tensor  # from which alone all losses of the step are computed, (N, C, h, w)
    made: Tensor  # latents of the images that it leads to, (N, C, h, w)
    real: Tensor  # latents of frames of rendered clips, (N, C, h, w)
    labels: Tensor  # classes of both, (N,)


class Adversary:
    """A discriminator that learns beside what it judges, and what it adds to the loss of that.

    What is made is judged against the real thing that it stands for (Jolicoeur-Martineau 2018, arXiv 1807.00734).
    Verdicts on both are held smooth by noise (Lin et al. 2025, arXiv 2501.08316), without which so few clips would soon
    be known by heart.

    Args:
        trainer: Of what is judged. Its processes all have one discriminator, which takes a step with each part of a
            batch.
        discriminator: Called with tensors (n, ...) and what it is told of them, (n,); gives verdicts (n, places) at
            several scales, high for what is real.
        weight: Size of the gradient that it adds, as a share of what is there without it.
        warmup: Steps in which its weight rises from nothing, while the discriminator learns to judge.
    """

    def __init__(self, trainer: Trainer, discriminator: nn.Module, weight: float, warmup: int) -> None:
        self.trainer, self.accelerator = trainer, trainer.accelerator
        self.discriminator = discriminator.to(self.accelerator.device)
        self.optimiser = torch.optim.AdamW(
            self.discriminator.parameters(), LEARNING_RATE, betas=(0.0, 0.99), weight_decay=0.0
        )
        self.weight, self.warmup = weight, warmup

    def learn(
        self,
        real: tuple[Tensor, ...],
        made: tuple[Tensor, ...],
        told: tuple[Tensor, ...],
        generator: torch.Generator,
    ) -> Tensor:
        """One step of the discriminator; returns the share of places at which it knew the real one of a pair."""
        # Each row has its own generator, so that its noise does not depend on the process that it falls to.
        number, share = len(real[0]), self.trainer.rows.start // self.trainer.config.batch_size
        seeds = torch.randint(1 << 31, (self.trainer.parts, number), generator=generator)[share]
        rows = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        blurred = [
            x + BLUR * torch.stack([torch.randn(x.shape[1:], generator=row) for row in rows]).to(x.device)
            for x in (*real, *made)
        ]
        given = (*real, *made, *blurred)
        inputs = [torch.cat(given[i :: len(real)]) for i in range(len(real))]
        with self.accelerator.autocast():
            found = [one.chunk(4) for one in self.discriminator(*inputs, *(x.repeat(4) for x in told))]
        better = [r - m for r, m, *_ in found]
        drift = [torch.cat([r - r_blurred, m - m_blurred]) / BLUR for r, m, r_blurred, m_blurred in found]
        loss = sum(F.softplus(-b).mean() + PENALTY * d.square().mean() for b, d in zip(better, drift, strict=True))
        self.optimiser.zero_grad()
        loss.backward()
        for parameter in self.discriminator.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.optimiser.step()
        return torch.stack([(b > 0).float().mean() for b in better]).mean()

    def judged(
        self,
        outputs: tuple[Tensor, ...],
        real: tuple[Tensor, ...],
        made: tuple[Tensor, ...],
        told: tuple[Tensor, ...],
        loss: Tensor,
        generator: torch.Generator,
        step: int,
        measure: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Let the discriminator learn, then say what it makes of ``loss``.

        Args:
            outputs: From which alone ``loss`` and ``made`` were computed; their gradient is what is added to.
            measure: Another loss of these, of whose gradient the adversary's is a share; none: of that of ``loss``.

        Returns:
            ``loss``, whose gradient now has the adversary's beside its own, and ``told``, the share of places at which
            the discriminator knew the real one.
        """
        share = self.learn(real, tuple(x.detach() for x in made), told, generator)
        with torch.no_grad(), self.accelerator.autocast():
            known = self.discriminator(*real, *told)
        with self.accelerator.autocast():
            found = self.discriminator(*made, *told)
        wrong = sum(F.softplus(k - j).mean() for k, j in zip(known, found, strict=True))
        weight = self.weight * min(1.0, step / max(self.warmup, 1))
        return {"loss": pulled(self.accelerator, outputs, loss, wrong, weight, measure), "told": share}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and what the optimiser knows of them, as flat tensors."""
        told = {f"weight.{name}": value for name, value in self.discriminator.state_dict().items()}
        for name, parameter in self.discriminator.named_parameters():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                told[f"{key}.{name}"] = value
        return told

    def load_state_dict(self, told: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` told."""
        weights = {k.removeprefix("weight."): v for k, v in told.items() if k.startswith("weight.")}
        self.discriminator.load_state_dict(weights)
        for name, parameter in self.discriminator.named_parameters():
            kept = {key: told[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in told}
            if kept:
                self.optimiser.state[parameter] = kept


def pulled(
    accelerator: Accelerator,
    outputs: tuple[Tensor, ...],
    loss: Tensor,
    wrong: Tensor,
    weight: float,
    measure: Tensor | None = None,
) -> Tensor:
    """``loss``, whose gradient has beside its own that of ``wrong``, of the size ``weight`` of that of ``measure``.

    Args:
        outputs: From which alone all three were computed.
        wrong: What a judge finds wrong with them.
        measure: None: ``loss``.
    """
    # What all make of the outputs is all that the model behind them needs to know.
    owns = torch.autograd.grad(loss, outputs, retain_graph=True)
    # Some a judge may not see. What leads from the outputs to what is judged is kept, for a second judge.
    unseen: dict[str, bool] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    measured = owns if measure is None else torch.autograd.grad(measure, outputs, **unseen)
    pushes = torch.autograd.grad(wrong, outputs, **unseen)
    pulls = []
    for part, own, ruler, other in zip(outputs, owns, measured, pushes, strict=True):
        sizes = torch.stack([ruler.float().square().sum(), other.float().square().sum()])
        size, pushed = accelerator.reduce(sizes, "sum").sqrt()  # of the rows of all processes
        scale = weight * size / pushed.clamp(min=1e-12)
        pulls.append((part * (own + scale * other)).sum())
    pull = sum(pulls)
    return loss.detach() + pull - pull.detach()  # its gradient alone


class Together:
    """What a stage trains beside its module, several parts by their names, saved as one."""

    parts: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """What all parts know, as flat tensors."""
        told = {name: part.state_dict() for name, part in self.parts.items()}
        return {f"{name}.{key}": value for name, part in told.items() for key, value in part.items()}

    def load_state_dict(self, told: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` told."""
        for name, part in self.parts.items():
            own = {key: value for key, value in told.items() if key.startswith(f"{name}.")}
            part.load_state_dict({key.removeprefix(f"{name}."): value for key, value in own.items()})


class ClipAdversary(Adversary):
    """An adversary of clips: each that is predicted is judged against the one that was noised for it.

    Args:
        discriminator: Called with latents of picture and sound and the clips' classes, such as :class:`Discriminator`.
        alphas: Cumulative shares of signal of the noise schedule, (timesteps,).
    """

    def __init__(self, trainer: Trainer, discriminator: nn.Module, alphas: Tensor, weight: float, warmup: int) -> None:
        super().__init__(trainer, discriminator, weight, warmup)
        self.alphas = alphas.to(self.accelerator.device)

    def pairs(self, batch: ClipBatch, video: Tensor, audio: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Real clips and those of predicted velocities, which have what was given in common."""
        real = batch.clips(self.alphas, batch.video_target, batch.audio_target)
        made = batch.clips(self.alphas, video, audio)
        given = batch.given_video, batch.given_audio
        return real, tuple(r.where(g, m) for r, m, g in zip(real, made, given, strict=True))

    def __call__(
        self, batch: ClipBatch, video: Tensor, audio: Tensor, loss: Tensor, generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        """What :meth:`judged` makes of ``loss``, which was computed from the student's velocities."""
        real, made = self.pairs(batch, video, audio)
        return self.judged((video, audio), real, made, (batch.labels,), loss, generator, step)
