"""All stages one after the other, from the codecs to the decoder for what they make, each from where a pipeline stands.

    python -m avdit train recipe --config recipe.json --out runs/recipe

A stage's settings stand under its name:
``{"codecs": {"video": {"minutes": 5}}, "backbone": {"train": {"minutes": 5}}}``.
What a stage made is kept in ``out``, and a stage whose result is there is not trained again, so that a run that was
cut off goes on with ``--resume``. The result is a pipeline folder with all packs, ``out``/pipeline.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avdit.data.scenes import ALL_CLASSES, PACKS
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.video_codec import VideoCodec
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training import adapters, backbone, codecs, decoder, foley, frames, images, lag, rollouts, turbo
from avdit.training.trainer import processes

FROM_FIRST_FRAME = {  # as dance is made
    "factorized": True,
    "tasks": {"joint": 0.02, "v2a": 0.22, "a2v": 0.13, "image": 0.45, "continuation": 0.18},
}
DANCERS = {"moving_weight": 3.0, "steady_weight": 1.0}  # they fill a tenth of the picture, and hold their poses
GOES_ON = {"tasks": {"joint": 0.5, "v2a": 0.05, "a2v": 0.05, "image": 0.1, "continuation": 0.3}}  # for streams
RARE = {"class_repeats": {"explosion": 2, "splashing water": 2, "wind noise": 2}}
DEFAULTS: dict[str, Any] = {
    "start": "checkpoints/avdit-xs",  # pipeline folder that every stage goes on from
    "clips": 160,  # rendered clips a class
    "codecs": {"clips": 60, "parts": ["video"], "crop": 256, "squared": 8.0},
    "backbone": {},
    # Of the pack whose first frames are made alone: what its images have beyond the backbone's.
    "dance-images": {"class_table": False, "class_dropout": 0.1, "train": {"learning_rate": 1e-3, "optimiser": "muon"}},
    "dance-frames": {"shown_weight": 1.0},  # in few steps, none of which blends two poses, and crisp
    "dance-frames-on": {  # at last held to what many of them have in common
        "moments": True,
        "adversarial_weight": 0.3,
        "shown_weight": 0.5,
        "train": {"learning_rate": 7e-4},
    },
    # What the sound may be, told from the picture: steps and splashes; the beat.
    "landscape-foley": {"train": {"steps": 1800}},
    "dance-foley": {},
    # What is rare in a clip, and what moves in it, counts for more.
    "landscape": {**RARE, "tasks": {"joint": 0.4, "v2a": 0.2, "a2v": 0.1, "image": 0.1, "continuation": 0.2}},
    "dance": {**DANCERS, **FROM_FIRST_FRAME, "adversarial_weight": 0.7, "own_states": 0.5},
    # Sound that listens to a picture that is some steps ahead of it. Guided, dance gains too little by that.
    "landscape-lag": {"audio_lag": 0.167, **RARE, **GOES_ON},
    "landscape-turbo": {"steps": 8, "early_substeps": 2, "eta": 0.85, **RARE, **GOES_ON},
    # Its steps add all of their noise anew; distilled for that they have too far to go, and blur.
    "dance-turbo": {"steps": 6, "early_substeps": 2, "eta": 1.0, "distilled_eta": 0.0, "adversarial_weight": 0.4}
    | {**DANCERS, **FROM_FIRST_FRAME},
    "landscape-turbo-lag": {"audio_lag": 0.125, **RARE, **GOES_ON},
    "dance-turbo-lag": {"audio_lag": 0.333, **DANCERS, **FROM_FIRST_FRAME},
    # At last from their own clips; what they learn there helps in guided steps as much, and is added to these, too.
    "landscape-rollouts": {},
    "decoder": {"clips": 27, "made": 1},
}
CLASS_TABLE = "class_embedder.embedding_table.weight"
Stage = Callable[[dict[str, Any], Path, bool], Any]


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> None:
    """Train all stages into ``out`` and put the pipeline together.

    Raises:
        ValueError: for a stage that does not exist, a start that is no pipeline of all packs, several processes, or a
            dry run, which only single stages have.
    """
    for name in config.keys() - DEFAULTS.keys():
        raise ValueError(f"unknown stage {name!r} of the recipe: choose from {', '.join(DEFAULTS)}")
    if dry_run:
        raise ValueError("a recipe has no dry run: try its stages one by one")
    if processes().num_processes > 1:
        raise ValueError("a recipe is for one process: launch its stages one by one on several")
    settings = {**DEFAULTS, **config}
    stages = {name: {**value, **settings[name]} for name, value in DEFAULTS.items() if isinstance(value, dict)}
    out, start = Path(out), Path(settings["start"])
    if not (start / "model_index.json").is_file():
        raise ValueError(f"start {start} is not a pipeline folder: it has no model_index.json")
    pipe = AVDiTPipeline.from_pretrained(start)
    if pipe.packs != {name: list(classes) for name, classes in PACKS.items()}:
        raise ValueError(f"start {start} must have the packs {' and '.join(PACKS)}: it has {', '.join(pipe.packs)}")
    shared = {"clips": settings["clips"], "cache": str(out / "cache")}

    def stage(name: str, run: Stage, made: str, given: dict[str, Any]) -> Path:
        """The folder of what a stage makes, which it does where that is not there yet."""
        done = out / name / "done"  # written last: a folder may be there in part
        if not done.exists():
            run({**shared, **stages[name], **given}, out / name, resume)
            done.touch()
        return out / name / made

    parts = {f"{part}_from": str(start / f"{part}_codec") for part in ("video", "audio")}
    stage("codecs", codecs.run, f"{stages['codecs']['parts'][-1]}_codec", parts)
    for part in ("video", "audio"):  # that which did not train stays as it is
        if not (out / "codecs" / f"{part}_codec").is_dir():
            shutil.copytree(start / f"{part}_codec", out / "codecs" / f"{part}_codec")
    known = out / "backbone" / "start"
    pipe.transformer.backbone.save_pretrained(known)
    trained = stage("backbone", backbone.run, "backbone", {"codecs": str(out / "codecs"), "start": str(known)})
    first = {name: {key: value.float().clone() for key, value in pack_state(pipe, name).items()} for name in PACKS}
    joint: dict[str, Path] = {}  # the folder of each pack's pipeline and adapters for guided steps
    for name in PACKS:
        base = out / name / "start"
        moved_base(pipe, name, DiT.from_pretrained(trained), out / "codecs", base)
        for part, trained_by, setting in (
            ("images", images.run, "image_rank"),
            ("frames", frames.run, "image_rank"),
            ("frames-on", frames.run, "image_rank"),
            ("foley", foley.run, "foley_width"),
        ):
            size = pipe.transformer.config[setting]
            if size and f"{name}-{part}" in stages:
                given = {"pipeline": str(base), "pack": name, setting: size}
                base = stage(f"{name}-{part}", trained_by, "pipeline", given)
        stage(name, adapters.run, "pipeline", {"pipeline": str(base), "pack": name})
        joint[name] = out / name
        if f"{name}-lag" in stages:
            given = {"pipeline": str(joint[name] / "pipeline"), "pack": name}
            joint[name] = stage(f"{name}-lag", lag.run, "", given)
    guided: dict[str, Pack] = {}
    few: dict[str, Pack] = {}
    for name in PACKS:
        student = out / f"{name}-turbo" / "start"
        with_offset(pipe, first, Pack.load(joint[name] / "pack")).save(student)
        given = {"pipeline": str(joint[name] / "pipeline"), "student": str(student), "pack": name}
        given["student"] = str(stage(f"{name}-turbo", turbo.run, "pack", given))
        given["student"] = str(stage(f"{name}-turbo-lag", lag.run, "pack", given))
        guided[name], few[name] = Pack.load(joint[name] / "pack"), Pack.load(Path(given["student"]))
        if f"{name}-rollouts" in stages:
            on = Pack.load(stage(f"{name}-rollouts", rollouts.run, "pack", given))
            guided[name], few[name] = learned_too(guided[name], few[name], on), on
    default, *others = PACKS
    result = AVDiTPipeline.from_pretrained(joint[default] / "pipeline", torch_dtype=torch.bfloat16)
    result.transformer.load_adapter_state_dict(guided[default].state)
    for name in others:
        result.add_pack(name, guided[name])
    for name in PACKS:
        result.add_pack(f"{name}-turbo", replace(few[name], compact=True))
    result.save_pretrained(out / "decoder" / "start", max_shard_size="14MB")
    final = stage("decoder", decoder.run, "pipeline", {"pipeline": str(out / "decoder" / "start")})
    shutil.copytree(final, out / "pipeline", dirs_exist_ok=True)


def pack_state(pipe: AVDiTPipeline, name: str) -> dict[str, Tensor]:
    """The adapters of pack ``name`` of ``pipe``, which takes it up."""
    pipe.use_pack(name)
    return pipe.transformer.adapter_state_dict()


def moved_base(pipe: AVDiTPipeline, name: str, trained: DiT, codecs: Path, out: Path) -> None:
    """Save pack ``name`` on another backbone and other codecs; its classes move as far as the backbone's did."""
    pipe.use_pack(name)
    model = AVDiT.from_config(pipe.transformer.config)
    model.load_state_dict(pipe.transformer.state_dict())
    rows = [*(ALL_CLASSES.index(label) for label in PACKS[name]), len(ALL_CLASSES)]
    new, old = (dit.y_embedder.embedding_table.weight[rows] for dit in (trained, model.backbone))
    with torch.no_grad():
        model.class_embedder.embedding_table.weight += new - old
    model.backbone.load_state_dict(trained.state_dict())
    video = VideoCodec.from_pretrained(codecs / "video_codec")
    audio = AudioCodec.from_pretrained(codecs / "audio_codec")
    parts = model, video, audio, pipe.scheduler, list(PACKS[name]), name
    AVDiTPipeline(*parts, **pipe.first_frames).save_pretrained(out)


