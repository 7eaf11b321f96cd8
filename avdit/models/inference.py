"""The joint model folded for sampling on a CPU: the same function in fewer and larger operations.

:class:`AVDiT` says what is computed, for readers and for training. Here the same is prepared once for given weights:

* low-rank updates are added to the weights that they update, so that sound goes through plain linear layers;
* the modulation of all blocks is one product, made for the few distinct timesteps of a step of sampling;
* linear layers keep their weights in oneDNN's own layout, with the GELU inside of the product;
* attention is two batched products, which over short sequences beat the fused call, and means are products too.
"""

import copy
import math
from collections.abc import Callable, Collection
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from avdit.models.adapters import (
    UNHEEDED,
    Anchor,
    BlockAdapters,
    Interaction,
    LoRA,
    TemporalAttention,
    TimeExchange,
    beside,
)
from avdit.models.avdit import AVDiT, Seen
from avdit.models.dit import Attention, DiTBlock, Mlp

KNOWN = 64  # modulations of (timesteps, classes) that are kept: a stream comes back to the same few
LARGEST = 100_000_000  # parameters of a model that is folded: the folded weights stand in memory beside the others
ROWS = 1024  # of the inputs that oneDNN is told of when it chooses a layout: tokens of a clip's picture
_ONEDNN = torch.ops.mkldnn
Layer = Callable[[Tensor], Tensor]
Modulations = list[tuple[Tensor, ...]]  # of each block, and last of the final layer


def can_fold(model: AVDiT) -> bool:
    """Whether ``model`` is on the CPU for good, and small enough to stand there twice."""
    moved = hasattr(model, "_hf_hook")  # to a GPU and back with each call
    return model.device.type == "cpu" and not moved and sum(p.numel() for p in model.parameters()) <= LARGEST


