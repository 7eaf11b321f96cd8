"""The trainable parts that are inserted into the frozen image transformer. All but the anchor start as no change."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from avdit.models.dit import Attention, attend, modulate, sincos_1d

LITTLE_HEEDED = -2.0  # the bias with which a frame begins to see those beside it
UNHEEDED = -8192.0  # an anchor's bias that no softmax shows; finite, as packs are averaged and subtracted


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


def lora_for_mlp(width: int, hidden: int, rank: int) -> nn.ModuleDict:
    """Updates of the linear layers of ``Mlp``."""
    return nn.ModuleDict({"fc1": LoRA(width, hidden, rank), "fc2": LoRA(hidden, width, rank)})


class Anchor(nn.Module):
    """The block's own frozen self-attention, in which every frame also sees the clip's first one.

    The image transformer gives both sleeves of a shirt one colour; so it does in two frames that see each other, which
    temporal attention, along single places, cannot do for what moves (the cross-frame attention of Khachatryan et al.
    2023, arXiv 2303.13439, and Wu et al. 2022, arXiv 2212.11565). How much each head heeds the first frame is learned;
    unlike all else here it heeds it from the start.

    Args:
        neighbour_rank: Rank of the update of the keys and values of the frames before and after, which every frame sees
            as well: so an arm stays one arm where it moves from place to place. 0: it does not see them.
    """

    def __init__(self, width: int, heads: int, rank: int, *, neighbour_rank: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads))
        self.update = LoRA(width, 2 * width, rank)
        self.neighbour_bias = self.neighbour_update = None
        if neighbour_rank:
            self.neighbour_bias = nn.Parameter(torch.full((heads,), LITTLE_HEEDED))
            self.neighbour_update = LoRA(width, 2 * width, neighbour_rank)

    def forward(self, attn: Attention, x: Tensor, frames: int) -> Tensor:
        """Modulated tokens (B·F, N, D) to what :class:`Attention` makes of them, of the same shape."""
        qkv, (tokens, width) = attn.qkv(x), x.shape[1:]
        first = qkv[::frames, :, width:] + self.update(x[::frames])  # (B, N, 2D)
        seen = [qkv[..., width:], repeat(first, "b n d -> (b f) n d", f=frames)]
        biases = [torch.zeros_like(self.bias), self.bias]
        if self.neighbour_update is not None:
            near = beside((qkv[..., width:] + self.neighbour_update(x)).unflatten(0, (-1, frames)))
            seen, biases = [*seen, near.flatten(0, 1)], [*biases, *[self.neighbour_bias] * 2]
        q = rearrange(qkv[..., :width], "m n (heads d) -> m heads n d", heads=attn.heads)
        k, v = rearrange(torch.cat(seen, 1), "m n (two heads d) -> two m heads n d", two=2, heads=attn.heads)
        bias = torch.stack(biases, 1).to(q.dtype).repeat_interleave(tokens, 1)  # (heads, all tokens)
        out = attend(q, k, v, bias.view(1, attn.heads, 1, -1))
        return attn.proj(rearrange(out, "m heads n d -> m n (heads d)"))


def beside(x: Tensor) -> Tensor:
    """For each frame of tokens (B, F, N, D) those of the frames before and after it, (B, F, 2·N, D).

    The first frame stands before itself, the last one after itself.
    """
    before, after = torch.cat([x[:, :1], x[:, :-1]], 1), torch.cat([x[:, 1:], x[:, -1:]], 1)
    return torch.cat([before, after], 2)


class TemporalAttention(nn.Module):
    """Attention along the frames at each place, through a bottleneck; the way back starts at zero.

    Args:
        rank: Rank of the layer by which timestep and class shift, scale and gate what is in the bottleneck, as adaptive
            normalisation does in the blocks (Peebles and Xie 2022, arXiv 2212.09748); 0: frames see each other alike at
            any noise and in any class. It starts as no change.
    """

    def __init__(self, width: int, bottleneck: int, frames: int, head_width: int = 32, *, rank: int = 0) -> None:
        super().__init__()
        self.heads = max(1, bottleneck // head_width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down = nn.Linear(width, bottleneck)
        self.qkv = nn.Linear(bottleneck, 3 * bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.positions = nn.Parameter(sincos_1d(bottleneck, torch.arange(frames)))
        self.modulation = LoRA(width, 3 * bottleneck, rank) if rank else None
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, c: Tensor, frames: int) -> Tensor:
        """Tokens (B·F, N, D) under their timesteps and classes (B·F, 1, D) to what is added, shaped as the tokens."""
        h = self.down(self.norm(x))
        if self.modulation is not None:
            shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
            h = modulate(h, shift, scale)
        h = rearrange(h, "(b f) n w -> (b n) f w", f=frames) + self.positions[:frames]
        q, k, v = rearrange(self.qkv(h), "m f (three heads d) -> three m heads f d", three=3, heads=self.heads)
        h = rearrange(attend(q, k, v), "(b n) heads f d -> (b f) n (heads d)", n=x.shape[1])
        return self.up(h if self.modulation is None else h * (1 + gate))


class TimeExchange(nn.Module):
    """What happens when: a few features of each frame are added to the sound of its moment, and the other way round.

    Features are found token by token and averaged over a frame or a column of sound, so that they cost little and
    tell the moment exactly, which attention over all tokens is slow to learn. (MMAudio, Cheng et al. 2024, conditions
    its sound on features of the frame of its moment in the same spirit.) Both ways start at zero.
    """

    def __init__(self, width: int, features: int, frames: int, columns: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.video_down, self.audio_down = nn.Linear(width, features), nn.Linear(width, features)
        self.video_up, self.audio_up = nn.Linear(features, width), nn.Linear(features, width)
        for layer in (self.video_up, self.audio_up):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("to_columns", resampling(frames, columns), persistent=False)
        self.register_buffer("to_frames", resampling(columns, frames), persistent=False)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, F, N, D) and (B, M, D) to what is added to each frame (B, F, 1, D) and to (B, M, D)."""
        seen = F.gelu(self.video_down(video), approximate="tanh").mean(2)  # (B, F, features)
        heard = F.gelu(self.audio_down(audio), approximate="tanh")
        heard = heard.unflatten(1, (-1, self.rows)).mean(2)  # (B, columns, features)
        for_video = self.video_up(self.to_frames.to(heard.dtype) @ heard).unsqueeze(2)
        for_audio = self.audio_up(self.to_columns.to(seen.dtype) @ seen).repeat_interleave(self.rows, 1)
        return for_video, for_audio


