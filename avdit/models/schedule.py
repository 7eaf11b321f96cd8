"""The noise and its schedule, which training and sampling share."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from avdit.geometry import ClipGeometry


def draw_noise(
    geometry: ClipGeometry, shared: float, generator: torch.Generator | None = None, common: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Noise for the picture (F, C, h, w) and the sound (C, T, f) of one clip, of unit variance.

    All frames have the share ``shared`` of the picture's variance in common (the mixed noise of Ge et al. 2023,
    arXiv 2305.10474). The noise of one frame is what the image backbone was trained on, whatever the share is; but
    independent noise would all but vanish in the mean of the frames, and what they show alike would be settled
    by the first step.

    Args:
        shared: From 0 to 1, as the model was trained.
        common: What the frames have in common, (C, h, w); drawn by :func:`draw_common` where it is not given.
    """
    if common is None and shared:
        common = draw_common(geometry, generator)
    video = torch.randn(geometry.frames, *geometry.video_latent_shape, generator=generator)
    audio = torch.randn(geometry.audio_latent_shape, generator=generator)
    if shared:
        video = shared**0.5 * common + (1 - shared) ** 0.5 * video
    return video, audio


def draw_common(geometry: ClipGeometry, generator: torch.Generator | None = None) -> Tensor:
    """Noise (C, h, w) that the frames of a scene have in common, however many windows it goes on for."""
    return torch.randn(geometry.video_latent_shape, generator=generator)


XS_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    # The last step is pure noise (Lin et al. 2023): a night sky stays dark and a flash fills the picture.
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def xs_scheduler() -> DDIMScheduler:
    """The schedule of ``avdit-xs``: v-prediction, zero terminal signal-to-noise ratio."""
    return DDIMScheduler(**XS_SCHEDULER)


XL_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def xl_scheduler() -> DDIMScheduler:
    """The schedule under which the published DiT was trained: linear betas, noise predicted."""
    return DDIMScheduler(**XL_SCHEDULER)
