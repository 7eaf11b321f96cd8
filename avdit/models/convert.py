"""Weights of the image transformer in other layouts: the published single file and diffusers' own model."""

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avdit.models.dit import SIZES, DiT
from avdit.models.published import fill, load_checked, locate

# Ours (as published) and diffusers' names, outside the blocks and in each of them.
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# diffusers keeps a copy of the embedders in every block.
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


def _pairs(depth: int) -> list[tuple[str, str]]:
    """(our name, diffusers' name) of everything that is the same tensor in both, in order."""
    pairs = [(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in _OUTER.items() for kind in ("weight", "bias")]
    for i in range(depth):
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                pairs.append((f"blocks.{i}.{ours}.{kind}", f"transformer_blocks.{i}.{theirs}.{kind}"))
    return pairs


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(rf"{prefix}\.(\d+)\.", name))), default=-1)


def _take(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"DiT weights do not fit: {name!r} is missing")
    return state[name]


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a ``DiTTransformer2DModel`` under our names, without the fixed positions.

    Raises:
        ValueError: naming the first key that is missing, unknown, or that differs between blocks' embedders.
    """
    depth = _depth(state, "transformer_blocks")
    ours = {name: _take(state, other) for name, other in _pairs(depth)}
    used = {other for _, other in _pairs(depth)} | {"pos_embed.pos_embed"}
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([_take(state, part) for part in parts])
            used.update(parts)
        for name, other in _EMBEDDERS.items():
            other = f"transformer_blocks.{i}.norm1.emb.{other}"
            value = _take(state, other)
            if not torch.equal(ours.setdefault(name, value), value):
                raise ValueError(
                    f"DiT weights do not fit: {other!r} differs from block 0's, and a DiT has one embedder"
                )
            used.add(other)
    for name in sorted(state.keys() - used):
        raise ValueError(f"DiT weights do not fit: {name!r} is unknown")
    return ours


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a :class:`DiT` under the names of ``DiTTransformer2DModel``, whose positions are computed.

    Raises:
        ValueError: naming the first key that is missing or unknown.
    """
    depth = _depth(state, "blocks")
    theirs = {other: _take(state, name) for name, other in _pairs(depth)}
    used = {name for name, _ in _pairs(depth)} | {"pos_embed", *_EMBEDDERS}
    for i in range(depth):
        for kind in ("weight", "bias"):
            name = f"blocks.{i}.attn.qkv.{kind}"
            for part, value in zip("qkv", _take(state, name).chunk(3), strict=True):
                theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] = value.clone()
            used.add(name)
        for name, other in _EMBEDDERS.items():
            theirs[f"transformer_blocks.{i}.norm1.emb.{other}"] = _take(state, name)
    for name in sorted(state.keys() - used):
        raise ValueError(f"DiT weights do not fit: {name!r} is unknown")
    return theirs


def diffusers_config(dit: DiT) -> dict[str, Any]:
    """Arguments of the ``DiTTransformer2DModel`` that takes the weights of ``dit``.

    That model computes the same where ``dit`` has ``timestep_shift`` 1; no argument of it gives the original spacing.
    """
    c = dit.config
    if c.mlp_ratio != 4:
        raise ValueError(f"mlp_ratio = {c.mlp_ratio} has no counterpart in DiTTransformer2DModel: 4 has")
    return {
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.hidden_size // c.num_heads,
        "in_channels": c.in_channels,
        "out_channels": dit.out_channels,
        "num_layers": c.depth,
        "sample_size": c.input_size,
        "patch_size": c.patch_size,
        "num_embeds_ada_norm": c.num_classes,
    }


def dit_from_diffusers(model: DiTTransformer2DModel) -> DiT:
    """A :class:`DiT` that computes what diffusers' model does, its spacing of the timestep's frequencies included."""
    c = model.config
    out_channels = c.out_channels or c.in_channels
    if out_channels not in (c.in_channels, 2 * c.in_channels):
        raise ValueError(f"out_channels = {out_channels} must be in_channels = {c.in_channels} or twice that")
    dit = DiT(
        input_size=c.sample_size,
        patch_size=c.patch_size,
        in_channels=c.in_channels,
        hidden_size=c.num_attention_heads * c.attention_head_dim,
        depth=c.num_layers,
        num_heads=c.num_attention_heads,
        num_classes=c.num_embeds_ada_norm,
        learn_sigma=out_channels != c.in_channels,
        timestep_shift=1,
    )
    return _fill(dit, from_diffusers(model.state_dict()))


def dit_from_state(state: Mapping[str, Tensor], num_heads: int | None = None) -> DiT:
    """A :class:`DiT` of the size that a published ``state`` has.

    Args:
        num_heads: Heads, which no tensor tells; by default those of the registered size of that width.

    Raises:
        ValueError: naming the first key that is missing, unknown or of another shape.
    """
    width, channels, patch, _ = _take(state, "x_embedder.proj.weight").shape
    heads = num_heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"width {width} is of no registered DiT ({', '.join(map(str, _HEADS))}): give num_heads")
    values = len(_take(state, "final_layer.linear.weight")) // patch**2
    if values not in (channels, 2 * channels):
        raise ValueError(
            f"DiT weights do not fit: 'final_layer.linear.weight' predicts {values} channels of {channels}"
        )
    dit = DiT(
        input_size=math.isqrt(_take(state, "pos_embed").shape[1]) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=_depth(state, "blocks"),
        num_heads=heads,
        mlp_ratio=len(_take(state, "blocks.0.mlp.fc1.weight")) / width,
        num_classes=len(_take(state, "y_embedder.embedding_table.weight")) - 1,
        learn_sigma=values != channels,
    )
    return _fill(dit, state)


def _fill(dit: DiT, state: Mapping[str, Tensor]) -> DiT:
    """Load ``state`` into ``dit``; positions may be absent, since they are fixed."""
    fill(dit, {"pos_embed": dit.pos_embed, **state}, "DiT weights do not fit")
    return dit.eval()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; a training checkpoint's averaged weights where it has them."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} must be a .safetensors, .pt or .pth file, or a folder of one model")
    try:
        # Published training checkpoints carry their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of weights alone: convert it to safetensors") from error
    for name in ("ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no table of tensors: expected the state of a DiT")
    return state


def load_dit(source: str | Path, num_heads: int | None = None, accept_licences: bool = False) -> DiT:
    """A :class:`DiT` from any layout.

    Args:
        source: A folder of our :class:`DiT`, of diffusers' ``DiTTransformer2DModel`` or of a pipeline with one in
            ``transformer``; a published file (.pt, .pth, .safetensors); or a hub name such as
            ``facebook/DiT-XL-2-256``.
        num_heads: Heads of a published file whose width is of no registered size.
        accept_licences: Whether a hub name may be downloaded.

    Raises:
        ValueError: where nothing can be read, a download was not accepted, or naming the first key that does not fit.
    """
    (path,) = locate([(source, "transformer")], accept_licences)
    if path.is_file():
        state = _read(path)
        if "proj_out_2.weight" in state:
            raise ValueError(f"{path} is in diffusers' layout: give the folder, whose config.json tells the heads")
        return dit_from_state(state, num_heads)
    if not (path / "config.json").exists():
        raise ValueError(f"{path} has no config.json: give a folder of one model or of a pipeline")
    if DiT.load_config(path).get("_class_name") == "DiT":
        return load_checked(DiT, path)
    return dit_from_diffusers(load_checked(DiTTransformer2DModel, path))
