"""The noise schedule that training and sampling share."""

from diffusers import DDIMScheduler

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
