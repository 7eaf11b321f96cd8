"""What features of made pictures are on the average, held against rendered ones, without an adversary.

Faults that all clips of a class share, such as a surface that is a little too smooth, are a matter of means: those of
each feature over many pictures, and of its square, are matched (generative feature matching with moving averages: dos
Santos et al. 2019, arXiv 1904.02762). Where two sets differ is then known from hundreds of pictures, not from the few
of one step, and no network has to learn it first.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from avdit.models.dit import DiT
from avdit.models.video_codec import VideoCodec
from avdit.training.adversary import Together, pulled
from avdit.training.noised import TokenFeatures
from avdit.training.pictures import ShownFeatures
from avdit.training.trainer import Trainer

MEMORY = 60  # pictures of a group over which made ones are averaged
LASTING = 1000  # the same of rendered ones, which stay as they are
LEAST_SPREAD = 0.1  # share of a feature's variance over all groups that counts in each of them
EXTREME = 1 / 32  # share of the places where a feature counts as highest, and as lowest
WARMUP = 30  # steps in which the weights of moments rise
MOST = 3.0  # deviations by which a mean counts as wrong at most, and variances likewise


def averaged(maps: Sequence[Tensor]) -> Tensor:
    """What pictures are told by, (N, K), of their features' maps (N, C, h, w), each feature apart.

    Its mean over the picture, the logarithm of its deviation there, and its means where it is highest and lowest: a
    hand or a spark is too small for the former two.
    """
    told = []
    for m in maps:
        mean, places = m.mean((2, 3)), m.flatten(2)
        few = max(1, round(EXTREME * places.shape[2]))
        told += [mean, ((m - mean[..., None, None]).square().mean((2, 3)) + 1e-4).log() / 2]
        told += [places.topk(few, largest=highest, sorted=False).values.mean(2) for highest in (True, False)]
    return torch.cat(told, 1)


class Moments:
    """Means and squares of what ``features`` tell, of groups of made and of rendered pictures, as they go by.

    Args:
        features: Tells (N, K) of pictures, through which gradients flow.
        groups: Number of groups that are held apart.
    """

    def __init__(self, accelerator: Accelerator, features: Callable[..., Tensor], groups: int) -> None:
        self.accelerator, self.features, self.groups = accelerator, features, groups
        self.kept: dict[str, Tensor] = {}

    def seen(self, kind: str, found: Tensor, groups: Tensor, memory: int) -> None:
        """Let pictures (N, K) of ``groups`` (N,) count, those of all processes."""
        found, groups = (self.accelerator.gather(x) for x in (found.detach().float(), groups))
        if f"{kind}.mean" not in self.kept:
            for name in ("mean", "square"):
                self.kept[f"{kind}.{name}"] = found.new_zeros(self.groups, found.shape[1])
            self.kept[f"{kind}.count"] = found.new_zeros(self.groups)
        mean, square, count = (self.kept[f"{kind}.{name}"] for name in ("mean", "square", "count"))
        for group in groups.unique().tolist():
            some = found[groups == group]
            count[group] += len(some)
            share = max(len(some) / float(count[group]), min(1.0, len(some) / memory))
            mean[group].lerp_(some.mean(0), share)
            square[group].lerp_(some.square().mean(0), share)

    def wrong(self, made: Tensor, real: Tensor, groups: Tensor) -> Tensor:
        """What leads the moments of made pictures to those of rendered ones, computed from the former's features.

        Its gradient is that of the divergence of normal distributions, of made pictures from rendered ones.

        Args:
            made: Features (N, K) of made pictures, as :attr:`features` tells them.
            real: The same of rendered ones.
            groups: Those of both, (N,).
        """
        self.seen("made", made, groups, MEMORY)
        self.seen("real", real, groups, LASTING)
        mean, made_mean = self.kept["real.mean"][groups], self.kept["made.mean"][groups]
        variance, made_variance = (self.variances(kind)[groups] for kind in ("real", "made"))
        scale, known = variance.sqrt(), (self.kept["made.count"][groups] / MEMORY).clamp(max=1).unsqueeze(1)
        drift = (made_mean - mean) / scale
        excess = known * (1 - variance / made_variance)  # of few pictures the variance seems less than it is
        away, apart = ((made.float() - middle) / scale for middle in (mean, made_mean))
        pull = drift.clamp(-MOST, MOST) * away + excess.clamp(-MOST, MOST) * apart.square().clamp(max=MOST**2) / 2
        return pull.mean()

    def variances(self, kind: str) -> Tensor:
        """Variances (groups, K) of what has been seen, of which none is far below that of all rendered pictures."""
        mean, square = self.kept["real.mean"], self.kept["real.square"]
        known = self.kept["real.count"] > 0
        spread = (square[known].mean(0) - mean[known].mean(0).square()).clamp(min=0)
        mean, square = self.kept[f"{kind}.mean"], self.kept[f"{kind}.square"]
        return (square - mean.square()).clamp(min=0) + LEAST_SPREAD * spread + 1e-6

    def pull(
        self,
        outputs: tuple[Tensor, ...],
        loss: Tensor,
        maps: Sequence[Sequence[Tensor]],
        groups: Tensor,
        weight: float,
        measure: Tensor,
    ) -> Tensor:
        """``loss``, whose gradient has beside its own what leads the moments to each other (see :func:`pulled`).

        Args:
            maps: Those of made pictures and those of rendered ones, (N, C, h, w) each.
            groups: Of both, (N,).
        """
        wrong = self.wrong(*(averaged(of) for of in maps), groups)
        return pulled(self.accelerator, outputs, loss, wrong, weight, measure)

    def apart(self) -> Tensor:
        """How many deviations the means of made pictures differ from those of rendered ones, on the average."""
        kept = self.kept
        both = (kept["made.count"] > 0) & (kept["real.count"] > 0)
        mean, made = kept["real.mean"][both], kept["made.mean"][both]
        spread = kept["real.square"][both].mean(0) - mean.mean(0).square()
        return ((made - mean).square() / (spread + 1e-6)).mean().sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """What has been seen."""
        return dict(self.kept)

    def load_state_dict(self, told: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` told."""
        self.kept = {name: value.clone() for name, value in told.items()}


