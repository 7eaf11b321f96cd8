"""Noising with a timestep for every part of a latent, and the loss that counts only what was noised."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Diffusion:
    """Noised latents and what is to be predicted of them under a diffusers noise schedule.

    That is the noise, or the velocity (Salimans & Ho 2022), as the schedule's ``prediction_type`` says.

    Raises:
        ValueError: for another ``prediction_type``.
    """

    def __init__(self, scheduler: DDIMScheduler, device: torch.device | str = "cpu") -> None:
        self.kind = scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.kind!r} must be 'epsilon' or 'v_prediction'")
        self.alphas = scheduler.alphas_cumprod.to(device).float()

    def timesteps(self, generator: torch.Generator, number: int) -> Tensor:
        """Timesteps (number,) spread evenly over the schedule, one in each of ``number`` strata."""
        strata = (torch.arange(number) + torch.rand(number, generator=generator)) / number
        order = torch.randperm(number, generator=generator)
        return (strata[order] * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latent and what is to be predicted of it.

        Args:
            clean: Latents whose leading axes are those of ``t``.
            noise: Like ``clean``.
            t: Timesteps, broadcast over the trailing axes.
            given: Like ``t``; where true the latent stays clean.
        """
        alpha = self.alphas[t].masked_fill(given, 1)
        alpha = alpha.reshape(*t.shape, *(1,) * (clean.ndim - t.ndim))
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        target = noise if self.kind == "epsilon" else a * noise - s * clean
        return a * clean + s * noise, target


def ddim_step(x: Tensor, clean: Tensor, old: Tensor, new: Tensor, eta: float, fresh: Tensor) -> Tensor:
    """Latents after a step of DDIM (Song et al. 2020, arXiv 2010.02502).

    Args:
        x: Before it.
        clean: What they are taken for.
        old: Cumulative share of signal before the step, broadcastable to them.
        new: The same after it; no less.
        eta: Share of the step's noise that is new.
        fresh: That noise.
    """
    found = (x - old.sqrt() * clean) / (1 - old).sqrt()
    deviation = eta * ((1 - new) / (1 - old) * (1 - old / new).clamp(min=0)).sqrt()
    return new.sqrt() * clean + (1 - new - deviation**2).clamp(min=0).sqrt() * found + deviation * fresh


def timesteps_of(starts: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Timesteps (number,) of a sampler whose steps begin at ``starts`` (steps,), each as often as the others."""
    order = torch.randperm(number, generator=generator)
    return starts[(order + torch.randint(len(starts), (), generator=generator)) % len(starts)]


def masked_error(predicted: Tensor, target: Tensor, noised: Tensor, share: float | None = None) -> Tensor:
    """Mean squared error over the entries where ``noised`` (broadcastable, bool) holds; 0 where none does.

    Args:
        noised: Or what the error of each entry counts for.
        share: Divides the sum in place of the number of these entries: that of the whole batch over its parts, so
            that the mean over parts is the error of the whole batch, however the given entries fall.
    """
    weight = noised.expand_as(target).to(target.dtype)
    count = weight.sum().clamp(min=1) if share is None else max(share, 1e-6)
    return ((predicted - target).square() * weight).sum() / count


def moving_weight(clips: Tensor, most: float) -> Tensor:
    """Weights (N, 1, h, w) of the cells of ``clips`` (N, F, C, h, w), whose mean over each picture is 1.

    A cell's weight follows its deviation over the clip against the picture's mean, from 1 / ``most`` to ``most``. What
    a clip is about moves, and may be small: a dancer fills a tenth of the cells, whose errors a room would drown. As
    the weight is the clip's own, what is predicted at high noise leans a little towards what moves.
    """
    moves = clips.std(1).mean(1, keepdim=True)
    weight = (moves / moves.mean((2, 3), keepdim=True).clamp(min=1e-6)).clamp(1 / most, most)
    return weight / weight.mean((2, 3), keepdim=True)