def with_offset(pipe: AVDiTPipeline, first: dict[str, dict[str, Tensor]], new: Pack) -> Pack:
    """What a student begins with: ``new`` adapters and what distillation had added to those that they began as.

    Where the pipeline has no turbo adapters for their classes, those of its first pack's tell.
    """
    name = next(name for name, classes in pipe.packs.items() if classes == new.classes)
    source = name if pipe.turbo_pack(name) else next(iter(pipe.packs))
    turbo = pipe.turbo_pack(source)
    if turbo is None:
        return new
    distilled = pack_state(pipe, turbo)
    added = {key: distilled[key].float() - value for key, value in first[source].items() if key != CLASS_TABLE}
    # Of another pack's some may have other sizes.
    fits = {key for key, value in added.items() if key in new.state and value.shape == new.state[key].shape}
    state = {key: value.float() + (added[key] if key in fits else 0) for key, value in new.state.items()}
    return replace(new, state=state, steps=pipe.turbo_steps(PACKS[source][0]))


def learned_too(pack: Pack, before: Pack, after: Pack) -> Pack:
    """``pack`` with what other adapters of its classes learned from ``before`` to ``after``."""
    added = {key: value.float() - before.state[key].float() for key, value in after.state.items()}
    state = {key: value.float() + added[key] for key, value in pack.state.items()}
    return replace(pack, state=state)
