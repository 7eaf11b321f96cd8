"""The noise that training and sampling share."""

import torch
from torch import Tensor

from avdit.geometry import ClipGeometry


def draw_noise(
    geometry: ClipGeometry,
    shared: float,
    generator: torch.Generator | None = None,
    common: Tensor | None = None,
    clips: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Noise for the picture (F, C, h, w) and the sound (C, T, f) of one clip, of unit variance.

    It lies where its generator does.

    All frames have the share ``shared`` of the picture's variance in common (the mixed noise of Ge et al. 2023,
    arXiv 2305.10474). The noise of one frame is what the image backbone was trained on, whatever the share is; but
    independent noise would all but vanish in the mean of the frames, and what they show alike would be settled
    by the first step.

    Args:
        shared: From 0 to 1, as the model was trained.
        common: What the frames have in common, (C, h, w); drawn by :func:`draw_common` where it is not given.
        clips: (n,) for that of n clips, stacked.
    """
    if common is None and shared:
        common = draw_common(geometry, generator, clips)
    video = _normal((*clips, geometry.frames, *geometry.video_latent_shape), generator)
    audio = _normal((*clips, *geometry.audio_latent_shape), generator)
    if shared:
        video = shared**0.5 * common.unsqueeze(-4) + (1 - shared) ** 0.5 * video
    return video, audio


def draw_common(
    geometry: ClipGeometry, generator: torch.Generator | None = None, clips: tuple[int, ...] = ()
) -> Tensor:
    """Noise (C, h, w) that the frames of a scene have in common, however many windows it goes on for."""
    return _normal((*clips, *geometry.video_latent_shape), generator)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device if generator else None)
