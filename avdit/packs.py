"""Adapter packs: the adapters of one data set in one file, apart from the backbone that they were trained on."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from avdit.checkpoint import PACK_FACTS, PACK_FILE, pack_facts
from avdit.models.avdit import OPTIONAL

FIRST_FRAMES = "factorized", "image_steps", "eventful"  # facts of a pack: how clips are made from their first frame
SCALE = ".scale"  # ends the name of what a tensor of 8-bit numbers is multiplied by
State = dict[str, Tensor]


@dataclass(frozen=True)
class Pack:
    """Adapters and the names of the classes that they know, in the order of their class table.

    ``steps`` is given for turbo adapters: those that so many steps were distilled into, guidance with them. ``eta`` is
    the new noise that each of these steps adds. ``audio_lag`` is the share of the steps by which sound stays behind the
    picture (see :class:`AVDiTPipeline` for both).
    ``factorized`` ones make the first frame alone and all else from it (see :class:`AVDiTPipeline`), in ``image_steps``
    without guidance where its updates were taught that (training/frames.py); ``eventful`` ones guide what follows as
    where none is given. ``compact`` ones are kept in files as 8-bit numbers, in half the size of 16-bit weights; turbo
    ones as differences from other adapters of their classes.
    """

    classes: list[str]
    state: State
    steps: int | None = None
    factorized: bool = False
    compact: bool = False
    eta: float = 0.0
    image_steps: int | None = None
    eventful: bool = False
    audio_lag: float = 0.0

    def save(self, folder: Path, base: State | None = None) -> None:
        """Write ``adapters.safetensors`` into ``folder``.

        Raises:
            ValueError: for a compact turbo pack without the adapters ``base`` that it is to be told from.
        """
        state = self.state
        if self.compact and self.steps:
            if base is None:
                raise ValueError("a compact turbo pack is saved as differences from other adapters: none were given")
            state = differences(state, base)
        if self.compact:
            state = in_eight_bits(state)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().contiguous().cpu() for name, value in state.items()}
        told = {name: json.dumps(getattr(self, name)) for name in PACK_FACTS}
        save_file(state, folder / PACK_FILE, metadata=told)

    @classmethod
    def load(cls, folder: Path, base: Callable[[list[str]], State] | None = None) -> "Pack":
        """Read what :meth:`save` wrote.

        Args:
            base: Gives the adapters of the classes named, to which the differences of a compact turbo pack are added.
                They need not be those that it was saved with: what distillation adds helps on later ones, too.

        Raises:
            ValueError: where the file is missing, damaged or does not name its classes; for a compact turbo pack, where
                there are no adapters to add it to.
        """
        path = Path(folder) / PACK_FILE
        try:
            told = pack_facts(path)
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError, json.JSONDecodeError):
            raise ValueError(f"{path} is missing, damaged or cut short") from None
        if not isinstance(told.get("classes"), list):
            raise ValueError(f"{path} does not name its classes: it is no adapter pack")
        if told.get("compact"):
            state = from_eight_bits(state)
            if told.get("steps"):
                if base is None:
                    raise ValueError(f"{path} holds differences from other adapters, and none were given")
                state = added(state, base(told["classes"]))
        return cls(state=state, **told)


def differences(state: State, base: State) -> State:
    """What ``state`` has beyond ``base``, in 32-bit floats; a single zero tells what is the same in both.

    Raises:
        ValueError: naming the first key that one of them has and the other has not, but for what a pack may lack.
    """
    state = {**optional(base), **state}
    expect_same(state, base)
    told = {}
    for name, value in state.items():
        change = value.detach().float() - base[name].float().to(value.device)
        told[name] = change if change.any() else torch.zeros(())
    return told


def added(told: State, base: State) -> State:
    """``base`` and what :func:`differences` told, in 32-bit floats.

    Raises:
        ValueError: naming the first key that one of them has and the other has not, but for what a pack may lack.
    """
    same = {name: torch.zeros(()) for name in optional(base)}
    nothing = {name for name in optional(told) if not told[name].ndim}
    told = {name: change for name, change in {**same, **told}.items() if name in base or name not in nothing}
    expect_same(told, base)
    return {name: base[name].float() + change.float().to(base[name].device) for name, change in told.items()}


def in_eight_bits(state: State) -> State:
    """Matrices as 8-bit integers with what each row is multiplied by, or each column where these are fewer.

    Vectors, which are small, are 16-bit floats. A deviation is less than a hundredth of a weight's usual size.
    """
    told = {}
    for name, value in state.items():
        if value.ndim < 2:
            told[name] = value.to(torch.bfloat16)
            continue
        rows = value.detach().float().flatten(1)
        scale = rows.abs().amax(int(rows.shape[0] < rows.shape[1]), keepdim=True).clamp(min=1e-12) / 127
        told[name], told[name + SCALE] = (rows / scale).round().to(torch.int8).view(value.shape), scale
    return told


def from_eight_bits(told: State) -> State:
    """What :func:`in_eight_bits` told, in 32-bit floats; packs of before are 8-bit floats with one scale each."""
    scales = {name: told[name + SCALE] for name in told if name + SCALE in told}
    state = {name: value.float() for name, value in told.items() if not name.endswith(SCALE)}
    return {
        name: (value.flatten(1) * scales[name]).view(value.shape) if name in scales else value
        for name, value in state.items()
    }


def optional(state: State) -> State:
    """What of ``state`` a pack may lack."""
    return {name: value for name, value in state.items() if any(part in name for part in OPTIONAL)}


def expect_same(names: Collection[str], base: State) -> None:
    """Raise ``ValueError`` naming the first key that is in one of both alone."""
    for name in sorted(set(names) ^ base.keys()):
        raise ValueError(f"compact pack does not fit its base: {name!r} is in one of them alone")


def is_turbo(path: Path) -> bool:
    """Whether a pack's file says that it needs another pack of its classes, whatever the folders are called."""
    try:
        return pack_facts(path).get("steps") is not None
    except (SafetensorError, OSError, json.JSONDecodeError):
        return False  # reading it whole says what is wrong


