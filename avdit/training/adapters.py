"""Stage 3: the adapters, on clips, with the backbone frozen.

    python -m avdit train adapters --out runs/adapters                 # this machine
    accelerate launch -m avdit train adapters --out runs/adapters      # as accelerate is configured

Every step mixes the tasks of one model: joint generation, sound for a given picture, picture for a given sound,
a clip from its first frame, and continuation. The loss counts only what was noised.

``"modalities": ["audio"]`` trains the audio branch alone, whose tokens are a fourteenth of all, and ``["video"]`` the
temporal attention alone. Where hours are few, minutes of each before the joint training are well spent: a second
run takes the first one's adapters up with ``"start": "DIR/pipeline/transformer"``.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from avdit.data.scenes import CLASSES
from avdit.geometry import ClipGeometry
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.pipeline import AVDiTPipeline
from avdit.training.backbone import latent_shards
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


def build(config: dict, geometry: ClipGeometry) -> AVDiT:
    """Fresh adapters round the trained backbone, or those of an earlier run (``start``)."""
    if config.get("start"):
        model = AVDiT.from_pretrained(config["start"])
    else:
        backbone = DiT.from_pretrained(config["backbone"])
        model = AVDiT.from_backbone(backbone, geometry, num_classes=len(CLASSES), **config["model"])
    model.freeze_backbone()
    return model


def run(config: dict, out: Path, resume: bool = False) -> None:
    """Train the adapters and save the whole pipeline in ``out``/pipeline."""
    config = {**DEFAULTS, **config}
    config["model"] = {**DEFAULTS["model"], **config["model"]}
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    geometry = ClipGeometry()
    shards, video_codec, audio_codec = latent_shards(config, out)
    modalities = set(config["modalities"])
    if not modalities or not modalities <= {"video", "audio"}:
        raise ValueError(f"modalities {config['modalities']!r} must be video, audio or both")
    model = build(config, geometry)
    # One alone would bend the class table that both share.
    model.class_embedder.requires_grad_(len(modalities) == 2)
    scheduler = xs_scheduler()
    diffusion = Diffusion(scheduler)
    patch = geometry.audio_patch[0]

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        number, device = settings.batch_size, trainer.accelerator.device
        items = torch.randint(len(shards), (number,), generator=generator)
        video, audio = shards.get("video", items).float(), shards.get("audio", items).float()
        labels = shards.get("label", items)
        dropped = torch.rand(number, generator=generator) < config["class_dropout"]
        labels = labels.where(~dropped, torch.tensor(len(CLASSES)))
        frames, columns = given_parts(config["tasks"], number, geometry, generator)
        t = diffusion.timesteps(generator, number).unsqueeze(1)
        t_video = t.expand(-1, geometry.frames).masked_fill(frames, 0)
        t_audio = t.expand(-1, geometry.audio_columns).masked_fill(columns, 0)
        # The audio latent's time axis leads, so that it lines up with its timesteps.
        sound, rows = audio.transpose(1, 2), columns.repeat_interleave(patch, 1)
        noised_video, video_target = diffusion.noised(
            video, torch.randn(video.shape, generator=generator), t_video, frames
        )
        noised_sound, sound_target = diffusion.noised(
            sound, torch.randn(sound.shape, generator=generator), t_audio.repeat_interleave(patch, 1), rows
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
            terms["video"] = masked_error(video_out, video_target.to(device), kept)
        if with_audio:
            kept = ~rows[..., None, None].to(device)
            terms["audio"] = masked_error(audio_out.transpose(1, 2), sound_target.to(device), kept)
        total = terms.get("video", 0.0) + config["audio_weight"] * terms.get("audio", 0.0)
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}

    def pipeline() -> AVDiTPipeline:
        return AVDiTPipeline(model, video_codec, audio_codec, scheduler, classes=list(CLASSES))

    def sheet(path: Path) -> None:
        model.eval()
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(0) for _ in CLASSES]
        clip = pipe(list(CLASSES), num_inference_steps=12, generator=generators, output_type="pt")
        save_png(image_grid(clip.frames[:, ::2].flatten(0, 1).movedim(-1, 1), geometry.frames // 2), path)
        mel = audio_codec.mel(clip.audio.to(audio_codec.device)).transpose(2, 3).flip(2) / 4 + 0.5
        save_png(image_grid(mel.expand(-1, 3, -1, -1), 1), path.with_suffix(".mel.png"))
        model.train()

    trainer = Trainer(model, loss, settings, out, sheet)
    if resume:
        trainer.resume()
    trainer.run()
    pipeline().to(torch.bfloat16).save_pretrained(Path(out) / "pipeline")