class FoldedAVDiT:
    """What ``model`` computes of picture and sound with its present weights, in ``dtype``."""

    @torch.no_grad()
    def __init__(self, model: AVDiT, dtype: torch.dtype) -> None:
        dit, adapters = model.backbone, model.adapters
        self.model, self.dtype = model, dtype
        self.blocks = [FoldedBlock(*pair, model, dtype) for pair in zip(dit.blocks, adapters, strict=True)]
        self.embed_video, self.embed_audio = (
            linear(part.proj.weight.flatten(1), part.proj.bias, dtype)
            for part in (dit.x_embedder, model.audio_embedder)
        )
        self.video_positions = dit.pos_embed.to(dtype)  # (1, N, D)
        self.audio_positions = model.audio_positions.to(dtype).unflatten(1, model.clip.audio_grid)
        layers = [block.adaLN_modulation[1] for block in dit.blocks]
        deltas = [part.audio_modulation for part in adapters]
        self.video_modulation = Modulation([*layers, dit.final_layer.adaLN_modulation[1]], [], dtype)
        self.audio_modulation = Modulation([*layers, model.audio_final.adaLN_modulation[1]], deltas, dtype)
        self.temporal_modulation = TemporalModulation([part.temporal for part in adapters], dtype)
        self.foley = None
        if model.foley is not None and model.foley_embedder.proj.weight.any():
            self.foley = copy.deepcopy(model.foley).to(dtype)
            proj = model.foley_embedder.proj
            self.embed_foley = linear(proj.weight.flatten(1), proj.bias, dtype)
        self.known_modulations: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}
        self.video_final, self.audio_final = (
            linear(*updated(part.linear), dtype) for part in (dit.final_layer, model.audio_final)
        )

    def __call__(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        t_video: Tensor | None,
        t_audio: Tensor | None,
        class_labels: Tensor,
        joint: bool = True,
        temporal: bool = True,
        blind: Collection[int] = (),
        keep: bool = False,
        seen: Seen | None = None,
    ) -> tuple[Tensor | None, Tensor | None] | tuple[Tensor | None, Tensor | None, Seen]:
        """The predictions for both, or for one alone, as :meth:`AVDiT.forward` gives them."""
        model, (time, frequency) = self.model, self.model.clip.audio_patch
        patch = model.backbone.config.patch_size
        with torch.autocast("cpu", enabled=False):
            nothing = (t_audio if t_video is None else t_video)[:, :0]
            none_or = (nothing if t is None else t for t in (t_video, t_audio))
            v, w, a = self.modulations(*none_or, class_labels)
            patches = partial(rearrange, pattern="b c (m p) (r q) -> b m r (c p q)", p=time, q=frequency)
            xv = xa = video_out = audio_out = None
            foley = None if seen is None else seen.foley
            if video is not None:
                xv = rearrange(video.to(self.dtype), "b f c (h p) (w q) -> b f (h w) (c p q)", p=patch, q=patch)
                xv = self.embed_video(xv) + self.video_positions  # (B, F, N, D)
                if joint and self.foley is not None and (keep or audio is not None):
                    c = model.backbone.t_embedder(t_video.flatten()).unflatten(0, t_video.shape)
                    c = (c + model.class_embedder(class_labels).unsqueeze(1)).to(self.dtype)
                    foley = self.embed_foley(patches(self.foley(video.to(self.dtype), c)))  # (B, columns, rows, D)
            if audio is not None:
                xa = self.embed_audio(patches(audio.to(self.dtype))) + self.audio_positions  # (B, columns, rows, D)
                if foley is not None:
                    xa = xa + foley
            kept = Seen([], foley)
            for i, (block, *told) in enumerate(zip(self.blocks, v[:-1], w, a[:-1], strict=True)):
                known = None if seen is None else seen.tokens[i]
                xv, xa, known = block(xv, xa, *told, joint, temporal, i in blind, known)
                kept.tokens.append(known if keep else None)
            if xv is not None:
                video_out = self.video_final(normalised(xv, *v[-1])).flatten(0, 1)  # (B·F, N, values)
                video_out = model.backbone.unpatchify(video_out)[:, : video.shape[2]]  # the variance half is dropped
                video_out = video_out.unflatten(0, video.shape[:2])
            if xa is not None:
                audio_out = self.audio_final(normalised(xa, *a[-1])).flatten(1, 2)  # (B, M, values)
                audio_out = model.unpatchify_audio(audio_out)
        return (video_out, audio_out, kept) if keep else (video_out, audio_out)

    def modulations(self, t_video: Tensor, t_audio: Tensor, class_labels: Tensor) -> tuple[Modulations, ...]:
        """Of timesteps (B, F) and (B, columns): of the picture, its temporal attention, and the sound.

        (B, F or 1, 1, D), (B, F or 1, 1, bottleneck) and (B, columns or 1, 1, D).

        A step of sampling has one timestep or, where something is given, two: each is computed once.
        """
        times, places = torch.unique(torch.cat([t_video, t_audio], 1), return_inverse=True)
        key = tuple(times.tolist()), tuple(class_labels.tolist())
        if key not in self.known_modulations:
            c = self.model.backbone.t_embedder(times) + self.model.class_embedder(class_labels).unsqueeze(1)
            c = c.to(self.dtype)  # (B, times, D)
            if len(self.known_modulations) >= KNOWN:
                self.known_modulations.clear()
            self.known_modulations[key] = (
                self.video_modulation(c),
                self.temporal_modulation(c),
                self.audio_modulation(c),
            )
        video, along, audio = self.known_modulations[key]
        if len(times) > 1:  # else one row serves every frame and column
            clips = torch.arange(len(places)).unsqueeze(1)
            frames = t_video.shape[1]
            video, along = video[clips, places[:, :frames]], along[clips, places[:, :frames]]
            audio = audio[clips, places[:, frames:]]
        return (
            self.video_modulation.split(video),
            self.temporal_modulation.split(along),
            self.audio_modulation.split(audio),
        )


