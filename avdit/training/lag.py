"""Stage 5: adapters whose sound stays some steps behind their picture.

    python -m avdit train lag --config lag.json --out runs/lag    # {"pipeline": DIR, "student": DIR of a turbo pack}

When something is heard is settled in the first steps, in which a picture tells little yet. So the sound is kept a few
steps noisier than the picture that it listens to, and the picture, once done, waits for it (each part at its own noise,
as in diffusion forcing: Chen et al. 2024, arXiv 2407.01392). Adapters that never saw such a pair hear well at once, but
make pictures of too much contrast. Here they learn it from themselves as they were: a picture beside a noisier sound
is held to what they made of it beside its own, and a sound to what they made of it beside the finished picture.

Without a student the pipeline's own adapters learn it, for any steps and any lag up to the one that is given.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.generate import between
from avdit.models.avdit import AVDiT
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training.adapters import DEFAULTS as ADAPTERS
from avdit.training.adapters import from_pipeline, geometry_of, sample_sheet, save_pipeline
from avdit.training.batches import ClipBatches
from avdit.training.data import TrainingData, held_out_data, training_data
from avdit.training.diffusion import Diffusion, timesteps_of
from avdit.training.trainer import Trainer, trainer_config
from avdit.training.turbo import DEFAULTS as TURBO
from avdit.training.turbo import fast

TAKEN = "pack", "clips", "factorized", "moving_weight", "steady_weight", "class_repeats", "tasks"
CONTEXT = "context_noise", "context_contrast", "context_anchor"
DEFAULTS = {name: TURBO[name] for name in ("pipeline", *TAKEN, *CONTEXT)} | {
    "student": None,  # folder of the turbo adapters that learn it; null: those of the pipeline do
    "audio_lag": 0.125,  # share of the steps by which their sound stays behind
    "parts": None,  # of a block's adapters that learn it, such as ["temporal", "anchor"], the picture's; null: all
    "train": {
        "steps": 300,
        "batch_size": 16,
        "learning_rate": 3e-4,
        "optimiser": "muon",
        "weight_decay": 0.0,
        "warmup_steps": 10,
        "ema_decay": 0.98,
        "sample_every": 100,
    },
}


def parts_of(model: AVDiT, names: Sequence[str]) -> nn.ModuleList:
    """Those parts of all blocks' adapters.

    Raises:
        ValueError: naming the first part that no block has.
    """
    found = nn.ModuleList()
    for name in names:
        parts = [getattr(block, str(name), None) for block in model.adapters]
        if not any(isinstance(part, nn.Module) for part in parts):
            raise ValueError(f"parts: no block's adapters have {name!r}")
        found.extend(part for part in parts if part is not None)
    return found


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Teach a turbo pack, or a pipeline's own, to let its sound wait, and save it in ``out``/pack.

    With a pipeline's own, the pipeline is saved beside it, in ``out``/pipeline.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for a pipeline or a turbo pack that cannot be used, a lag that is not from 0 to 1, or a part that
            adapters do not have.
    """
    config = {**DEFAULTS, **config}
    between(config["audio_lag"], "audio_lag", 0, 1)
    config, classes, scheduler = from_pipeline(config)
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    geometry = geometry_of(config)
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"])
    model = pipe.transformer
    pack = None
    if config["student"]:
        pack = Pack.load(Path(config["student"]), lambda _: model.adapter_state_dict())
        if pack.steps is None:
            raise ValueError(f"student {config['student']} is no turbo pack")
        if pack.classes != classes:
            raise ValueError(f"student {config['student']} has other classes than the pipeline")
    data = training_data(config, out, geometry, classes, dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    data = data.repeated(config["class_repeats"])
    torch.manual_seed(settings.seed)
    if pack:
        model.load_adapter_state_dict(pack.state)
        scheduler.set_timesteps(pack.steps)
    model.freeze_backbone()
    model.class_embedder.requires_grad_(False)
    if config["parts"]:
        chosen = parts_of(model, config["parts"])
        model.requires_grad_(False)
        chosen.requires_grad_(True)
    master = copy.deepcopy(model, {id(model.backbone): model.backbone}).requires_grad_(False)

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        batch = replace(batches, data=data).draw(generator)
        lag = torch.full((trainer.global_batch,), config["audio_lag"])
        if pack is None:  # these are asked for any steps, and by who distils them for none
            lag *= torch.rand(trainer.global_batch, generator=generator)
        late = batch.behind(diffusion.alphas, trainer.here(lag))
        with trainer.accelerator.autocast(), torch.no_grad():
            video_target, _ = teacher(*batch.inputs)
            _, audio_target = teacher(*late.finished(diffusion.alphas).inputs)
        video, audio = module(*late.inputs)
        video, audio = batch.video_error(video, video_target.float()), batch.audio_error(audio, audio_target.float())
        return {"loss": video + audio, "video": video.detach(), "audio": audio.detach()}

    def sheet(path: Path) -> None:
        sampling: dict[str, Any] = {"audio_lag": config["audio_lag"]}
        if pack:
            sampling |= {"num_inference_steps": pack.steps, "eta": pack.eta}
            sampling |= {"guidance_scale": 1.0, "joint_guidance_scale": 1.0}
        sample_sheet(model, data, scheduler, config, path, **sampling)

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, sheet, held_out=checked)
    teacher, device = fast(master, trainer), trainer.accelerator.device
    diffusion = Diffusion(scheduler, device)
    batches = ClipBatches.configured(
        config,
        data,
        diffusion,
        trainer,
        dropout=0.0 if pack else ADAPTERS["class_dropout"],  # of which guidance makes use, and turbo does not
        timesteps=partial(timesteps_of, scheduler.timesteps) if pack else diffusion.timesteps,
        shared_noise=model.config.shared_noise,
    )
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if not trainer.accelerator.is_main_process:
        return None
    if pack:
        state = {name: value.to(torch.bfloat16) for name, value in model.adapter_state_dict().items()}
        replace(pack, state=state, compact=False, audio_lag=config["audio_lag"]).save(Path(out) / "pack")
    else:
        pipe.set_facts(audio_lag=config["audio_lag"])
        facts = {**pipe.first_frames, "audio_lag": config["audio_lag"]}
        Pack(classes, model.adapter_state_dict(), **facts).save(Path(out) / "pack")
        save_pipeline(pipe, out)
    return None
