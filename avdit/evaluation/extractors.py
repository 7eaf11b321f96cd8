"""Feature networks that a user has as files: FVD's I3D, FAD's AudioCLIP and VGGish, and any TorchScript archive.

Whatever else there is can stand behind the same figures from Python: any function from a batch of clips to vectors
(see :mod:`avdit.evaluation.frechet`). A TorchScript archive is a program: load only what you trust.
"""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avdit.evaluation.audioclip import AudioCLIP
from avdit.evaluation.frechet import Extractor
from avdit.evaluation.vggish import VGGish
from avdit.models.published import fill

I3D_SIZE = 224  # pixels a side


@dataclass(frozen=True)
class Features:
    """An extractor with the name and the settings that are printed beside every figure made with it."""

    name: str
    extract: Extractor
    settings: dict[str, int]


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive; one that does not exist is said here.

    Raises:
        ValueError: where there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"feature network {path} does not exist")
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _archive(path: Path, device: torch.device | str) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError:
        raise ValueError(f"feature network {path} is not a TorchScript archive") from None


def _published(path: Path) -> tuple[str, nn.Module]:
    """AudioCLIP's or VGGish's network of sounds, with its published weights, and what it is called.

    Raises:
        ValueError: where the file cannot be read as weights alone, or naming the first key that does not fit.
    """
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"feature network {path} is neither a TorchScript archive nor weights alone") from error
    if not isinstance(state, dict):
        raise ValueError(f"feature network {path} holds no table of tensors: expected weights of AudioCLIP or VGGish")
    if any(name.startswith("audio.") for name in state):  # beside CLIP's networks of pictures and of text
        fixed = ("window", "fbsp.bias")  # the window is computed here, and the bias has no elements
        state = {name.removeprefix("audio."): value for name, value in state.items() if name.startswith("audio.")}
        state = {name: value for name, value in state.items() if name not in fixed}
        name, network = "AudioCLIP", AudioCLIP()
    else:
        name, network = "VGGish", VGGish()
    fill(network, state, f"feature network {path} does not fit {name}")
    told = {"AudioCLIP": ", sound at 44.1 kHz, FAD x 10,000", "VGGish": ", examples of 0.96 s every 0.5 s"}
    return f"{name} ({path.name}){told[name]}", network.eval()


def _called(name: str, network: nn.Module, *args: Tensor | bool) -> Tensor:
    try:
        with torch.no_grad():
            return network(*args).float().cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"feature network {name} failed: {str(error).strip().splitlines()[-1]}") from error


def video_features(path: Path, device: torch.device | str = "cpu") -> Features:
    """A network of pictures: called with (B, 3, F, 224, 224) in [-1, 1], it gives (B, d).

    The published I3D archive takes three switches after the clips (rescale, resize, return_features); they are given
    where its signature has them.

    Raises:
        ValueError: where the file is missing, is no archive, or cannot be called so.
    """
    if not _is_archive(path):
        raise ValueError(f"feature network {path} is not a TorchScript archive")
    network = _archive(path, device)
    switches = (False, False, True) if len(network.forward.schema.arguments) > 2 else ()

    def extract(frames: Tensor) -> Tensor:
        pictures = frames.flatten(0, 1).movedim(-1, 1)
        # Without antialiasing, as the field's code and the archive itself do it.
        pictures = F.interpolate(pictures, (I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False)
        clips = pictures.unflatten(0, frames.shape[:2]).movedim(2, 1) * 2 - 1
        return _called(path.name, network, clips.to(device), *switches)

    return Features(path.name, extract, {"size": I3D_SIZE})


def audio_features(path: Path, device: torch.device | str = "cpu") -> Features:
    """A network of sounds: called with (B, samples) at the model's rate, it gives (B, d) or (B, windows, d).

    Args:
        path: A TorchScript archive, or the published weights of AudioCLIP or VGGish.

    Raises:
        ValueError: where the file is missing, is neither, or cannot be called so.
    """
    name, network = (path.name, _archive(path, device)) if _is_archive(path) else _published(path)
    network = network.to(device)
    return Features(name, lambda audio: _called(path.name, network, audio.to(device)), {})
