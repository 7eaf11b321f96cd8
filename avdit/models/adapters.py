"""The trainable parts that are inserted into the frozen image transformer. All start as no change."""

import torch
from einops import rearrange
from torch import Tensor, nn

from avdit.models.dit import Attention, attend, sincos_1d


class LoRA(nn.Module):
    """Low-rank update of a linear layer (Hu et al. 2021, arXiv 2106.09685): (..., in) → (..., out)."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def lora_for_attention(width: int, rank: int) -> nn.ModuleDict:
    """Updates of the linear layers of ``Attention``."""
    return nn.ModuleDict({"qkv": LoRA(width, 3 * width, rank), "proj": LoRA(width, width, rank)})


class TemporalAttention(nn.Module):
    """Attention along the frames at each place, through a bottleneck; the way back starts at zero."""

    def __init__(self, width: int, bottleneck: int, frames: int, head_width: int = 32) -> None:
        super().__init__()
        self.heads = max(1, bottleneck // head_width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down = nn.Linear(width, bottleneck)
        self.qkv = nn.Linear(bottleneck, 3 * bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.positions = nn.Parameter(sincos_1d(bottleneck, torch.arange(frames)))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Tokens (B·F, N, D) to what is added to them, of the same shape."""
        h = rearrange(self.down(self.norm(x)), "(b f) n w -> (b n) f w", f=frames) + self.positions[:frames]
        q, k, v = rearrange(self.qkv(h), "m f (three heads d) -> three m heads f d", three=3, heads=self.heads)
        return self.up(rearrange(attend(q, k, v), "(b n) heads f d -> (b f) n (heads d)", n=x.shape[1]))


class Interaction(nn.Module):
    """The block's own frozen self-attention over the joined tokens of picture and sound.

    Positions in time, on one scale for both, tell which sound belongs to which frame. Both gates start at zero.
    """

    def __init__(self, width: int, rank: int, frames: int, columns: int, rows: int) -> None:
        super().__init__()
        self.attention = lora_for_attention(width, rank)
        self.gate_video = nn.Parameter(torch.zeros(width))
        self.gate_audio = nn.Parameter(torch.zeros(width))
        self.time = nn.Linear(64, width)
        centres = (torch.arange(columns) + 0.5) * frames / columns - 0.5  # in frames
        self.register_buffer("frame_times", sincos_1d(64, torch.arange(frames) * 4), persistent=False)
        self.register_buffer("column_times", sincos_1d(64, centres * 4).repeat_interleave(rows, 0), persistent=False)

    def forward(self, attn: Attention, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Modulated tokens (B, F, N, D) and (B, M, D) to what is added to each."""
        batch, frames, n, _ = video.shape
        dtype = video.dtype
        video = video + self.time(self.frame_times[:frames].to(dtype)).unsqueeze(1)
        audio = audio + self.time(self.column_times[: audio.shape[1]].to(dtype))
        joint = attn(torch.cat([video.flatten(1, 2), audio], 1), self.attention)  # (B, F·N + M, D)
        video, audio = joint.split([frames * n, audio.shape[1]], 1)
        return self.gate_video * video.unflatten(1, (frames, n)), self.gate_audio * audio


class BlockAdapters(nn.Module):
    """Everything that trains in one block."""

    def __init__(
        self, width: int, hidden: int, *, temporal_width: int, rank: int, frames: int, interaction: Interaction | None
    ) -> None:
        super().__init__()
        self.temporal = TemporalAttention(width, temporal_width, frames)
        self.audio_attention = lora_for_attention(width, rank)
        self.audio_mlp = nn.ModuleDict({"fc1": LoRA(width, hidden, rank), "fc2": LoRA(hidden, width, rank)})
        self.audio_modulation = LoRA(width, 6 * width, rank)
        self.interaction = interaction
