"""The image diffusion transformer (Peebles & Xie 2023, arXiv 2212.09748) in the published parameter layout."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from avdit.models.config import PortableConfig

SHORT_SEQUENCE = 128  # up to here plain softmax attention trains faster than the fused call on a CPU


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift normalised tokens ``x`` (N, T, D) by (N, 1 or T, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over (N, heads, T, d); ``bias`` is added to the scores (N, heads, T, T'), over which it broadcasts."""
    if q.device.type == "cpu" and q.shape[-2] <= SHORT_SEQUENCE and torch.is_grad_enabled():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores if bias is None else scores + bias, -1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """Sine-cosine embedding (n, width) of ``positions`` (n,)."""
    frequencies = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double().unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_2d(width: int, rows: int, columns: int) -> Tensor:
    """Fixed positions (1, rows x columns, width): the first half of the width codes the column, as published."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sincos_1d(width // 2, x.flatten()), sincos_1d(width // 2, y.flatten())], 1).unsqueeze(0)


class PatchEmbed(nn.Module):
    """Tokens of non-overlapping patches: (N, C, H, W) → (N, T, D)."""

    def __init__(self, patch: int | tuple[int, int], in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep features through an MLP: (N,) → (N, D).

    ``shift`` 1 spreads the frequencies as diffusers' DiT does, 0 as the original code.
    """

    def __init__(self, width: int, shift: int = 0, features: int = 256) -> None:
        super().__init__()
        self.features, self.shift = features, shift
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - self.shift))
        angles = t.float().unsqueeze(1) * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class table whose last row is the unconditional class: (N,) → (N, D)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention; ``delta`` adds the low-rank updates of an adapter.

    A ``blind`` one lets every token see itself alone (perturbed attention: Ahn et al. 2024, arXiv 2403.17377).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, delta: nn.ModuleDict | None = None, blind: bool = False) -> Tensor:
        qkv = self.qkv(x) if delta is None else self.qkv(x) + delta["qkv"](x)  # (N, T, 3D)
        if blind:
            x = qkv.chunk(3, -1)[2]
        else:
            q, k, v = rearrange(qkv, "n t (three heads d) -> three n heads t d", three=3, heads=self.heads)
            x = rearrange(attend(q, k, v), "n heads t d -> n t (heads d)")
        return self.proj(x) if delta is None else self.proj(x) + delta["proj"](x)


class Mlp(nn.Module):
    """Two linear layers round a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, delta: nn.ModuleDict | None = None) -> Tensor:
        hidden = self.fc1(x) if delta is None else self.fc1(x) + delta["fc1"](x)
        hidden = F.gelu(hidden, approximate="tanh")
        return self.fc2(hidden) if delta is None else self.fc2(hidden) + delta["fc2"](hidden)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift, scale and gate of attention and MLP, (..., D) each, for conditioning ``c`` (..., D)."""
        return self.adaLN_modulation(c).chunk(6, dim=-1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c.unsqueeze(1))
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # (N, T, D)
        x = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """Modulated projection of tokens to the values of their patch: (N, T, D) → (N, T, values)."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project ``x`` (N, T, D) under the conditioning ``c`` (N, 1 or T, D)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(ModelMixin, PortableConfig):
    """Diffusion transformer over image latents.

    Args:
        input_size: Latent cells a side.
        patch_size: Latent cells a token, each way.
        in_channels: Latent channels.
        num_classes: Classes; label ``num_classes`` is the unconditional one.
        learn_sigma: Whether the output carries a variance beside the prediction (published weights: yes).
        timestep_shift: 1 where the model must equal diffusers' own, 0 as in the original code.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        timestep_shift: int = 0,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        grid = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid, grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "DiT":
        """Build a registered size, e.g. ``DiT-XL/2``.

        Raises:
            ValueError: for a name that is not registered.
        """
        if name not in SIZES:
            raise ValueError(f"unknown model {name!r}: choose one of {', '.join(SIZES)}")
        return cls(**{**SIZES[name], **overrides})

    def initialize_weights(self) -> None:
        # Transformer layers as published: Xavier, no bias.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding like a linear layer.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the output as zero.
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def compile_blocks(self) -> None:
        """Compile the blocks, once for all."""
        for block in self.blocks:
            block.compile()

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patch values (N, T, p·p·C) to a map (N, C, H, W)."""
        p, side = self.config.patch_size, math.isqrt(x.shape[1])
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", h=side, p=p, q=p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict from noised latents ``x`` (N, C, H, W), timesteps ``t`` (N,) and labels ``y`` (N,)."""
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c.unsqueeze(1)))  # (N, out, H, W)


_WIDTHS = {"XS": (256, 8, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SIZES: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    for size, (width, depth, heads) in _WIDTHS.items()
    for patch in (2, 4, 8)
}
