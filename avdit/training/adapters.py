"""Stage 3: the adapters, on clips, with the backbone frozen.

    python -m avdit train adapters --out runs/adapters                 # this machine
    accelerate launch -m avdit train adapters --out runs/adapters      # as accelerate is configured

Every step mixes the tasks of one model: joint generation, sound for a given picture, picture for a given sound,
a clip from its first frame, and continuation. The loss counts only what was noised.

``"train": {"check_every": 200, "patience": 5}`` measures the same error on held-out clips, too (of a folder of files
those on its test list), and ends when it has not fallen five times in a row. The stages before and after know it, too.

``"modalities": ["audio"]`` trains the audio branch alone, whose tokens are a fourteenth of all, and ``["video"]`` the
temporal attention alone. Where hours are few, minutes of each before the joint training are well spent: a second
run takes the first one's adapters up with ``"start": "DIR/pipeline/transformer"``.

``"audio_lag": 0.2`` shows some sounds noisier than their pictures, as they are where they wait (lag.py).

``"adversarial_weight": 0.7, "own_states": 0.5`` lets trained adapters learn by how clips look (pictures.py).

``"pipeline": DIR`` trains the adapters of an assembled pipeline (its codecs, schedule, geometry and classes hold), and
``"data": {"folder": DIR}`` learns from a folder of mp4 files in place of rendered clips.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from avdit.data.scenes import ALL_CLASSES
from avdit.generate import between
from avdit.geometry import ClipGeometry
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.noise import draw_noise
from avdit.models.published import quiet
from avdit.models.schedule import xs_scheduler
from avdit.packs import FIRST_FRAMES, Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training.backbone import DEFAULTS as BACKBONE
from avdit.training.backbone import new_backbone
from avdit.training.batches import ClipBatch, ClipBatches
from avdit.training.data import TrainingData, clip_geometry, held_out_data, training_data
from avdit.training.diffusion import Diffusion
from avdit.training.pictures import PictureAdversary
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "codecs": "runs/codecs",
    "backbone": "runs/backbone/backbone",  # null: one with random weights
    "clips": 160,  # rendered clips a class
    "pack": "landscape",  # its name, and for rendered clips its classes
    "trains": "adapters",  # or "all": the backbone too
    "parts": {},  # {"temporal_rank": 32}: parts that a model to start from is given where it has none; 0: it loses them
    "factorized": None,  # clips are to be made from their first frame on ("tasks" then need "image"); null: as pipeline
    "eventful": None,  # their guidance settles when things happen, as that of others (AVDiTPipeline); null: as pipeline
    "class_dropout": 0.1,
    "audio_weight": 1.0,
    "modalities": ["video", "audio"],
    "class_table": True,  # trains, too; a run that goes on from trained adapters is a tenth faster without
    "moving_weight": 1.0,  # most that a cell's error counts for moving more than the clip's mean; 1: all count alike
    "steady_weight": 0.0,  # what the error of how frames differ from the next counts for beside that of the frames
    "class_repeats": {},  # {"explosion": 2}: clips of that class are drawn twice as often as the others
    "context_noise": 0.15,  # most noise, as a share of the schedule, of what continuations are given
    "context_contrast": 0.3,  # most change of the log of their pictures' contrast
    "context_anchor": 0.6,  # share of them whose first frame is one from elsewhere in the clip
    "audio_lag": None,  # most share of the schedule by which a sound is noisier than its picture; null: as pipeline
    "own_states": 0.0,  # share of the clips of little noise that get there by a step of the model's own sampling
    "adversarial_weight": 0.0,  # of an adversary that judges pictures, as a share of the gradient of all else
    "perceptual": 0.5,  # beside an adversary, weight of the distance of ImageNet features
    "tasks": {"joint": 0.6, "v2a": 0.1, "a2v": 0.1, "image": 0.1, "continuation": 0.1},
    "model": {
        "temporal_width": 128,
        "lora_rank": 16,
        "interaction_rank": 16,
        "interaction_every": 2,
        "interaction_pool": 2,
        "exchange_features": 64,
        "anchor_rank": 16,
        "neighbour_rank": 16,
        "temporal_rank": 32,
        "shared_noise": 0.5,
    },
    "train": {
        "steps": 40000,
        "batch_size": 8,
        "learning_rate": 7e-4,
        "optimiser": "muon",
        "warmup_steps": 50,
        "sample_every": 400,
    },
}

ADVERSARY_WARMUP = 150  # steps in which its weight rises
OWN_STEPS = 0.04, 0.13  # share of the schedule that a step of the model's own sampling spans: 25 to 8 steps in all
OWN_MOST, OWN_LEAST = 0.62, 0.15  # noise from which on and down to which they lead
OWN_ETA = 0.7  # new noise that they add


def from_pipeline(config: dict) -> tuple[dict, list[str] | None, DDIMScheduler]:
    """The configuration with what follows from its ``pipeline``, that pipeline's classes, and the schedule.

    Raises:
        ValueError: where ``pipeline`` is no pipeline folder.
    """
    if not config.get("pipeline"):
        facts = {name: bool(config.get(name)) for name in ("factorized", "eventful")}
        return with_lag({**config, **facts, "image_steps": None}, 0.0), None, xs_scheduler()
    folder = Path(config["pipeline"])
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"pipeline {folder} is not a pipeline folder: it has no model_index.json")
    told = json.loads((folder / "model_index.json").read_text())
    facts = {name: told.get(name, False) for name in ("factorized", "eventful")}
    facts |= {name: config[name] for name in facts if config.get(name) is not None}
    start = config.get("start") or folder / "transformer"
    config = {**config, "codecs": folder, "start": start, **facts}
    config["image_steps"] = told.get("image_steps")
    config = with_lag(config, told.get("audio_lag", 0.0))
    return config, told["classes"], DDIMScheduler.from_pretrained(folder / "scheduler")


def with_lag(config: dict, known: float) -> dict:
    """The configuration, whose ``audio_lag`` is the ``known`` one where it is null."""
    return {**config, "audio_lag": known} if config.get("audio_lag", known) is None else config


def first_frames(config: dict) -> dict[str, Any]:
    """How clips are made from their first frame on, and that one, as pipelines and packs are told."""
    return {name: config[name] for name in FIRST_FRAMES}


def save_pipeline(pipe: AVDiTPipeline, out: Path) -> None:
    """Save what a stage trained in ``out``/pipeline, in bf16 and whole files."""
    with quiet():  # diffusers warns of parts that should stay in 32-bit floats and names none
        pipe.to(torch.bfloat16)
    pipe.save_pretrained(Path(out) / "pipeline", max_shard_size="5GB")


def build(config: dict, geometry: ClipGeometry, data: TrainingData) -> AVDiT:
    """Fresh adapters round a backbone, trained or not, or those of an earlier run (``start``).

    Raises:
        ValueError: where the earlier run had another number of classes, or a part is none of the model's.
    """
    if config["trains"] not in ("adapters", "all"):
        raise ValueError(f"trains {config['trains']!r} must be 'adapters' or 'all'")
    count = len(data.classes)
    if config.get("start"):
        model = AVDiT.from_pretrained(config["start"])
        if model.config.num_classes != count:
            raise ValueError(f"{config['start']} has {model.config.num_classes} classes, the data {count}")
        for name in config["parts"]:
            if name not in model.config:
                raise ValueError(f"parts: the model has no {name!r}")
        changed = {name: rank for name, rank in config["parts"].items() if bool(rank) != bool(model.config[name])}
        if changed:
            model = model.with_parts(**changed)
    else:
        if config["backbone"]:
            backbone = DiT.from_pretrained(config["backbone"])
        else:
            backbone = new_backbone(geometry, len(ALL_CLASSES), BACKBONE["model"])
        known = None
        if backbone.config.num_classes == len(ALL_CLASSES):  # it was trained on the scenes of all packs
            known = list(range(data.first_label, data.first_label + count))
        model = AVDiT.from_backbone(backbone, geometry, known, num_classes=count, **config["model"])
    if config["trains"] == "all":
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(name != "pos_embed")
    else:
        model.freeze_backbone()
    return model


def geometry_of(config: dict) -> ClipGeometry:
    """That of the model to start from, or the one that is configured; ``avdit-xs``'s where neither is."""
    if not config.get("start"):
        return clip_geometry(config.get("geometry", {}))
    known = AVDiT.load_config(config["start"])["geometry"]
    return ClipGeometry(**{name: value for name, value in known.items() if name != "samples"})