class Modulation:
    """Shift, 1 + scale and gate of all blocks and of the final layer in one product: (B, T, D) → (B, T, all)."""

    def __init__(self, layers: list[nn.Linear], deltas: list[LoRA | None], dtype: torch.dtype) -> None:
        self.width, self.parts = layers[0].in_features, [layer.out_features for layer in layers]
        bias = torch.cat([layer.bias for layer in layers]).float()
        bias.view(-1, self.width)[1::3] += 1  # shift, scale, gate, shift, scale, gate; ...; shift, scale
        self.product = linear(torch.cat([layer.weight for layer in layers]), bias, dtype)
        self.update = None
        if any(delta is not None for delta in deltas):
            products = [delta.up.weight.float() @ delta.down.weight.float() for delta in deltas]
            update = F.pad(torch.cat(products), (0, 0, 0, self.parts[-1]))  # none of the final layer
            self.update = linear(update, torch.zeros(len(update)), dtype)

    def __call__(self, c: Tensor) -> Tensor:
        out = self.product(F.silu(c))
        return out if self.update is None else out + self.update(c)

    def split(self, table: Tensor) -> Modulations:
        """Of (B, T, all): six of (B, T, 1, D) a block, and two of the final layer."""
        return [part.split(self.width, -1) for part in table.unsqueeze(2).split(self.parts, -1)]


class TemporalModulation:
    """Shift, 1 + scale and 1 + gate of the temporal attention of all blocks in one product: (B, T, D) → (B, T, all).

    A model without it, or whose pack changes nothing there, has parts of no width.
    """

    def __init__(self, parts: list[TemporalAttention | None], dtype: torch.dtype) -> None:
        self.blocks, self.width = len(parts), 0
        updates = [part.modulation for part in parts if part is not None and part.modulation is not None]
        if any(update.up.weight.any() for update in updates):
            products = torch.cat([update.up.weight.float() @ update.down.weight.float() for update in updates])
            self.width = len(products) // (3 * self.blocks)
            bias = torch.tensor([0.0, 1.0, 1.0]).repeat_interleave(self.width).repeat(self.blocks)
            self.product = linear(products, bias, dtype)

    def __call__(self, c: Tensor) -> Tensor:
        return self.product(c) if self.width else c[..., :0]

    def split(self, table: Tensor) -> Modulations:
        """Of (B, T, all): three of (B, T, 1, bottleneck) a block, or none."""
        if not self.width:
            return [()] * self.blocks
        return [part.split(self.width, -1) for part in table.unsqueeze(2).chunk(self.blocks, -1)]


