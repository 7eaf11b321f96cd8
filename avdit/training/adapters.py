"""Stage 3: the adapters, on clips, with the backbone frozen.

    python -m avdit train adapters --out runs/adapters                 # this machine
    accelerate launch -m avdit train adapters --out runs/adapters      # as accelerate is configured

Every step mixes the tasks of one model: joint generation, sound for a given picture, picture for a given sound,
a clip from its first frame, and continuation. The loss counts only what was noised.

``"modalities": ["audio"]`` trains the audio branch alone, whose tokens are a fourteenth of all, and ``["video"]`` the
temporal attention alone. Where hours are few, minutes of each before the joint training are well spent: a second
run takes the first one's adapters up with ``"start": "DIR/pipeline/transformer"``.

``"pipeline": DIR`` trains the adapters of an assembled pipeline (its codecs, schedule, geometry and classes hold), and
``"data": {"folder": DIR}`` learns from a folder of mp4 files in place of rendered clips.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from avdit.geometry import ClipGeometry
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.pipeline import AVDiTPipeline
from avdit.training.data import clip_geometry, training_data
from avdit.training.diffusion import Diffusion, masked_error
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, trainer_config

DEFAULTS = {
    "codecs": "runs/codecs",
    "backbone": "runs/backbone/backbone",
    "clips": 160,  # rendered clips a class
    "class_dropout": 0.1,
    "audio_weight": 1.0,
    "modalities": ["video", "audio"],
    "tasks": {"joint": 0.6, "v2a": 0.1, "a2v": 0.1, "image": 0.1, "continuation": 0.1},
    "model": {"temporal_width": 128, "lora_rank": 16, "interaction_rank": 16, "interaction_every": 2},
    "train": {"steps": 40000, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 50, "sample_every": 400},
}


def given_parts(
    tasks: dict[str, float], number: int, geometry: ClipGeometry, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What each of ``number`` clips is given: frames (number, F) and audio columns (number, M), bool."""
    names = list(tasks)
    weights = torch.tensor([tasks[name] for name in names])
    frames = torch.zeros(number, geometry.frames, dtype=torch.bool)
    columns = torch.zeros(number, geometry.audio_columns, dtype=torch.bool)
    for i, choice in enumerate(torch.multinomial(weights, number, True, generator=generator).tolist()):
        match names[choice]:
            case "v2a":
                frames[i] = True
            case "a2v":
                columns[i] = True
            case "image":
                frames[i, 0] = True
            case "continuation":
                count = int(torch.randint(2, geometry.frames * 3 // 4, (), generator=generator))
                frames[i, :count] = True
                columns[i, : geometry.columns_of(count)] = True
    return frames, columns


def from_pipeline(config: dict) -> tuple[dict, list[str] | None, DDIMScheduler]:
    """The configuration with what follows from its ``pipeline``, that pipeline's classes, and the schedule.

    Raises:
        ValueError: where ``pipeline`` is no pipeline folder.
    """
    if not config.get("pipeline"):
        return config, None, xs_scheduler()
    folder = Path(config["pipeline"])
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"pipeline {folder} is not a pipeline folder: it has no model_index.json")
    classes = json.loads((folder / "model_index.json").read_text())["classes"]
    config = {**config, "codecs": folder, "start": config.get("start") or folder / "transformer"}
    return config, classes, DDIMScheduler.from_pretrained(folder / "scheduler")


def build(config: dict, geometry: ClipGeometry, classes: list[str]) -> AVDiT:
    """Fresh adapters round the trained backbone, or those of an earlier run (``start``).

    Raises:
        ValueError: where the earlier run had another number of classes.
    """
    if config.get("start"):
        model = AVDiT.from_pretrained(config["start"])
        if model.config.num_classes != len(classes):
            raise ValueError(f"{config['start']} has {model.config.num_classes} classes, the data {len(classes)}")
    else:
        backbone = DiT.from_pretrained(config["backbone"])
        model = AVDiT.from_backbone(backbone, geometry, num_classes=len(classes), **config["model"])
    model.freeze_backbone()
    return model


def geometry_of(config: dict) -> ClipGeometry:
    """That of the model to start from, or the one that is configured; ``avdit-xs``'s where neither is."""
    if not config.get("start"):
        return clip_geometry(config.get("geometry", {}))
    known = AVDiT.load_config(config["start"])["geometry"]
    return ClipGeometry(**{name: value for name, value in known.items() if name != "samples"})


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train the adapters and save the whole pipeline in ``out``/pipeline, the adapters alone in ``out``/pack.

    A dry run says what that would cost and writes nothing.
    """
    config = {**DEFAULTS, **config}
    config, classes, scheduler = from_pipeline(config)
    config["model"] = {**DEFAULTS["model"], **config["model"]}
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    modalities = set(config["modalities"])
    if not modalities or not modalities <= {"video", "audio"}:
        raise ValueError(f"modalities {config['modalities']!r} must be video, audio or both")
    geometry = geometry_of(config)
    data = training_data(config, out, geometry, classes, dry_run)
    shards, video_codec, audio_codec, classes = data.shards, data.video_codec, data.audio_codec, data.classes
    torch.manual_seed(settings.seed)
    model = build(config, geometry, classes)
    # One alone would bend the class table that both share.
    model.class_embedder.requires_grad_(len(modalities) == 2)
    diffusion = Diffusion(scheduler)
    patch = geometry.audio_patch[0]
    frame_size = math.prod(geometry.video_latent_shape)
    column_size = math.prod(geometry.audio_latent_shape) // geometry.audio_columns

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        number, device = trainer.global_batch, trainer.accelerator.device
        items = torch.randint(len(shards), (number,), generator=generator)
        dropped = torch.rand(number, generator=generator) < config["class_dropout"]
        frames, columns = given_parts(config["tasks"], number, geometry, generator)
        t = diffusion.timesteps(generator, number)
        # What is noised in the whole batch, so that a part in which much is given does not count for more.
        noised_frames, noised_columns = int((~frames).sum()), int((~columns).sum())
        items, dropped, frames, columns, t = map(trainer.mine, (items, dropped, frames, columns, t))
        video, audio = shards.get("video", items).float(), shards.get("audio", items).float()
        labels = shards.get("label", items).where(~dropped, torch.tensor(len(classes)))
        t = t.unsqueeze(1)
        t_video = t.expand(-1, geometry.frames).masked_fill(frames, 0)
        t_audio = t.expand(-1, geometry.audio_columns).masked_fill(columns, 0)
        # The audio latent's time axis leads, so that it lines up with its timesteps.
        sound, rows = audio.transpose(1, 2), columns.repeat_interleave(patch, 1)
        noise = [
            (torch.randn(video.shape[1:], generator=g), torch.randn(sound.shape[1:], generator=g))
            for g in trainer.generators()
        ]
        noised_video, video_target = diffusion.noised(video, torch.stack([v for v, _ in noise]), t_video, frames)
        noised_sound, sound_target = diffusion.noised(
            sound, torch.stack([a for _, a in noise]), t_audio.repeat_interleave(patch, 1), rows
        )
        with_video, with_audio = "video" in modalities, "audio" in modalities
        inputs = (
            noised_video.to(device) if with_video else None,
            noised_sound.transpose(1, 2).to(device) if with_audio else None,
            t_video.to(device) if with_video else None,
            t_audio.to(device) if with_audio else None,
            labels.to(device),
        )
        video_out, audio_out = module(*inputs)
        terms = {}
        if with_video:
            kept = ~frames[..., None, None, None].to(device)
            terms["video"] = masked_error(
                video_out, video_target.to(device), kept, noised_frames * frame_size / trainer.parts
            )
        if with_audio:
            kept = ~rows[..., None, None].to(device)
            terms["audio"] = masked_error(
                audio_out.transpose(1, 2), sound_target.to(device), kept, noised_columns * column_size / trainer.parts
            )
        total = terms.get("video", 0.0) + config["audio_weight"] * terms.get("audio", 0.0)
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}

    def pipeline() -> AVDiTPipeline:
        return AVDiTPipeline(model, video_codec, audio_codec, scheduler, classes=classes)

    def sheet(path: Path) -> None:
        model.eval()
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        number = max(1, 10_000 // geometry.video_tokens)  # clips at once: memory is bounded at any size
        made = []
        for i in range(0, len(classes), number):
            names = classes[i : i + number]
            generators = [torch.Generator().manual_seed(0) for _ in names]
            made.append(pipe(names, num_inference_steps=12, generator=generators, output_type="pt"))
        frames = torch.cat([clip.frames[:, ::2].cpu() for clip in made])
        save_png(image_grid(frames.flatten(0, 1).movedim(-1, 1), frames.shape[1]), path)
        audio = torch.cat([clip.audio for clip in made])
        mel = audio_codec.mel(audio.to(audio_codec.device)).transpose(2, 3).flip(2) / 4 + 0.5
        save_png(image_grid(mel.expand(-1, 3, -1, -1), 1), path.with_suffix(".mel.png"))
        model.train()

    trainer = Trainer(model, loss, settings, out, sheet, unused=len(modalities) < 2)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    if resume:
        trainer.resume()
    trainer.run()
    if trainer.accelerator.is_main_process:
        pipeline().to(torch.bfloat16).save_pretrained(Path(out) / "pipeline", max_shard_size="5GB")
        pack = {name: value.contiguous().cpu() for name, value in model.adapter_state_dict().items()}
        (Path(out) / "pack").mkdir(exist_ok=True)
        save_file(pack, Path(out) / "pack" / "adapters.safetensors", metadata={"classes": json.dumps(classes)})
    return None