class FrameMoments(Together):
    """Moments of frames in noise, by the frozen backbone's features, and as the decoder shows them, by ImageNet's.

    Args:
        backbone: The frozen one.
        codec: Shows frames.
        groups: Number of groups that are held apart.
        weights: Of noised and of shown frames, as shares of the size of what a measure leads to.
    """

    def __init__(
        self, trainer: Trainer, backbone: DiT, codec: VideoCodec, groups: int, weights: Sequence[float]
    ) -> None:
        self.trainer, self.weights, accelerator = trainer, weights, trainer.accelerator
        self.noised = Moments(accelerator, TokenFeatures(backbone), groups)
        self.shown = Moments(accelerator, ShownFeatures(codec).to(accelerator.device), groups)
        self.parts = {"noised": self.noised, "shown": self.shown}

    def in_noise(
        self,
        outputs: tuple[Tensor, ...],
        loss: Tensor,
        pair: tuple[Tensor, Tensor],
        noise: Tensor,
        levels: Tensor,
        alphas: Tensor,
        groups: Tensor,
        step: int,
        measure: Tensor,
    ) -> Tensor:
        """What :meth:`Moments.pull` makes of ``loss`` by frames in noise.

        Args:
            pair: Latents of made frames and of rendered ones, (N, C, h, w) each.
            noise: The same.
            levels: Timesteps, (N,), of the schedule whose cumulative shares of signal are ``alphas``.
            groups: (N,).
        """
        share = alphas[levels].view(-1, 1, 1, 1)
        with self.trainer.accelerator.autocast():
            seen = [self.noised.features(share.sqrt() * x + (1 - share).sqrt() * noise, levels) for x in pair]
        return self.noised.pull(outputs, loss, seen, groups, min(1.0, step / WARMUP) * self.weights[0], measure)

    def as_shown(
        self,
        outputs: tuple[Tensor, ...],
        loss: Tensor,
        pair: tuple[Tensor, Tensor],
        groups: Tensor,
        step: int,
        measure: Tensor,
    ) -> Tensor:
        """The same by frames as the decoder shows them."""
        with self.trainer.accelerator.autocast():
            seen = [self.shown.features(x) for x in pair]
        seen = [[m.float() for m in maps] for maps in seen]
        return self.shown.pull(outputs, loss, seen, groups, min(1.0, step / WARMUP) * self.weights[1], measure)

    def apart(self) -> dict[str, Tensor]:
        """How far the means of both are from rendered ones', as :meth:`Moments.apart` tells, of what has been seen."""
        told = {"noised": self.noised, "shown": self.shown}
        return {name: moments.apart() for name, moments in told.items() if moments.kept}