class PackMixin:
    """What a pipeline does with its packs: they take turns on the one backbone, and a class chooses its pack."""

    def label_ids(self, class_labels: str | int | Sequence[str | int]) -> list[int]:
        """Indices of class names or indices.

        Raises:
            ValueError: for a name that the model does not know.
        """
        labels = [class_labels] if isinstance(class_labels, str | int) else list(class_labels)
        for label in labels:
            if isinstance(label, str) and label not in self.classes:
                raise ValueError(f"unknown class {label!r}: choose one of {', '.join(self.classes)}")
        return [self.classes.index(label) if isinstance(label, str) else int(label) for label in labels]

    def set_first_pack(self, name: str, classes: list[str], **facts: Any) -> None:
        """Name the pack whose adapters the model was made with, and how clips are made by it (see :class:`Pack`)."""
        self._packs = {name: Pack(classes, {}, **facts)}  # of the one in use the weights are in the model
        self._pack = name

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "PackMixin":
        """Load a pipeline as diffusers does, with the packs in its folder ``packs``."""
        pipe = super().from_pretrained(folder, **kwargs)
        for path in sorted(Path(folder).glob(f"packs/*/{PACK_FILE}"), key=lambda path: (is_turbo(path), path)):
            pipe.add_pack(path.parent.name, Pack.load(path.parent, pipe.adapters_of))
        return pipe

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the pipeline as diffusers does, with its further packs in the folder ``packs``.

        What further packs have and the first one has not takes no room beside the first one's adapters.
        """
        default, *others = self._packs
        self.use_pack(default)
        model = self.transformer
        self.register_modules(transformer=model.without_idle_parts())
        try:
            super().save_pretrained(folder, **kwargs)
        finally:
            self.register_modules(transformer=model)
        for name in others:
            pack = self._packs[name]
            pack.save(Path(folder) / "packs" / name, self.adapters_of(pack.classes) if pack.steps else None)

    @property
    def packs(self) -> dict[str, list[str]]:
        """The classes of each pack of adapters, the one that the pipeline was saved with first; turbo ones apart."""
        return {name: pack.classes for name, pack in self._packs.items() if pack.steps is None}

    @property
    def classes(self) -> list[str]:
        """The classes of all packs; a class chooses its pack."""
        return [name for classes in self.packs.values() for name in classes]

    @property
    def factorized(self) -> bool:
        """Whether the adapters in use make the first frame alone and all else from it."""
        return self._packs[self._pack].factorized

    @property
    def image_steps(self) -> int | None:
        """Steps without guidance in which the adapters in use make the first frame; None: many, guided."""
        return self._packs[self._pack].image_steps

    @property
    def eventful(self) -> bool:
        """Whether what follows a first frame is guided as where none is given, as what counts is when things happen."""
        return self._packs[self._pack].eventful

    @property
    def first_frames(self) -> dict[str, Any]:
        """How the adapters in use make clips from their first frame on, and that one, as further packs are told."""
        return {name: getattr(self, name) for name in FIRST_FRAMES}

    def set_facts(self, **facts: Any) -> None:
        """Say of the first pack, which is in use, how clips are made by it (see :class:`Pack`)."""
        self._packs[self._pack] = replace(self._packs[self._pack], **facts)
        self.register_to_config(**facts)

    def adapters_of(self, classes: list[str]) -> State:
        """The adapters of the pack of ``classes``, turbo ones apart.

        Raises:
            ValueError: where no pack has these classes.
        """
        for name, known in self.packs.items():
            if known == classes:
                return self.transformer.adapter_state_dict() if name == self._pack else self._packs[name].state
        raise ValueError(f"no pack has the classes {', '.join(classes)}")

    def turbo_pack(self, name: str) -> str | None:
        """The turbo adapters that make the classes of pack ``name`` in few steps, where there are some."""
        known = self._packs[name].classes
        return next((key for key, pack in self._packs.items() if pack.steps and pack.classes == known), None)

    def turbo_of(self, class_labels: str | int | Sequence[str | int]) -> Pack | None:
        """The turbo adapters for these classes, whose weights may be in the model; None where there are none."""
        turbo = self.turbo_pack(self.pack_of(self.label_ids(class_labels))[0])
        return self._packs[turbo] if turbo else None

    def turbo_steps(self, class_labels: str | int | Sequence[str | int]) -> int | None:
        """Steps that turbo adapters need for these classes; None where there are none for them."""
        turbo = self.turbo_of(class_labels)
        return turbo.steps if turbo else None

    def add_pack(self, name: str, pack: Pack) -> None:
        """Keep another data set's adapters ready, to be put on the backbone where one of their classes is wanted.

        Raises:
            ValueError: where the pack, or one of its classes, is there already, or does not fit the backbone; for
                turbo adapters, where no pack has their classes.
        """
        for known in {name} & self._packs.keys() | (set(pack.classes) & set(self.classes) if not pack.steps else set()):
            raise ValueError(f"the pipeline has {known!r} already: pack {name!r} cannot be added")
        if pack.steps and pack.classes not in self.packs.values():
            raise ValueError(f"turbo pack {name!r} has other classes than every pack: {', '.join(pack.classes)}")
        current, model = self._pack, self.transformer
        self._packs[name] = pack
        self.register_modules(transformer=model.with_parts_for(pack.state))
        try:
            self.use_pack(name)
        except ValueError:
            del self._packs[name]
            self.register_modules(transformer=model)
            raise
        self.use_pack(current)

    def use_pack(self, name: str) -> None:
        """Put the adapters of pack ``name`` on the backbone."""
        if name == self._pack:
            return
        state = {key: value.detach().clone() for key, value in self.transformer.adapter_state_dict().items()}
        self.transformer.load_adapter_state_dict(self._packs[name].state)
        self._packs[self._pack] = replace(self._packs[self._pack], state=state)
        self._pack = name

    def pack_of(self, labels: Sequence[int]) -> tuple[str, list[int]]:
        """The pack of the classes ``labels`` (indices in :attr:`classes`), and their indices in it.

        Raises:
            ValueError: where they are of several packs.
        """
        places = [(name, i) for name, classes in self.packs.items() for i in range(len(classes))]
        names = list(dict.fromkeys(places[label][0] for label in labels if label < len(places)))
        if len(names) > 1:
            raise ValueError(f"the classes are of several packs, {' and '.join(names)}: make their clips in two calls")
        pack = names[0] if names else next(iter(self._packs))
        return pack, [places[k][1] if k < len(places) else len(self._packs[pack].classes) for k in labels]
