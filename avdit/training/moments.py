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

MEMORY = 60  # pictures of a group over which made ones are averaged
LASTING = 1000  # the same of rendered ones, which stay as they are
LEAST_SPREAD = 0.1  # share of a feature's variance over all groups that counts in each of them
MOST = 3.0  # deviations by which a mean counts as wrong at most, and variances likewise


def averaged(maps: Sequence[Tensor]) -> Tensor:
    """Each feature's mean over the picture and the logarithm of its deviation there, (N, K), of maps (N, C, h, w)."""
    told = []
    for m in maps:
        mean = m.mean((2, 3))
        told += [mean, ((m - mean[..., None, None]).square().mean((2, 3)) + 1e-4).log() / 2]
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

        Args:
            made: Features (N, K) of made pictures, as :attr:`features` tells them.
            real: The same of rendered ones.
            groups: Those of both, (N,).
        """
        self.seen("made", made, groups, MEMORY)
        self.seen("real", real, groups, LASTING)
        kept = self.kept
        mean, square = kept["real.mean"], kept["real.square"]
        known = kept["real.count"] > 0
        spread = square[known].mean(0) - mean[known].mean(0).square()
        variance = ((square - mean.square()).clamp(min=0) + LEAST_SPREAD * spread.clamp(min=0) + 1e-6)[groups]
        mean, first, second = mean[groups], kept["made.mean"][groups], kept["made.square"][groups]
        drift = (first - mean) / variance.sqrt()
        excess = (second - 2 * mean * first + mean.square() - (square[groups] - mean.square()).clamp(min=0)) / variance
        away = (made.float() - mean) / variance.sqrt()
        pull = drift.clamp(-MOST, MOST) * away + excess.clamp(-MOST, MOST) * away.square().clamp(max=MOST**2) / 4
        return pull.mean()

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
