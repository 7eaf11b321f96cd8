"""Feature networks that a user has as files: the published I3D of FVD, VGGish of FAD, and any TorchScript archive.

Whatever else there is can stand behind the same figures from Python: any function from a batch of clips to one vector
a clip (see :mod:`avdit.evaluation.frechet`). A TorchScript archive is a program: load only what you trust.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from avdit.evaluation.frechet import Extractor, resized
from avdit.evaluation.vggish import VGGish

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


def _called(name: str, network: nn.Module, *args: Tensor | bool) -> Tensor:
    """The network's vectors, a mean over windows where it gives several a clip (B, windows, d)."""
    try:
        with torch.no_grad():
            out = network(*args)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"feature network {name} failed: {str(error).strip().splitlines()[-1]}") from error
    out = out.mean(1) if out.ndim == 3 else out
    return out.float().cpu()


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
        clips = resized(frames, I3D_SIZE).permute(0, 4, 1, 2, 3) * 2 - 1
        return _called(path.name, network, clips.to(device), *switches)

    return Features(path.name, extract, {"size": I3D_SIZE})


def audio_features(path: Path, device: torch.device | str = "cpu") -> Features:
    """A network of sounds: called with (B, samples) at the model's rate, it gives (B, d) or (B, windows, d).

    Args:
        path: A TorchScript archive, or the published weights of VGGish.

    Raises:
        ValueError: where the file is missing, is neither, or cannot be called so.
    """
    if _is_archive(path):
        name, network = path.name, _archive(path, device)
    else:
        name, network = f"VGGish ({path.name}), mean over windows of 0.96 s", VGGish.load(path).to(device)
    return Features(name, lambda audio: _called(path.name, network, audio.to(device)), {})
