"""Looks at a picture that is being made, without its decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from avdit.models.video_codec import VideoCodec

CELLS = 4  # values that are told of each latent cell, each way
REACH = 3  # latent cells that tell them, each way
RIDGE = 1e-4  # of the fit, a share of the latents' variance: some of them are nearly the same


class Preview:
    """A linear map from latents to a small picture, which takes a hundredth of the decoder's time.

    Least squares over some pictures (:meth:`fit`): each of the ``CELLS`` x ``CELLS`` colours of a latent cell is a
    weighted sum of the latents there and next to it.

    Args:
        weight: (3 · CELLS², channels, REACH, REACH).
        bias: (3 · CELLS²,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    @torch.no_grad()
    def fit(cls, codec: VideoCodec, frames: Tensor) -> "Preview":
        """The map that fits ``codec`` best on ``frames`` (N, 3, H, W) in [-1, 1]."""
        latents = codec.encode(frames.unsqueeze(0).to(codec.device, codec.dtype))[0].float()
        channels, height = latents.shape[1:3]
        seen = F.unfold(_edged(latents), REACH).transpose(1, 2).flatten(0, 1).double()  # (N·h·w, channels·REACH²)
        small = F.avg_pool2d(frames.to(latents), frames.shape[2] // (height * CELLS))
        wanted = F.pixel_unshuffle(small, CELLS).permute(0, 2, 3, 1).flatten(0, 2).double()  # (N·h·w, 3·CELLS²)
        mean, colour = seen.mean(0), wanted.mean(0)
        seen, wanted = seen - mean, wanted - colour
        square = seen.T @ seen
        square.diagonal().add_(RIDGE * square.trace() / len(square) + 1e-12)
        weight = torch.linalg.solve(square, seen.T @ wanted).T  # (3·CELLS², channels·REACH²)
        return cls(weight.float().view(-1, channels, REACH, REACH), (colour - weight @ mean).float())

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (N, channels, h, w) to pictures (N, 3, h · CELLS, w · CELLS) in [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            return F.pixel_shuffle(F.conv2d(_edged(latents.float()), self.weight, self.bias), CELLS).clamp(-1, 1)


def _edged(latents: Tensor) -> Tensor:
    return F.pad(latents, (REACH // 2,) * 4, mode="replicate")
