"""AV-DiT: one frozen image transformer that denoises a clip's frames and its sound together."""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from avdit.geometry import ClipGeometry
from avdit.models.adapters import UNHEEDED, Anchor, BlockAdapters, Interaction
from avdit.models.config import PortableConfig
from avdit.models.dit import DiT, DiTBlock, FinalLayer, LabelEmbedder, PatchEmbed, modulate, sincos_2d
from avdit.models.foley import Foley

# Parts of names of what a pack may lack.
OPTIONAL = ".anchor.bias", ".anchor.update", ".anchor.neighbour_", ".temporal.modulation.", ".image_", "foley"
# A parameter of each of these, as long as the setting of its name says.
OPTIONAL_SIZES = {
    "anchor_rank": "adapters.0.anchor.update.down.weight",
    "neighbour_rank": "adapters.0.anchor.neighbour_update.down.weight",
    "temporal_rank": "adapters.0.temporal.modulation.down.weight",
    "image_rank": "adapters.0.image_attention.qkv.down.weight",
    "foley_width": "foley.project.weight",
}
# Names of what is zero where a part changes nothing and has learned nothing.
IDLE = {
    "temporal_rank": r"\.temporal\.modulation\.up\.",
    "image_rank": r"\.image_.*\.up\.",
    "foley_width": r"foley\.out\.|foley_embedder\.",
}


class Seen(NamedTuple):
    """What sound is told of a picture, kept from one look for later ones: a picture that is done stays as it is."""

    tokens: list[Tensor | None]  # of each block, modulated, (B, F, N, D); None where a block tells the sound nothing
    foley: Tensor | None  # what is added to the sound's tokens, (B, M, D)