def sample_sheet(
    model: AVDiT, data: TrainingData, scheduler: DDIMScheduler, config: dict, path: Path, **sampling: Any
) -> None:
    """Write one clip of every class as a PNG of its frames, and another of its sound's log-mel.

    ``sampling`` are settings of the pipeline's call that differ from its defaults.
    """
    model.eval()
    pipe = AVDiTPipeline(model, data.video_codec, data.audio_codec, scheduler, data.classes, **first_frames(config))
    pipe.set_progress_bar_config(disable=True)
    number = max(1, 10_000 // model.clip.video_tokens)  # clips at once: memory is bounded at any size
    made = []
    for i in range(0, len(data.classes), number):
        names = data.classes[i : i + number]
        generators = [torch.Generator().manual_seed(0) for _ in names]
        made.append(pipe(names, generator=generators, output_type="pt", **sampling))
    frames = torch.cat([clip.frames[:, ::2].cpu() for clip in made])
    save_png(image_grid(frames.flatten(0, 1).movedim(-1, 1), frames.shape[1]), path)
    audio = torch.cat([clip.audio for clip in made])
    mel = data.audio_codec.mel(audio.to(data.audio_codec.device)).transpose(2, 3).flip(2) / 4 + 0.5
    save_png(image_grid(mel.expand(-1, 3, -1, -1), 1), path.with_suffix(".mel.png"))
    model.train()


@torch.no_grad()
def own_states(
    batch: ClipBatch, trainer: Trainer, alphas: Tensor, share: float, shared_noise: float, generator: torch.Generator
) -> ClipBatch:
    """A batch of which a share of the clips of little noise went a step of the model's own sampling, to less.

    While sampling a model goes on from what it made itself, with errors that no noised clip has. Here it learns to lead
    back from them (scheduled sampling, Bengio et al. 2015, arXiv 1506.03099; for diffusion Li et al. 2023, arXiv
    2305.15583): where a clip went to is to be led to that clip. The step is not guided, as few are there.

    Args:
        alphas: Cumulative shares of signal of the noise schedule, (timesteps,).
    """
    number, last = trainer.global_batch, len(alphas)
    chosen = torch.rand(number, generator=generator) < share
    length = torch.randint(*(round(part * last) for part in OWN_STEPS), (number,), generator=generator)
    chosen, length = trainer.here(chosen), trainer.here(length)
    start = batch.t_video.masked_fill(batch.given_frames, 0).amax(1)
    able = chosen & (start <= OWN_MOST * last) & (start - length >= OWN_LEAST * last)
    # Other noise than the batch's, of every row its own, so that it does not depend on the process that it falls to.
    seeds = trainer.mine(torch.randint(1 << 31, (number,), generator=generator))[able.cpu()].tolist()
    if not seeds:
        return batch
    drawn = [draw_noise(trainer.raw.clip, shared_noise, torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = tuple(torch.stack(parts).to(able.device) for parts in zip(*drawn, strict=True))
    part = batch.rows(able)
    with trainer.accelerator.autocast():
        predicted = trainer.raw(*part.inputs)
    return batch.replaced(able, part.stepped(alphas, *predicted, (start - length)[able], OWN_ETA, noise))


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train the adapters and save the whole pipeline in ``out``/pipeline, the adapters alone in ``out``/pack.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for settings, data or a model to start from that cannot be used.
    """
    config = {**DEFAULTS, **config}
    config, classes, scheduler = from_pipeline(config)
    config["model"] = {**DEFAULTS["model"], **config["model"]}
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    for name in ("audio_lag", "own_states"):
        between(config[name], name, 0, 1)
    between(config["adversarial_weight"], "adversarial_weight", 0, 10)
    between(config["perceptual"], "perceptual", 0, 100)
    modalities = set(config["modalities"])
    if not modalities or not modalities <= {"video", "audio"}:
        raise ValueError(f"modalities {config['modalities']!r} must be video, audio or both")
    geometry = geometry_of(config)
    data = training_data(config, out, geometry, classes, dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    data = data.repeated(config["class_repeats"])
    torch.manual_seed(settings.seed)
    model = build(config, geometry, data)
    # One alone would bend the class table that both share.
    model.class_embedder.requires_grad_(config["class_table"] and len(modalities) == 2)
    diffusion = Diffusion(scheduler, processes().device)
    if (config["adversarial_weight"] or config["own_states"]) and (
        len(modalities) < 2 or diffusion.kind != "v_prediction"
    ):
        raise ValueError(
            "own_states and adversarial_weight are for models of both modalities that predict the velocity"
        )

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        batch = replace(batches, data=data).draw(generator)
        if config["own_states"] and torch.is_grad_enabled():
            batch = own_states(
                batch, trainer, diffusion.alphas, config["own_states"], model.config.shared_noise, generator
            )
        if config["audio_lag"]:
            lag = config["audio_lag"] * torch.rand(trainer.global_batch, generator=generator)
            batch = batch.behind(diffusion.alphas, trainer.here(lag))
        with_video, with_audio = "video" in modalities, "audio" in modalities
        video_out, audio_out = module(
            batch.video if with_video else None,
            batch.audio if with_audio else None,
            batch.t_video if with_video else None,
            batch.t_audio if with_audio else None,
            batch.labels,
        )
        terms = {}
        if with_video:
            terms["video"] = batch.video_error(video_out, batch.video_target)
        if with_audio:
            terms["audio"] = batch.audio_error(audio_out, batch.audio_target)
        total = terms.get("video", 0.0) + config["audio_weight"] * terms.get("audio", 0.0)
        told = {name: term.detach() for name, term in terms.items()}
        if trainer.beside is None or not torch.is_grad_enabled():
            return {"loss": total, **told}
        return {**told, **trainer.beside(batch, video_out, audio_out, total, generator, step)}

    def sheet(path: Path) -> None:
        sample_sheet(model, data, scheduler, config, path)

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, sheet, held_out=checked, unused=len(modalities) < 2)
    if config["adversarial_weight"]:
        weights = config["adversarial_weight"], ADVERSARY_WARMUP, config["perceptual"]
        trainer.beside = PictureAdversary(trainer, data.video_codec, diffusion.alphas, *weights)
    batches = ClipBatches.configured(
        config,
        data,
        diffusion,
        trainer,
        dropout=config["class_dropout"],
        timesteps=diffusion.timesteps,
        shared_noise=model.config.shared_noise,
    )
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        facts = {"audio_lag": config["audio_lag"], **first_frames(config)}
        parts = model, data.video_codec, data.audio_codec, scheduler, data.classes, config["pack"]
        save_pipeline(AVDiTPipeline(*parts, **facts), out)
        Pack(data.classes, model.adapter_state_dict(), **facts).save(Path(out) / "pack")
    return None