class FoldedBlock:
    """A block of the image transformer with its adapters."""

    def __init__(self, block: DiTBlock, adapters: BlockAdapters, model: AVDiT, dtype: torch.dtype) -> None:
        self.video_attention = FoldedAttention(block.attn, None, dtype)
        self.audio_attention = FoldedAttention(block.attn, adapters.audio_attention, dtype)
        self.video_mlp = folded_mlp(block.mlp, None, dtype)
        self.image_attention, self.image_mlp = self.video_attention, self.video_mlp
        updates = {**dict(adapters.image_attention or {}), **dict(adapters.image_mlp or {})}
        if any(update.up.weight.any() for update in updates.values()):
            self.image_attention = FoldedAttention(block.attn, adapters.image_attention, dtype)
            self.image_mlp = folded_mlp(block.mlp, adapters.image_mlp, dtype)
        self.audio_mlp = folded_mlp(block.mlp, adapters.audio_mlp, dtype)
        anchor = adapters.anchor
        heeded = anchor is not None and (anchor.bias > UNHEEDED).any()
        self.anchor = FoldedAnchor(anchor, self.video_attention, dtype) if heeded else None
        self.temporal = adapters.temporal and FoldedTemporal(adapters.temporal, dtype)
        self.interaction = adapters.interaction and FoldedInteraction(adapters.interaction, block.attn, model, dtype)

    def __call__(
        self,
        xv: Tensor | None,
        xa: Tensor | None,
        v: tuple[Tensor, ...],
        w: tuple[Tensor, ...],
        a: tuple[Tensor, ...],
        joint: bool,
        temporal: bool,
        blind: bool,
        seen: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tokens of the picture (B, F, N, D) and of the sound (B, columns, rows, D), under their modulations.

        Besides, those of the picture that the sound is told of; ``seen`` are such ones, kept, in place of a picture.
        """
        attention, mlp = (self.video_attention, self.video_mlp) if temporal else (self.image_attention, self.image_mlp)
        if blind:
            attention = attention.blind
        elif temporal and self.anchor is not None:
            attention = self.anchor
        if xv is not None:
            xv = torch.addcmul(xv, v[2], attention(normalised(xv, v[0], v[1])))
            if temporal and self.temporal is not None:
                xv = xv + self.temporal(xv, w)
        if xa is not None:
            heard = self.audio_attention(normalised(xa, a[0], a[1]).flatten(1, 2))  # (B, M, D)
            xa = torch.addcmul(xa, a[2], heard.view_as(xa))
        if joint and self.interaction is not None:
            if xv is not None:
                seen = normalised(xv, v[0], v[1])
            if xa is not None and seen is not None:
                xv, xa = self.interaction(xv, xa, seen, normalised(xa, a[0], a[1]))
        if xa is not None:
            xa = torch.addcmul(xa, a[5], self.audio_mlp(normalised(xa, a[3], a[4])))
        if xv is not None:
            xv = torch.addcmul(xv, v[5], mlp(normalised(xv, v[3], v[4])))
        return xv, xa, seen


class FoldedAttention:
    """:class:`Attention` with an adapter's update: (..., T, D) → (..., T, D)."""

    def __init__(self, attn: Attention, delta: nn.ModuleDict | None, dtype: torch.dtype) -> None:
        self.heads, delta = attn.heads, dict(delta or {})
        self.qkv = linear(*scaled(*updated(attn.qkv, delta.get("qkv")), attn.heads), dtype)
        self.proj = linear(*updated(attn.proj, delta.get("proj")), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.qkv(x), self.heads))

    def blind(self, x: Tensor) -> Tensor:
        """The same where every token sees itself alone."""
        return self.proj(self.qkv(x).chunk(3, -1)[2].contiguous())


