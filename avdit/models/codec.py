"""What both codecs share: a diffusers autoencoder behind a pixel-unshuffle, and normalised latents."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from torch import Tensor


class LatentCodec(ModelMixin, ConfigMixin):
    """Autoencoder of 2-D maps whose latents have mean 0 and scale 1 in every channel.

    Folding ``unshuffle`` x ``unshuffle`` cells into channels first moves the convolutions to a coarser
    grid, where they cost less; 1 leaves the input as it is, as the published VAEs expect it.

    Subclasses register ``vae`` (an ``AutoencoderKL`` configuration), ``unshuffle``, ``latent_mean`` and
    ``latent_std`` (one value a channel) with their own configuration.
    """

    def build(self, vae: dict[str, Any] | AutoencoderKL) -> None:
        self.autoencoder = vae if isinstance(vae, AutoencoderKL) else AutoencoderKL.from_config(vae)
        self.channels = self.autoencoder.config.latent_channels

    @staticmethod
    def published_config(part: ConfigMixin) -> dict[str, Any]:
        """The settings of a published model, without where and with what it was saved."""
        return {k: v for k, v in part.config.items() if not k.startswith("_")}

    def posterior(self, x: Tensor):
        """Distribution of the raw latents of ``x`` (N, C, H, W), as diffusers gives it."""
        return self.autoencoder.encode(F.pixel_unshuffle(x, self.config.unshuffle)).latent_dist

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Map of raw latents (N, c, h, w): (N, C, H, W)."""
        return F.pixel_shuffle(self.autoencoder.decode(raw).sample, self.config.unshuffle)

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
