"""Published weights by hub name or path: what a download means is said first, and every key must fit."""

import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*")
WEIGHTS = ("diffusion_pytorch_model", "pytorch_model", "model")
# Layouts of today hold all that is needed; older ones add fixed values, which are computed here.
IGNORED = {"pos_embed.pos_embed", "mean", "scale"}


@dataclass(frozen=True)
class Download:
    """Files of a hub repository that are not on this machine yet."""

    repo: str
    files: tuple[str, ...]
    bytes: int
    licence: str

    def __str__(self) -> str:
        return f"{self.repo} ({self.bytes / 1e9:.2f} GB, licence {self.licence})"


def needed_files(names: Iterable[str], part: str) -> list[str]:
    """Of the file ``names`` of a repository, those of its model ``part``: config, weights and their index.

    The part is the folder of that name, or the whole repository where it holds one model. Safetensors go before
    .bin files, which are read as weights alone; half-precision copies are left out.

    Raises:
        ValueError: where there is no such model.
    """
    names = sorted(names)
    folder = f"{part}/" if f"{part}/config.json" in names else ""
    own = [name for name in names if name.startswith(folder) and "/" not in name[len(folder) :]]
    for suffix in (".safetensors", ".bin"):
        pattern = re.compile(rf"({'|'.join(WEIGHTS)})(-\d+-of-\d+)?\{suffix}(\.index\.json)?")
        weights = [name for name in own if pattern.fullmatch(name[len(folder) :])]
        if weights and f"{folder}config.json" in own:
            return [f"{folder}config.json", *weights]
    raise ValueError(f"it has no model in {part}: config.json and safetensors are needed")


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` is no path that exists but may be a repository, ``owner/name``."""
    text = str(source)
    if Path(text).exists() or Path(text).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return False
    return HUB_NAME.fullmatch(text) is not None


def cached_folder(repo: str, part: str) -> Path | None:
    """The folder of ``part`` in the hub's cache, where it is there whole."""
    for name in (f"{part}/config.json", "config.json"):
        config = try_to_load_from_cache(repo, name)
        if isinstance(config, str):
            folder = Path(config).parent
            try:
                needed_files([path.name for path in folder.iterdir()], part)
            except ValueError:
                continue
            return folder
    return None


def plan(repo: str, part: str) -> Download:
    """Ask the hub what ``part`` of a repository holds.

    Raises:
        ValueError: where the hub cannot be reached or has no such model.
    """
    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except (HTTPError, OSError) as error:
        raise ValueError(f"{repo} is neither a path nor a model that can be fetched from the hub") from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    try:
        files = needed_files(sizes, part)
    except ValueError as error:
        raise ValueError(f"{repo} cannot be used: {error}") from None
    licence = getattr(info.card_data, "license", None) or "not stated: see its page"
    return Download(repo, tuple(files), sum(sizes[name] for name in files), str(licence))


def locate(parts: Sequence[tuple[str | Path, str]], accept_licences: bool = False) -> list[Path]:
    """Folders or files of every ``(source, part)``; a source is a path or a hub name.

    Nothing is downloaded before all that would be is named with its licence and size and was accepted.

    Raises:
        ValueError: where a source does not exist, or a download was not accepted.
    """
    found: list[Path | Download] = []
    for source, part in parts:
        path = Path(source)
        if path.is_dir() and (path / part / "config.json").is_file():
            path = path / part
        if path.exists():
            found.append(path)
        elif not is_hub_name(source):
            raise ValueError(f"{source} does not exist: give a folder, a file of weights or a hub name")
        else:
            found.append(cached_folder(str(source), part) or plan(str(source), part))
    wanted = [place for place in found if isinstance(place, Download)]
    if wanted and not accept_licences:
        raise ValueError(
            f"to be downloaded: {'; '.join(map(str, wanted))}: read the licences on the hub, "
            "then say --accept-licences to fetch them"
        )
    return [fetch(place) if isinstance(place, Download) else place for place in found]


def fetch(download: Download) -> Path:
    """Download and give the folder of the model."""
    try:
        root = Path(snapshot_download(download.repo, allow_patterns=list(download.files)))
    except (HTTPError, OSError) as error:
        raise ValueError(f"{download.repo} could not be fetched: {str(error).splitlines()[0]}") from error
    return (root / download.files[0]).parent


def load_checked(kind: type, folder: Path) -> Any:
    """A diffusers or transformers model from ``folder``, every weight of it taken from the file and none left over.

    Raises:
        ValueError: where the folder holds another kind of model, or naming the first key that does not fit.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of one {kind.__name__}")
    try:
        config = json.loads((folder / "config.json").read_text())
        declared = config.get("_class_name") or (config.get("architectures") or [kind.__name__])[0]
        if declared != kind.__name__ and (declared, config.get("norm_type")) != ("Transformer2DModel", "ada_norm_zero"):
            raise ValueError(f"{folder} holds a {declared}: expected {kind.__name__}")
        with quiet():
            model, info = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
            )
    except (OSError, RuntimeError, AttributeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]}") from error
    for reason, keys in (("missing", info["missing_keys"]), ("unknown", info["unexpected_keys"])):
        for key in sorted(set(keys) - IGNORED):
            raise ValueError(f"{folder} does not fit {kind.__name__}: {key!r} is {reason}")
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{folder} does not fit {kind.__name__}: {key!r} is {tuple(found)}, not {tuple(wanted)}")
    return model.eval()


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load ``state`` into ``model``, all of it and nothing else.

    Raises:
        ValueError: beginning with ``what`` and naming the first key that is missing, unknown or of another shape.
    """
    own = model.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{what}: {name!r} is {'missing' if name in own else 'unknown'}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(f"{what}: {name!r} is {tuple(state[name].shape)}, not {tuple(value.shape)}")
    model.load_state_dict(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' bars and long reports of wrong keys: one sentence names the first."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
