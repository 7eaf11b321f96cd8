"""The noise schedule that training and sampling share, and timesteps that lie closer where there is much noise."""

from fractions import Fraction
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

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


def shift_timesteps(scheduler: DDIMScheduler, shift: float) -> None:
    """Move the timesteps that are set towards more noise: 1 leaves them, 2 leads the middle one to two thirds.

    (Esser et al. 2024, arXiv 2403.03206, section 5.3.2: t becomes ``shift`` t / (1 + (``shift`` - 1) t).)
    """
    last = scheduler.config.num_train_timesteps
    share = (scheduler.timesteps + 1).float() / last
    shifted = (last * shift * share / (1 + (shift - 1) * share)).round().long() - 1
    places = torch.arange(len(share), device=share.device)
    scheduler.timesteps = shifted.minimum(last - 1 - places)  # of many steps no two are at one timestep


def step_on(scheduler: SchedulerMixin, predicted: Tensor, t: Tensor, latents: Tensor, **fresh: Any) -> Tensor:
    """What a step from ``t`` to the next of the timesteps leads ``latents`` to; those of DDIM may be shifted.

    Args:
        fresh: ``eta`` and ``variance_noise`` of DDIM.
    """
    gaps = -scheduler.timesteps.diff()
    if not isinstance(scheduler, DDIMScheduler) or len(gaps) == 0 or gaps.max() - gaps.min() <= 1:
        return scheduler.step(predicted, t, latents, return_dict=False, **fresh)[0]
    later = scheduler.timesteps[scheduler.timesteps < t]
    end = int(later[0]) if len(later) else -1
    # diffusers tells a step's end from how many even steps there are: of such as this one, so many.
    number = scheduler.num_inference_steps
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, int(t) - end)
    try:
        return scheduler.step(predicted, t, latents, return_dict=False, **fresh)[0]
    finally:
        scheduler.num_inference_steps = number
