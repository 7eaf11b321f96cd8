"""What both codecs share: a diffusers autoencoder behind a pixel-unshuffle, and normalised latents."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from torch import Tensor, nn

from avdit.models.config import PortableConfig

# How a row of nearest-neighbour doubling spreads the 3 taps of a convolution over the 4 of a transposed one.
SPREAD = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and the 3x3 convolution ``conv`` behind it: (N, C, H, W) → (N, C', 2H, 2W).

    Both are one transposed convolution of 4x4 with stride 2, which takes 4 products a value in place of 9 (the
    doubled values are multiplied once) and no map in between. It takes the place of diffusers' ``Upsample2D``.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        if output_size is not None:
            raise ValueError(f"a map is doubled, not brought to {output_size}")
        weight = self.conv.weight
        spread = torch.tensor(SPREAD, device=weight.device)
        kernel = torch.einsum("ai,ocij,bj->coab", spread, weight.float(), spread).to(weight.dtype)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class LatentCodec(ModelMixin, PortableConfig):
    """Autoencoder of 2-D maps whose latents have mean 0 and scale 1 in every channel.

    Folding ``unshuffle`` x ``unshuffle`` cells into channels first moves the convolutions to a coarser
    grid, where they cost less; 1 leaves the input as it is, as the published VAEs expect it.

    Subclasses register ``vae`` (an ``AutoencoderKL`` configuration), ``unshuffle``, ``latent_mean`` and
    ``latent_std`` (one value a channel) with their own configuration.
    """

    def build(self, vae: dict[str, Any] | AutoencoderKL) -> None:
        self.use(vae if isinstance(vae, AutoencoderKL) else AutoencoderKL.from_config(vae))
        self.channels = self.autoencoder.config.latent_channels

    def use(self, autoencoder: AutoencoderKL) -> None:
        """Work with ``autoencoder``, its decoder made faster in place."""
        self.autoencoder = autoencoder
        for block in autoencoder.decoder.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList(
                    layer if isinstance(layer, Upsample) else Upsample(layer.conv) for layer in block.upsamplers
                )

    @staticmethod
    def published_config(part: ConfigMixin) -> dict[str, Any]:
        """The settings of a published model, without where and with what it was saved."""
        return {k: v for k, v in part.config.items() if not k.startswith("_")}

    def posterior(self, x: Tensor):
        """Distribution of the raw latents of ``x`` (N, C, H, W), as diffusers gives it."""
        folded = F.pixel_unshuffle(x, self.config.unshuffle)
        return self.autoencoder.encode(folded.contiguous(memory_format=torch.channels_last)).latent_dist

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Map of raw latents (N, c, h, w): (N, C, H, W)."""
        # Channels last: what the processor's convolutions work in.
        folded = self.autoencoder.decode(raw.contiguous(memory_format=torch.channels_last)).sample
        return F.pixel_shuffle(folded, self.config.unshuffle)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the raw latents' mean and scale a channel, (c,) each; from now on they normalise."""
        self.register_to_config(latent_mean=mean.tolist(), latent_std=std.tolist())

    def _statistic(self, values: list[float] | float, like: Tensor) -> Tensor:
        if isinstance(values, int | float):
            values = [values] * self.channels
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)

    def normalise(self, raw: Tensor) -> Tensor:
        mean, std = self.config.latent_mean, self.config.latent_std
        return (raw - self._statistic(mean, raw)) / self._statistic(std, raw)

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self.config.latent_mean, self.config.latent_std
        return latents * self._statistic(std, latents) + self._statistic(mean, latents)
