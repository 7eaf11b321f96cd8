"""Pictures as the eye sees them, in training: latents shown by the decoder, and an adversary on ImageNet features.

Squared errors of latents are content with what is a little too smooth, which the decoder shows as a soft picture. So
the clips that adapters lead to are shown, their features are compared with those of the clips that were noised, and a
small adversary tells one from the other (adversarial diffusion distillation, Sauer et al. 2023, arXiv 2311.17042).
"""

import torch
from torch import Tensor, nn

from avdit.models.features import ImageFeatures, feature_distance
from avdit.models.video_codec import VideoCodec
from avdit.training.adversary import Adversary, ClipAdversary, Led, by_class
from avdit.training.batches import ClipBatch
from avdit.training.trainer import Trainer

FEATURE_WIDTHS = 16, 24, 40, 112  # channels of the features that the discriminator is shown
HIDDEN = 64  # channels of its layers
JUDGED = 0.5  # share of a batch that is shown: the clips with the least noise
PAIRS = 2  # of frames next to each other that are shown of each


class FeatureDiscriminator(nn.Module):
    """Verdicts on pictures by their ImageNet features, of every place at four scales.

    What stands on features that are learned already knows in a few hundred steps what takes one of its own thousands
    (Sauer et al. 2021, arXiv 2111.01007).

    Args:
        num_classes: Classes that verdicts lean on, with one more that stands for none; 0: they are not told.
        halved: Of how many maps, the first ones, every second place each way is judged: fine ones have enough.
    """

    def __init__(
        self, widths: tuple[int, ...] = FEATURE_WIDTHS, hidden: int = HIDDEN, num_classes: int = 0, halved: int = 2
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden, 3, 2 if i < halved else 1, 1),
                nn.SiLU(),
                nn.Conv2d(hidden, hidden, 1),
                nn.SiLU(),
            )
            for i, width in enumerate(widths)
        )
        self.places = nn.ModuleList(nn.Conv2d(hidden, 1, 1) for _ in widths)
        self.classes = nn.ModuleList(nn.Embedding(num_classes + 1, hidden) for _ in widths) if num_classes else None
        for table in self.classes or ():
            nn.init.zeros_(table.weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, *given: Tensor) -> list[Tensor]:
        """Verdicts (N, places) at every scale, high for rendered pictures.

        Args:
            given: Feature maps (N, C, h, w), such as :func:`scaled` gives, and behind them labels (N,) where it knows
                classes.
        """
        maps, labels = given[: len(self.heads)], given[len(self.heads) :]
        found = []
        for i, (head, place, m) in enumerate(zip(self.heads, self.places, maps, strict=True)):
            seen = head(m)
            verdict = place(seen)[:, 0]
            if self.classes is not None:
                verdict = verdict + by_class(seen, self.classes[i](*labels))
            found.append(verdict.flatten(1).float())
        return found


def scaled(maps: list[Tensor]) -> tuple[Tensor, ...]:
    """Feature maps with all places' features scaled to a mean square of 1."""
    return tuple(m * torch.rsqrt(m.square().mean(1, keepdim=True) + 1e-6) for m in maps)


class Shown(nn.Module):
    """A codec as what shows normalised latents."""

    def __init__(self, codec: VideoCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to pictures (N, 3, H, W), not clamped."""
        return self.codec.reconstruct(self.codec.denormalise(latents))


class ShownFeatures(nn.Module):
    """ImageNet features of pictures as a codec, whose weights stay as they are, shows their latents."""

    def __init__(self, codec: VideoCodec) -> None:
        super().__init__()
        self.shown = Shown(codec.requires_grad_(False)).to(memory_format=torch.channels_last)
        self.features = ImageFeatures()

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Feature maps of pictures, told by their latents (N, C, h, w)."""
        return self.features(self.shown(latents))


class ImageAdversary(Adversary):
    """An adversary that judges single images, which stand for no rendered one, as the decoder shows them.

    Args:
        codec: Shows latents; its weights stay as they are.
        num_classes: Classes that it knows.
    """

    def __init__(self, trainer: Trainer, codec: VideoCodec, num_classes: int, weight: float, warmup: int) -> None:
        super().__init__(trainer, FeatureDiscriminator(FEATURE_WIDTHS, num_classes=num_classes), weight, warmup)
        self.features = ShownFeatures(codec).to(self.accelerator.device)

    def __call__(self, led: Led, loss: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """What :meth:`judged` makes of ``loss``; the adversary's weight is a share of the velocities' size."""
        with self.accelerator.autocast():
            with torch.no_grad():
                wanted = scaled([m.float() for m in self.features(led.real)])
            found = scaled([m.float() for m in self.features(led.made)])
        size = led.velocity.square().mean()
        return self.judged((led.velocity,), wanted, found, (led.labels,), loss, generator, step, size)


class PictureAdversary(ClipAdversary):
    """An adversary that judges pairs of frames next to each other as the decoder shows them: their looks and changes.

    It judges the clips of a batch that were noised the least, as with more noise there is no telling what is fine.

    Args:
        codec: Shows latents; its weights stay as they are.
        perceptual: Weight of the distance of the frames' features from those of the clips that were noised.
    """

    def __init__(
        self, trainer: Trainer, codec: VideoCodec, alphas: Tensor, weight: float, warmup: int, perceptual: float
    ) -> None:
        widths = tuple(2 * width for width in FEATURE_WIDTHS)
        super().__init__(trainer, FeatureDiscriminator(widths), alphas, weight, warmup)
        self.features = ShownFeatures(codec).to(self.accelerator.device)
        self.perceptual = perceptual

    def chosen(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips and frames (n, 2): the first and the second frame of every pair."""
        trainer = self.trainer
        order = batch.t_video.masked_fill(batch.given_frames, 0).amax(1)
        order = order.masked_fill(batch.given_frames.all(1), order.max() + 1)  # of these there is nothing to judge
        number = max(1, round(JUDGED * len(order)))
        clips = order.argsort()[:number].repeat_interleave(PAIRS)
        drawn = torch.rand(trainer.global_batch, batch.t_video.shape[1] - 1, generator=generator)
        first = trainer.here(drawn).argsort(1)[:number, :PAIRS].flatten()
        return clips, torch.stack([first, first + 1], 1)

    def seen(self, latents: Tensor) -> list[Tensor]:
        """Feature maps of frames (n, C, h, w) as they are shown."""
        with self.accelerator.autocast():
            return self.features(latents)

    def __call__(
        self, batch: ClipBatch, video: Tensor, audio: Tensor, loss: Tensor, generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        """What :meth:`judged` makes of ``loss`` and the distance of features, which is returned, too."""
        real, made = (x[0] for x in self.pairs(batch, video, audio))
        clips, frames = self.chosen(batch, generator)
        clips, frames = clips.repeat_interleave(2), frames.flatten()
        with torch.no_grad():
            wanted = self.seen(real[clips, frames])
        found = self.seen(made[clips, frames])
        distance = feature_distance(found, wanted).mean()
        shown = (paired(scaled([m.float() for m in maps])) for maps in (wanted, found))
        loss = loss + self.perceptual * distance
        told = self.judged((video, audio), *shown, (), loss, generator, step)
        return {**told, "features": distance.detach()}


def paired(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Maps of pairs of frames (2 n, C, h, w) as those of the first and their change to the second, (n, 2 C, h, w)."""
    return tuple(torch.cat([m[::2], m[1::2] - m[::2]], 1) for m in maps)