class FoldedAnchor:
    """:class:`Anchor`, whose softmaxes over a frame's own tokens and those of other frames share their sum."""

    def __init__(self, anchor: Anchor, attention: FoldedAttention, dtype: torch.dtype) -> None:
        self.attention, self.update = attention, change(anchor.update, dtype)
        self.bias = anchor.bias.view(-1, 1, 1, 1).to(dtype)  # (heads, 1, 1, 1)
        self.neighbour_update = None
        if anchor.neighbour_update is not None and (anchor.neighbour_bias > UNHEEDED).any():
            self.neighbour_update = change(anchor.neighbour_update, dtype)
            self.neighbour_bias = anchor.neighbour_bias.view(-1, 1, 1, 1).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Modulated tokens (B, F, N, D) to what attention makes of them."""
        heads, (batch, frames, tokens, width) = self.attention.heads, x.shape
        qkv = self.attention.qkv(x)
        first = qkv[:, 0, :, width:] + self.update(x[:, 0])  # (B, N, 2D)
        q, k, v = rearrange(qkv, "b f n (three h d) -> three (b h) f n d", three=3, h=heads)
        first_k, first_v = rearrange(first, "b n (two h d) -> two (b h) n d", two=2, h=heads)
        # All frames ask the first one in one product.
        asked = (q.flatten(1, 2) @ first_k.transpose(1, 2)).unflatten(1, (frames, tokens)) + self.bias.repeat(
            batch, 1, 1, 1
        )
        scores, near_v = [q @ k.transpose(2, 3), asked], v[:, :, :0]
        if self.neighbour_update is not None:
            near = beside(qkv[..., width:] + self.neighbour_update(x))
            near_k, near_v = rearrange(near, "b f n (two h d) -> two (b h) f n d", two=2, h=heads)
            scores.append(q @ near_k.transpose(2, 3) + self.neighbour_bias.repeat(batch, 1, 1, 1))
        own, shared, near = torch.softmax(torch.cat(scores, -1), -1).split([tokens, tokens, near_v.shape[2]], -1)
        out = own @ v + near @ near_v if self.neighbour_update is not None else own @ v
        out = out.flatten(1, 2) + shared.flatten(1, 2) @ first_v  # (B·heads, F·N, d)
        return self.attention.proj(rearrange(out, "(b h) (f n) d -> b f n (h d)", b=batch, f=frames))


class FoldedTemporal:
    """:class:`TemporalAttention`, whose normalisation's own scale and shift are in the way down."""

    def __init__(self, temporal: TemporalAttention, dtype: torch.dtype) -> None:
        weight, bias = updated(temporal.down)
        norm, self.heads = temporal.norm, temporal.heads
        self.down = linear(weight * norm.weight.float(), bias + weight @ norm.bias.float(), dtype)
        self.positions = temporal.positions.to(dtype)
        self.qkv = linear(*scaled(*updated(temporal.qkv), self.heads), dtype)
        self.up = linear(*updated(temporal.up), dtype)

    def __call__(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Tokens (B, F, N, D) to what is added to them."""
        h = self.down(F.layer_norm(x, x.shape[-1:], eps=1e-6))  # (B, F, N, width)
        if modulation:
            shift, scale, gate = modulation
            h = torch.addcmul(shift, h, scale)
        h = h.transpose(1, 2) + self.positions[: x.shape[1]]
        h = attend(self.qkv(h), self.heads).transpose(1, 2)
        return self.up(h * gate if modulation else h)


class FoldedInteraction:
    """:class:`Interaction` with its gates in the projections and its means as a product."""

    def __init__(self, part: Interaction, attn: Attention, model: AVDiT, dtype: torch.dtype) -> None:
        tokens = model.backbone.pos_embed.shape[1]
        self.pool, self.side, self.heads = part.pool, math.isqrt(tokens) // part.pool, attn.heads
        cells = {"p": part.pool, "q": part.pool, "h": self.side}
        self.means = reduce(torch.eye(tokens), "(h p w q) n -> (h w) n", "mean", **cells).to(dtype)
        weight, bias = updated(part.time)
        self.frame_times = (part.frame_times.float() @ weight.T + bias).unsqueeze(1).to(dtype)  # (F, 1, D)
        self.column_times = (part.column_times.float() @ weight.T + bias).to(dtype)  # (M, D)
        self.qkv = linear(*scaled(*updated(attn.qkv, part.attention["qkv"]), attn.heads), dtype)
        weight, bias = updated(attn.proj, part.attention["proj"])
        self.to_video, self.to_audio = (
            linear(gate.unsqueeze(1) * weight, gate * bias, dtype)
            for gate in (part.gate_video.float(), part.gate_audio.float())
        )
        self.exchange = part.exchange and FoldedExchange(part.exchange, tokens, dtype)

    def __call__(self, xv: Tensor | None, xa: Tensor, video: Tensor, audio: Tensor) -> tuple[Tensor | None, Tensor]:
        """Tokens (B, F, N, D) and (B, columns, rows, D) with what their modulated form, beside them, adds to each.

        Without those of the picture, of which the modulated form was kept, the sound alone.
        """
        joint_video = (video if self.pool == 1 else self.means @ video) + self.frame_times  # (B, F, N/pool², D)
        joint_audio = audio.flatten(1, 2) + self.column_times  # (B, M, D)
        joint = attend(self.qkv(torch.cat([joint_video.flatten(1, 2), joint_audio], 1)), self.heads)
        for_video, for_audio = joint.split([joint.shape[1] - joint_audio.shape[1], joint_audio.shape[1]], 1)
        for_audio = self.to_audio(for_audio).view_as(audio)
        from_sound, from_picture = (0, 0) if self.exchange is None else self.exchange(video, audio)
        if xv is None:
            return None, xa + (for_audio + from_picture)
        for_video, for_audio = self.to_video(for_video).view_as(joint_video) + from_sound, for_audio + from_picture
        shape, cell = (*xv.shape[:2], self.side, self.pool, self.side, self.pool, -1), (self.side, 1, self.side, 1)
        return (xv.view(shape) + for_video.unflatten(2, cell)).view_as(xv), xa + for_audio


class FoldedExchange:
    """:class:`TimeExchange` with its mean over the tokens of a frame as a product."""

    def __init__(self, part: TimeExchange, tokens: int, dtype: torch.dtype) -> None:
        self.video_down, self.audio_down = (
            linear(*updated(layer), dtype, gelu=True) for layer in (part.video_down, part.audio_down)
        )
        self.video_up, self.audio_up = (linear(*updated(layer), dtype) for layer in (part.video_up, part.audio_up))
        self.mean = torch.full((1, tokens), 1 / tokens, dtype=dtype)
        self.to_columns, self.to_frames = part.to_columns.to(dtype), part.to_frames.to(dtype)

    def __call__(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, F, N, D) and (B, columns, rows, D) to what is added: (B, F, 1, D) and (B, columns, 1, D)."""
        seen = (self.mean @ self.video_down(video)).squeeze(2)  # (B, F, features)
        heard = self.audio_down(audio).mean(2)  # (B, columns, features)
        for_video, for_audio = self.video_up(self.to_frames @ heard), self.audio_up(self.to_columns @ seen)
        return for_video.unsqueeze(2), for_audio.unsqueeze(2)


def folded_mlp(mlp: Mlp, delta: nn.ModuleDict | None, dtype: torch.dtype) -> Layer:
    """:class:`Mlp` with an adapter's update."""
    delta = dict(delta or {})
    fc1 = linear(*updated(mlp.fc1, delta.get("fc1")), dtype, gelu=True)
    fc2 = linear(*updated(mlp.fc2, delta.get("fc2")), dtype)
    return lambda x: fc2(fc1(x))


def updated(layer: nn.Linear, delta: LoRA | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``layer`` with the low-rank update ``delta``, in 32-bit floats."""
    weight, bias = layer.weight.float(), layer.bias.float()
    return weight if delta is None else weight + delta.up.weight.float() @ delta.down.weight.float(), bias


def change(delta: LoRA, dtype: torch.dtype) -> Layer:
    """A low-rank update as one linear layer."""
    weight = delta.up.weight.float() @ delta.down.weight.float()
    return linear(weight, torch.zeros(len(weight)), dtype)


def scaled(weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer to queries, keys and values, with the scores' scale in the queries."""
    width = len(bias) // 3
    scale = torch.ones(len(bias))
    scale[:width] = (width // heads) ** -0.5
    return weight * scale.unsqueeze(1), bias * scale


def linear(weight: Tensor, bias: Tensor, dtype: torch.dtype, gelu: bool = False) -> Layer:
    """A linear layer in ``dtype``, with a tanh-approximated GELU behind it or not."""
    weight, bias = weight.to(dtype), bias.to(dtype)
    if dtype is torch.bfloat16 and torch.backends.mkldnn.is_available() and _ONEDNN._is_mkldnn_bf16_supported():
        after = ("gelu", [], "tanh") if gelu else ("none", [], "")
        packed = _ONEDNN._reorder_linear_weight(weight, ROWS)
        return lambda x: _ONEDNN._linear_pointwise(x, packed, bias, *after)
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return lambda x: F.linear(x, weight, bias)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention over (..., T, 3·D), whose queries are scaled already: (..., T, D)."""
    *leading, length, width = qkv.shape
    q, k, v = rearrange(qkv.view(-1, length, width), "n t (three h d) -> three (n h) t d", three=3, h=heads)
    out = torch.softmax(q @ k.transpose(1, 2), -1) @ v  # (N·heads, T, d)
    return rearrange(out, "(n h) t d -> n t (h d)", h=heads).view(*leading, length, width // 3)


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens, normalised, times ``scale`` (1 is in it already) plus ``shift``."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