def resampling(source: int, target: int) -> Tensor:
    """Weights (target, source) that interpolate ``source`` steps of a span of time at the middles of ``target``."""
    # In 64 bits: where a model is loaded in half precision, that is the type of what is made without naming one.
    at = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(0, source - 1)
    return (1 - (at.unsqueeze(1) - torch.arange(source)).abs()).clamp(min=0).float()


class Interaction(nn.Module):
    """The block's own frozen self-attention over the joined tokens of picture and sound.

    Positions in time, on one scale for both, tell which sound belongs to which frame. Both gates start at zero.

    Args:
        pool: The picture takes part with the mean of each ``pool`` x ``pool`` tokens; 1: with every token.
        exchange: Features of the :class:`TimeExchange` beside it; 0: none.
    """

    def __init__(
        self, width: int, rank: int, frames: int, columns: int, rows: int, *, pool: int = 1, exchange: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self.attention = lora_for_attention(width, rank)
        self.gate_video = nn.Parameter(torch.zeros(width))
        self.gate_audio = nn.Parameter(torch.zeros(width))
        self.time = nn.Linear(64, width)
        self.exchange = TimeExchange(width, exchange, frames, columns, rows) if exchange else None
        centres = (torch.arange(columns, dtype=torch.float64) + 0.5) * frames / columns - 0.5  # in frames
        self.register_buffer("frame_times", sincos_1d(64, torch.arange(frames) * 4), persistent=False)
        self.register_buffer("column_times", sincos_1d(64, centres * 4).repeat_interleave(rows, 0), persistent=False)

    def forward(self, attn: Attention, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Modulated tokens (B, F, N, D) and (B, M, D) to what is added to each."""
        frames, side = video.shape[1], math.isqrt(video.shape[2])
        cells = {"p": self.pool, "q": self.pool, "h": side // self.pool}
        joint_video = video if self.pool == 1 else reduce(video, "b f (h p w q) d -> b f (h w) d", "mean", **cells)
        joint_video = joint_video + self.time(self.frame_times.to(video.dtype)).unsqueeze(1)
        joint_audio = audio + self.time(self.column_times.to(audio.dtype))
        joint = attn(torch.cat([joint_video.flatten(1, 2), joint_audio], 1), self.attention)  # (B, F·N/pool² + M, D)
        from_sound, from_picture = joint.split([joint.shape[1] - audio.shape[1], audio.shape[1]], 1)
        from_sound = (self.gate_video * from_sound).unflatten(1, (frames, -1))
        from_picture = self.gate_audio * from_picture
        if self.pool > 1:
            from_sound = repeat(from_sound, "b f (h w) d -> b f (h p w q) d", **cells)
        if self.exchange is not None:
            for_video, for_audio = self.exchange(video, audio)
            from_sound, from_picture = from_sound + for_video, from_picture + for_audio
        return from_sound, from_picture


class BlockAdapters(nn.Module):
    """Everything that trains in one block; a width or a rank of 0 leaves that part out."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        temporal_width: int,
        temporal_rank: int = 0,
        rank: int,
        image_rank: int = 0,
        frames: int,
        interaction: Interaction | None,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__()
        self.anchor = anchor
        self.temporal = None
        if temporal_width:
            self.temporal = TemporalAttention(width, temporal_width, frames, rank=temporal_rank)
        self.audio_attention = self.audio_mlp = self.audio_modulation = None
        if rank:
            self.audio_attention = lora_for_attention(width, rank)
            self.audio_mlp = lora_for_mlp(width, hidden, rank)
            self.audio_modulation = LoRA(width, 6 * width, rank)
        self.image_attention = self.image_mlp = None
        if image_rank:
            self.image_attention = lora_for_attention(width, image_rank)
            self.image_mlp = lora_for_mlp(width, hidden, image_rank)
        self.interaction = interaction
