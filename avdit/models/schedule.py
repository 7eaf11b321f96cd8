"""The noise and its schedule, which training and sampling share."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from avdit.geometry import ClipGeometry


def draw_noise(
    geometry: ClipGeometry, shared: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Noise for the picture (F, C, h, w) and the sound (C, T, f) of one clip, of unit variance.

    All frames have the share ``shared`` of the picture's variance in common (the mixed noise of Ge et al. 2023,
    arXiv 2305.10474). The noise of one frame is what the image backbone was trained on, whatever the share is; but
    independent noise would all but vanish in the mean of the frames, and what they show alike would be settled
    by the first step.
    """
    shape = (geometry.frames, *geometry.video_latent_shape)
    video = torch.randn(shape, generator=generator)
    audio = torch.randn(geometry.audio_latent_shape, generator=generator)
    if shared:
        video = shared**0.5 * torch.randn(shape[1:], generator=generator) + (1 - shared) ** 0.5 * video
    return video, audio


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
