"""What a pipeline folder says of itself, read in milliseconds: to load it takes seconds."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from avdit.geometry import ClipGeometry

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "avdit-xs"
PACK_FILE = "adapters.safetensors"
# In the metadata of that file, as JSON.
PACK_FACTS = "classes", "steps", "factorized", "compact", "eta", "image_steps", "eventful", "audio_lag"


@dataclass(frozen=True)
class Checkpoint:
    """The facts of a pipeline, which its page shows before the model is loaded.

    Args:
        packs: The classes of each pack by its name, the default pack first; turbo ones apart.
        turbo: By the names of packs the steps of their turbo adapters, where there are some.
    """

    folder: Path
    packs: dict[str, list[str]]
    turbo: dict[str, int]
    geometry: ClipGeometry

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read what diffusers and :class:`avdit.packs.PackMixin` have written into ``folder``.

        Raises:
            ValueError: where it is not a pipeline folder, or a file in it is damaged.
        """
        weight_files(folder)
        try:
            index = json.loads((folder / "model_index.json").read_text())
            sizes = json.loads((folder / "transformer" / "config.json").read_text())["geometry"]
            geometry = ClipGeometry(**{key: value for key, value in sizes.items() if key != "samples"})
            found = sorted(folder.glob(f"packs/*/{PACK_FILE}"))
            told = {path.parent.name: {"steps": None, **pack_facts(path)} for path in found}
            packs = {index["pack"]: index["classes"]}
            packs |= {name: facts["classes"] for name, facts in told.items() if facts["steps"] is None}
            turbo = {
                name: facts["steps"]
                for facts in told.values()
                for name in packs
                if facts["steps"] and packs[name] == facts["classes"]
            }
        except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"checkpoint {folder} cannot be loaded: {error!r}") from error
        return cls(folder, packs, turbo, geometry)

    @property
    def classes(self) -> list[str]:
        """The classes of all packs."""
        return [name for classes in self.packs.values() for name in classes]

    def turbo_steps(self, label: str) -> int | None:
        """Steps that turbo adapters need for a class; None where there are none for it."""
        return next((self.turbo.get(name) for name, classes in self.packs.items() if label in classes), None)


def pack_facts(path: Path) -> dict[str, Any]:
    """What the file of a pack of adapters says of it: those of :data:`PACK_FACTS` that it knows.

    Raises:
        SafetensorError, OSError, json.JSONDecodeError: where it is missing or damaged.
    """
    with safe_open(path, "np") as file:
        told = file.metadata() or {}
    return {name: json.loads(told[name]) for name in PACK_FACTS if name in told}


def weight_files(checkpoint: Path) -> list[Path]:
    """The checkpoint's weights.

    Raises:
        ValueError: where the checkpoint is missing, holds no safetensors, or one that is cut short.
    """
    if not (checkpoint / "model_index.json").is_file():
        raise ValueError(f"checkpoint {checkpoint} is not a pipeline folder: it has no model_index.json")
    files = sorted(checkpoint.rglob("*.safetensors"))
    for folder in ("transformer", "video_codec", "audio_codec"):
        if not any(file.parent.name == folder for file in files):
            raise ValueError(f"checkpoint {checkpoint} has no safetensors weights in {folder}; pickles are not read")
    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError):
            raise ValueError(f"{file} is damaged or cut short: fetch it again") from None
    return files


@functools.cache
def weights_sha256(checkpoint: Path) -> str:
    """One hash over the checkpoint's weights."""
    digest = hashlib.sha256()
    for file in weight_files(checkpoint):
        digest.update(str(file.relative_to(checkpoint)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
