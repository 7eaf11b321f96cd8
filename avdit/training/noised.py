"""An adversary on noised latents, for students of few steps: what each step leads to, judged by the frozen backbone.

A squared error is content with two answers at once: three arms where there should be two. Here each step is to lead to
noised frames that cannot be told from noised frames of rendered clips (denoising diffusion GANs, Xiao et al. 2022,
arXiv 2112.07804), which asks of every step no more than what the next ones need. The backbone's own features judge that
(latent adversarial diffusion distillation, Sauer et al. 2024, arXiv 2403.12015): at much noise they tell bodies, at
little noise edges, and no picture need be shown by the decoder.
"""

import torch
from torch import Tensor, nn

from avdit.models.dit import DiT
from avdit.training.adversary import Adversary, Led
from avdit.training.pictures import FeatureDiscriminator, scaled
from avdit.training.trainer import Trainer

LEVELS = 1, 3, 5, 7  # blocks of the backbone whose features are judged, of eight
LEAST = 0.6  # least noise in which frames are judged, as a share of that to which a step leads
LAST = 0.15  # and most noise after the last step, as a share of the schedule


class TokenFeatures(nn.Module):
    """What a diffusion transformer takes noised images for, after some of its blocks."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model
        self.levels = sorted({level * len(model.blocks) // 8 for level in LEVELS})

    def forward(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """Maps (N, D, h, w) of tokens for latents ``x`` (N, C, H, W) at timesteps ``t`` (N,), of no class."""
        model, maps = self.model, []
        side = model.config.input_size // model.config.patch_size
        none = torch.full_like(t, model.config.num_classes)
        tokens, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(none)
        for i, block in enumerate(model.blocks):
            tokens = block(tokens, c)
            if i in self.levels:
                maps.append(tokens.transpose(1, 2).unflatten(2, (side, side)).float())
        return maps


def noise_after(
    trainer: Trainer, ends: Tensor, images: Tensor, timesteps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The noise in which images are judged to which steps lead.

    Args:
        ends: Timesteps at which the steps of this process's rows end, (N,) or, for several images of a row, (N, n).
        images: Latents, (N, C, h, w) or (N, n, C, h, w).
        timesteps: Of the schedule.

    Returns:
        Timesteps, as ``ends``, and noise, as ``images``. Each row has its own generator, so that they do not depend on
        the process that it falls to.
    """
    seeds = trainer.mine(torch.randint(1 << 31, (trainer.global_batch,), generator=generator)).tolist()
    rows = [torch.Generator().manual_seed(seed) for seed in seeds]
    chances = torch.stack([torch.rand(ends.shape[1:], generator=row) for row in rows]).to(ends.device)
    noise = torch.stack([torch.randn(images.shape[1:], generator=row) for row in rows]).to(images)
    levels = torch.where(ends > 0, ends * (LEAST + (1 - LEAST) * chances), LAST * timesteps * chances)
    return levels.long(), noise


class NoisedAdversary(Adversary):
    """Tells noised frames of rendered clips from those that a student's step leads to.

    Args:
        backbone: The frozen one, whose features it stands on.
        num_classes: Classes that it knows.
        alphas: Cumulative shares of signal of the noise schedule, (timesteps,).
    """

    def __init__(
        self, trainer: Trainer, backbone: DiT, num_classes: int, alphas: Tensor, weight: float, warmup: int
    ) -> None:
        self.features, self.alphas = TokenFeatures(backbone), alphas
        widths = (backbone.config.hidden_size,) * len(self.features.levels)
        super().__init__(trainer, FeatureDiscriminator(widths, num_classes=num_classes, halved=0), weight, warmup)

    def seen(self, images: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, ...]:
        """Features of images (N, C, h, w) in so much noise as the timesteps ``levels`` (N,) have."""
        share = self.alphas[levels].view(-1, 1, 1, 1)
        with self.accelerator.autocast():
            return scaled(self.features(share.sqrt() * images + (1 - share).sqrt() * noise, levels))

    def __call__(self, led: Led, end: int, loss: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """What :meth:`judged` makes of ``loss``; the adversary's weight is a share of the velocities' size.

        Args:
            end: Timestep to which the step leads; 0 for the last one.
        """
        ends = torch.full_like(led.labels, end)
        levels, noise = noise_after(self.trainer, ends, led.real, len(self.alphas), generator)
        with torch.no_grad():
            wanted = self.seen(led.real, noise, levels)
        found = self.seen(led.made, noise, levels)
        size = led.velocity.square().mean()
        return self.judged((led.velocity,), wanted, found, (led.labels,), loss, generator, step, size)