class AVDiT(ModelMixin, PortableConfig):
    """The joint model of arXiv 2406.07686: a frozen :class:`DiT` and the adapters in and round it.

    Args:
        dit: Configuration of the :class:`DiT`.
        geometry: Fields of :class:`ClipGeometry`.
        num_classes: Classes of the clips; label ``num_classes`` is the unconditional one.
        temporal_width: Bottleneck of the temporal attention; 0: none.
        lora_rank: Rank of the audio branch's updates; 0: none.
        interaction_rank: Rank of the joint attention's updates.
        interaction_every: The joint attention sits in every so-manieth block; 0: in none.
        interaction_pool: It sees the picture as means of so many tokens each way.
        exchange_features: Features of the exchange between each frame and the sound of its moment; 0: none.
        anchor_rank: Rank of the updates of the first frame's keys and values, which every frame sees; 0: none sees it.
        neighbour_rank: The same of the frames before and after, which every frame sees beside its own and the first.
        temporal_rank: Rank of what timestep and class change in the temporal attention; 0: nothing.
        image_rank: Rank of the updates of attention and MLP in frames that do not know of each other, which are images:
            what a pack's images have beyond those that the backbone makes; 0: nothing.
        foley_width: Features of the network that tells from the picture what its sound may be; 0: none does.
        shared_noise: Share of the noise's variance that all frames have in common (see
            :func:`avdit.models.noise.draw_noise`).

    Raises:
        ValueError: for a share that is not from 0 to 1, or neighbours without an anchor.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        dit: dict[str, Any],
        geometry: dict[str, Any],
        num_classes: int = 9,
        temporal_width: int = 128,
        lora_rank: int = 16,
        interaction_rank: int = 16,
        interaction_every: int = 2,
        interaction_pool: int = 1,
        exchange_features: int = 0,
        anchor_rank: int = 0,
        neighbour_rank: int = 0,
        temporal_rank: int = 0,
        image_rank: int = 0,
        foley_width: int = 0,
        shared_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= shared_noise <= 1:
            raise ValueError(f"shared_noise = {shared_noise!r} must be from 0 to 1")
        if neighbour_rank and not anchor_rank:
            raise ValueError(f"neighbour_rank {neighbour_rank!r} needs an anchor_rank of 1 or more")
        self.gradient_checkpointing = False
        self.backbone = DiT.from_config(dit)
        self.clip = clip = ClipGeometry(**{k: v for k, v in geometry.items() if k != "samples"})
        shape = self.backbone.config
        width, hidden = shape.hidden_size, int(shape.hidden_size * shape.mlp_ratio)
        columns, rows = clip.audio_grid
        self.class_embedder = LabelEmbedder(num_classes, width)
        self.audio_embedder = PatchEmbed(clip.audio_patch, clip.audio_channels, width)
        self.register_buffer("audio_positions", sincos_2d(width, columns, rows), persistent=False)

        def interaction(block: int) -> Interaction | None:
            if not interaction_every or block % interaction_every != interaction_every - 1:
                return None
            options = {"pool": interaction_pool, "exchange": exchange_features}
            return Interaction(width, interaction_rank, clip.frames, columns, rows, **options)

        def anchor() -> Anchor | None:
            if not anchor_rank:
                return None
            return Anchor(width, shape.num_heads, anchor_rank, neighbour_rank=neighbour_rank)

        sizes = {"temporal_width": temporal_width, "temporal_rank": temporal_rank}
        sizes |= {"rank": lora_rank, "image_rank": image_rank, "frames": clip.frames}
        self.adapters = nn.ModuleList(
            BlockAdapters(width, hidden, **sizes, interaction=interaction(i), anchor=anchor())
            for i in range(shape.depth)
        )
        self.audio_final = FinalLayer(width, clip.audio_patch[0] * clip.audio_patch[1] * clip.audio_channels)
        nn.init.zeros_(self.audio_final.linear.weight)
        nn.init.zeros_(self.audio_final.linear.bias)
        self.foley = self.foley_embedder = None
        if foley_width:
            self.foley = Foley(clip, foley_width, width)
            self.foley_embedder = PatchEmbed(clip.audio_patch, clip.audio_channels, width)
            nn.init.zeros_(self.foley_embedder.proj.weight)
            nn.init.zeros_(self.foley_embedder.proj.bias)
        self.freeze_backbone()

    @classmethod
    def from_backbone(
        cls, backbone: DiT, geometry: ClipGeometry, classes: list[int] | None = None, **config: Any
    ) -> "AVDiT":
        """Put fresh adapters round a trained backbone.

        Args:
            classes: The backbone's class that each class starts from; its own order where it has as many classes,
                else its unconditional class for all.
        """
        shape = {k: v for k, v in backbone.config.items() if not k.startswith("_")}
        model = cls(dit=shape, geometry=geometry.as_dict(), **config)
        model.backbone.load_state_dict(backbone.state_dict())
        count, known = model.config.num_classes, backbone.config.num_classes
        if classes is None:
            classes = list(range(count)) if known == count else [known] * count
        rows = backbone.y_embedder.embedding_table.weight.detach()
        with torch.no_grad():
            model.class_embedder.embedding_table.weight.copy_(rows[[*classes, known]])
        return model

    def with_parts(self, **ranks: int) -> "AVDiT":
        """The same model with fresh parts that it lacks, ``anchor_rank``, ``image_rank`` and so on; 0: without."""
        shape = {k: v for k, v in self.config.items() if not k.startswith("_")}  # "_" says what defaults stood for
        model = type(self)(**{**shape, **ranks})
        model.load_state_dict(self.state_dict(), strict=False)
        # As diffusers' own ``to`` does, which warns of parts that should stay in 32-bit floats and names none.
        return nn.Module.to(model, self.device, self.dtype).train(self.training)

    def with_parts_for(self, state: dict[str, Tensor]) -> "AVDiT":
        """A model with the parts that the pack ``state`` has and this one lacks, of no effect yet; or this model."""
        sizes = {setting: name for setting, name in OPTIONAL_SIZES.items() if not self.config[setting]}
        lacks = {setting: len(state[name]) for setting, name in sizes.items() if name in state}
        if not lacks:
            return self
        model = self.with_parts(**lacks)
        model.load_adapter_state_dict(self.adapter_state_dict())
        return model

    def without_idle_parts(self) -> "AVDiT":
        """A model without those optional parts that change nothing here; this one where there are none."""
        own = self.adapter_state_dict()
        idle = {}
        for setting, names in IDLE.items():
            if self.config[setting] and not any(value.any() for name, value in own.items() if re.search(names, name)):
                idle[setting] = 0
        return self.with_parts(**idle) if idle else self

    def freeze_backbone(self) -> None:
        """Only the adapters of clips want a gradient.

        Those of images see no clip (training/images.py), and what listens to the picture learns apart
        (training/foley.py).
        """
        self.backbone.requires_grad_(False)
        self.image_parts().requires_grad_(False)
        if self.foley is not None:
            self.foley.requires_grad_(False)

    def image_parts(self) -> nn.ModuleList:
        """The updates for images of all blocks; empty where there are none."""
        parts = [part for block in self.adapters for part in (block.image_attention, block.image_mlp)]
        return nn.ModuleList(part for part in parts if part is not None)

    def compile_blocks(self) -> None:
        """Compile what every block does, once for all blocks of a kind."""
        self._block = torch.compile(self._block)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        return [p for name, p in self.named_parameters() if not name.startswith("backbone.")]

    @property
    def trainable_share(self) -> float:
        """Share of all parameters that trains."""
        table = self.parameter_table()
        return 1 - table["backbone"] / sum(table.values())

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Everything but the backbone: the *pack* of one data set."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put another pack on the backbone in memory; its class table and its foley may have another size.

        A pack without anchors is one whose frames do not heed the first one, one without neighbours one whose frames do
        not heed those beside them, and one without modulation of the temporal attention, updates for images, or a
        network that tells the sound from the picture, one where these change nothing.

        Raises:
            ValueError: naming the first key that is wrong, missing or of another shape.
        """
        own, table = self.adapter_state_dict(), "class_embedder.embedding_table.weight"
        for part in OPTIONAL:
            if not any(part in name for name in state):
                state = {**state, **{name: without_effect(name, value) for name, value in own.items() if part in name}}
        foley, width = self.foley, len(state.get(OPTIONAL_SIZES["foley_width"], ()))
        if foley is not None and width not in (0, self.config.foley_width):
            foley = Foley(self.clip, width, own[table].shape[1]).to(self.device, self.dtype).requires_grad_(False)
            own |= {f"foley.{name}": value for name, value in foley.state_dict().items()}
        for name in sorted(own.keys() ^ state.keys()):
            raise ValueError(f"adapter pack does not fit: {name!r} is {'missing' if name in own else 'unknown'}")
        for name, value in state.items():
            if value.shape[name == table :] != own[name].shape[name == table :]:
                raise ValueError(
                    f"adapter pack does not fit: {name!r} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
                )
        if len(state[table]) != len(own[table]):
            embedder = LabelEmbedder(len(state[table]) - 1, own[table].shape[1])
            self.class_embedder = embedder.to(own[table].device, own[table].dtype)
            self.register_to_config(num_classes=len(state[table]) - 1)
        if foley is not self.foley:
            self.foley = foley
            self.register_to_config(foley_width=width)
        self.load_state_dict(state, strict=False)

    def parameter_table(self) -> dict[str, int]:
        """Parameters by component; all but ``backbone`` are tunable."""
        table = {"backbone": self.backbone, "audio in and out": nn.ModuleList([self.audio_embedder, self.audio_final])}
        counts = {name: sum(p.numel() for p in module.parameters()) for name, module in table.items()}
        counts["classes"] = sum(p.numel() for p in self.class_embedder.parameters())
        names = ["temporal", "audio_attention", "audio_mlp", "audio_modulation", "interaction", "anchor"]
        for name in [*names, "image_attention", "image_mlp"]:
            parts = [getattr(block, name) for block in self.adapters]
            counts[name.replace("_", " ")] = sum(p.numel() for m in parts if m is not None for p in m.parameters())
        heard = [part for part in (self.foley, self.foley_embedder) if part is not None]
        counts["foley"] = sum(p.numel() for part in heard for p in part.parameters())
        return counts

    def forward(
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
        """Predict for the noised latents of both, or of one alone where the other is None.

        Args:
            video: (B, F, C, H, W).
            audio: (B, C, time, frequency).
            t_video: Timestep of each frame, (B, F); 0 where the frame is given.
            t_audio: Timestep of each audio column, (B, columns); 0 where it is given.
            class_labels: (B,).
            joint: Whether picture and sound know of each other; if not, each is predicted as if it were alone.
            temporal: Whether the frames know of each other; if not, and not ``joint``, each is an image by itself, and
                as a pack's own images look.
            blind: Blocks in whose spatial attention every token of the picture sees itself alone.
            keep: Return besides what the sound is told of ``video``.
            seen: That, kept from a look before, in place of ``video``: the sound alone is computed.

        Returns:
            The predictions, shaped as ``video`` and ``audio``; and what was to be kept.
        """
        dit, rows = self.backbone, self.clip.audio_grid[1]
        label = self.class_embedder(class_labels).unsqueeze(1)  # (B, 1, D)
        xv = cv = xa = ca = video_out = audio_out = None
        if video is not None:
            xv = dit.x_embedder(video.flatten(0, 1)) + dit.pos_embed  # (B·F, N, D)
            cv = dit.t_embedder(t_video.flatten()).unflatten(0, t_video.shape) + label
            cv = cv.flatten(0, 1).unsqueeze(1)  # (B·F, 1, D)
        if audio is not None:
            xa = self.audio_embedder(audio) + self.audio_positions.to(audio.dtype)  # (B, M, D)
            ca = dit.t_embedder(t_audio.flatten()).unflatten(0, t_audio.shape) + label  # (B, columns, D)
        foley = None if seen is None else seen.foley
        if joint and self.foley is not None and xv is not None and (keep or xa is not None):
            foley = self.foley_embedder(self.foley(video, cv.view(*t_video.shape, -1)))
        if foley is not None and xa is not None:
            xa = xa + foley
        kept = Seen([], foley)
        for i, (block, adapters) in enumerate(zip(dit.blocks, self.adapters, strict=True)):
            told = None if seen is None else seen.tokens[i]
            state = (xv, xa, cv, ca, rows, joint, temporal, i in blind, told)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                xv, xa, told = self._gradient_checkpointing_func(self._block, block, adapters, *state)
            else:
                xv, xa, told = self._block(block, adapters, *state)
            kept.tokens.append(told if keep else None)
        if video is not None:
            video_out = dit.unpatchify(dit.final_layer(xv, cv))[:, : video.shape[2]]  # the variance half is dropped
            video_out = video_out.unflatten(0, video.shape[:2])
        if audio is not None:
            audio_out = self.audio_final(xa, ca.repeat_interleave(rows, 1))  # (B, M, values)
            audio_out = self.unpatchify_audio(audio_out)
        return (video_out, audio_out, kept) if keep else (video_out, audio_out)

    def _block(
        self,
        block: DiTBlock,
        adapters: BlockAdapters,
        xv: Tensor | None,
        xa: Tensor | None,
        cv: Tensor | None,
        ca: Tensor | None,
        rows: int,
        joint: bool,
        temporal: bool,
        blind: bool,
        seen: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        frames = self.clip.frames
        if xv is not None:
            v = block.modulation(cv)  # 6 × (B·F, 1, D)
            seen = modulate(block.norm1(xv), v[0], v[1])
            of_images = (None, None) if temporal else (adapters.image_attention, adapters.image_mlp)
            anchored = temporal and adapters.anchor is not None and not blind
            attended = adapters.anchor(block.attn, seen, frames) if anchored else block.attn(seen, of_images[0], blind)
            xv = xv + v[2] * attended
            if temporal and adapters.temporal is not None:
                xv = xv + adapters.temporal(xv, cv, frames)
        if xa is not None:
            a = block.adaLN_modulation(ca)
            if adapters.audio_modulation is not None:
                a = a + adapters.audio_modulation(ca)
            a = a.repeat_interleave(rows, 1).chunk(6, dim=-1)  # 6 × (B, M, D)
            xa = xa + a[2] * block.attn(modulate(block.norm1(xa), a[0], a[1]), adapters.audio_attention)
        if joint and adapters.interaction is not None:
            if xv is not None:
                seen = modulate(block.norm1(xv), v[0], v[1]).unflatten(0, (-1, frames))
            if xa is not None and seen is not None:
                heard = modulate(block.norm1(xa), a[0], a[1])
                from_sound, from_picture = adapters.interaction(block.attn, seen, heard)
                xa = xa + from_picture
                if xv is not None:
                    xv = xv + from_sound.flatten(0, 1)
        if xv is not None:
            xv = xv + v[5] * block.mlp(modulate(block.norm2(xv), v[3], v[4]), of_images[1])
        if xa is not None:
            xa = xa + a[5] * block.mlp(modulate(block.norm2(xa), a[3], a[4]), adapters.audio_mlp)
        return xv, xa, seen

    def unpatchify_audio(self, x: Tensor) -> Tensor:
        """Patch values (B, M, values) to latents (B, C, time, frequency)."""
        columns, (time, frequency) = self.clip.audio_grid[0], self.clip.audio_patch
        return rearrange(x, "b (m r) (p q c) -> b c (m p) (r q)", m=columns, p=time, q=frequency)


def without_effect(name: str, value: Tensor) -> Tensor:
    """What an adapter's parameter is where a pack has no such part, shaped as ``value``."""
    unheeded = ".anchor." in name and name.endswith("bias")
    return torch.full_like(value, UNHEEDED) if unheeded else torch.zeros_like(value)
