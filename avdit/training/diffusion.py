"""Noising with a timestep for every part of a latent, and the loss that counts only what was noised."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Diffusion:
    """Velocity targets (Salimans & Ho 2022) under a diffusers noise schedule."""

    def __init__(self, scheduler: DDIMScheduler, device: torch.device | str = "cpu") -> None:
        self.alphas = scheduler.alphas_cumprod.to(device).float()

    def timesteps(self, generator: torch.Generator, number: int) -> Tensor:
        """Timesteps (number,) spread evenly over the schedule, one in each of ``number`` strata."""
        strata = (torch.arange(number) + torch.rand(number, generator=generator)) / number
        order = torch.randperm(number, generator=generator)
        return (strata[order] * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latent and its velocity.

        Args:
            clean: Latents whose leading axes are those of ``t``.
            noise: Like ``clean``.
            t: Timesteps, broadcast over the trailing axes.
            given: Like ``t``; where true the latent stays clean.
        """
        alpha = self.alphas[t].where(~given, torch.ones(()))
        alpha = alpha.reshape(*t.shape, *(1,) * (clean.ndim - t.ndim))
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        return a * clean + s * noise, a * noise - s * clean


def masked_error(predicted: Tensor, target: Tensor, noised: Tensor) -> Tensor:
    """Mean squared error over the entries where ``noised`` (broadcastable, bool) holds; 0 where none does."""
    weight = noised.expand_as(target).to(target.dtype)
    return ((predicted - target).square() * weight).sum() / weight.sum().clamp(min=1)
