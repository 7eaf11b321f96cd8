"""Frames to latents and back: a small autoencoder of our own, or a Stable Diffusion VAE."""

from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  diffusers looks for a component's loader here
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from avdit.models.codec import LatentCodec

SMALL_VAE: dict[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "latent_channels": 16,
    "block_out_channels": (64, 96, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


class VideoCodec(LatentCodec):
    """Image autoencoder applied to each frame.

    Args:
        vae: Configuration of a diffusers ``AutoencoderKL``; the small factor-16 one by default.
        unshuffle: Pixels folded into channels each way before it.
        latent_mean: Mean of the raw latents, one value or one a channel.
        latent_std: Their scale, likewise.
        slice_frames: Frames coded at once, which bounds the memory.
    """

    @register_to_config
    def __init__(
        self,
        vae: dict[str, Any] | None = None,
        unshuffle: int = 4,
        latent_mean: list[float] | float = 0.0,
        latent_std: list[float] | float = 1.0,
        slice_frames: int = 8,
    ) -> None:
        super().__init__()
        self.build(vae or SMALL_VAE)

    @classmethod
    def from_vae(cls, vae: AutoencoderKL) -> "VideoCodec":
        """Wrap a published image VAE (Stable Diffusion's: factor 8, 4 channels) with its scaling factor."""
        codec = cls(
            vae=cls.published_config(vae), unshuffle=1, latent_mean=0.0, latent_std=1 / vae.config.scaling_factor
        )
        codec.use(vae)
        return codec

    @apply_forward_hook
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) in [-1, 1] to normalised latents (B, F, C, h, w)."""
        slices = frames.flatten(0, 1).split(self.config.slice_frames)
        latents = [self.normalise(self.posterior(part).mode()) for part in slices]
        return _join(latents, frames.shape[:2])

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, F, C, h, w) to frames (B, F, 3, H, W) in [-1, 1]."""
        slices = latents.flatten(0, 1).split(self.config.slice_frames)
        frames = [self.reconstruct(self.denormalise(part)).clamp(-1, 1) for part in slices]
        return _join(frames, latents.shape[:2])


def _join(slices: list[Tensor], leading: tuple[int, int]) -> Tensor:
    return torch.cat(slices).unflatten(0, leading)
