"""What an image of each class of a pack looks like: the rows of its class table alone, on single frames.

    python -m avdit train class_table --config looks.json --out runs/looks   # {"pipeline": DIR, "pack": "dance"}

Where the scenes of a pack are dressed otherwise, its frozen backbone often knows all that they show, but not which
class shows what. A row of the table for each class says that (as a new word does in textual inversion, Gal et al. 2022,
arXiv 2208.01618): nothing else moves, so that other packs on the backbone stay as they are.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.models.dit import DiT
from avdit.models.published import quiet
from avdit.pipeline import AVDiTPipeline
from avdit.training.adapters import from_pipeline, geometry_of
from avdit.training.backbone import class_sheet, frame_error
from avdit.training.data import TrainingData, held_out_data, training_data
from avdit.training.diffusion import Diffusion
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "pipeline": "runs/adapters/pipeline",  # pipeline folder of one pack
    "pack": "landscape",
    "clips": 160,  # rendered clips a class
    "factorized": None,  # as the pipeline
    "moving_weight": 3.0,  # as the backbone
    "train": {
        "steps": 3000,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "ema_decay": 0.99,
        "warmup_steps": 20,
        "sample_every": 500,
    },
}


def images_of(pipe: AVDiTPipeline) -> DiT:
    """The backbone with the class table of the pack in use, of which the table alone wants a gradient."""
    known = {k: v for k, v in pipe.transformer.backbone.config.items() if not k.startswith("_")}
    model = DiT(**{**known, "num_classes": pipe.transformer.config.num_classes})
    table = {f"y_embedder.{k}": v for k, v in pipe.transformer.class_embedder.state_dict().items()}
    model.load_state_dict({**pipe.transformer.backbone.state_dict(), **table})
    model.requires_grad_(False)
    model.y_embedder.requires_grad_(True)
    return model


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train the class table of a pipeline's pack, and save that pipeline with it in ``out``/pipeline.

    The row of no class stays as it is. A dry run says what that would cost and writes nothing.
    """
    config = {**DEFAULTS, **config}
    config, classes, scheduler = from_pipeline(config)
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    data = training_data(config, out, geometry_of(config), classes, dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    torch.manual_seed(settings.seed)
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"])
    model = images_of(pipe)
    diffusion = Diffusion(scheduler, processes().device)

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        # No class is dropped: guidance leads away from all images, of other packs, too.
        return frame_error(data, module, generator, trainer, diffusion, 0.0, config["moving_weight"])

    def sheet(path: Path) -> None:
        class_sheet(model, data.video_codec, path)

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, sheet, held_out=checked)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    if resume:
        trainer.resume()
    trainer.run()
    if trainer.accelerator.is_main_process:
        pipe.transformer.class_embedder.load_state_dict(model.y_embedder.state_dict())
        with quiet():
            pipe.to(torch.bfloat16)
        pipe.save_pretrained(Path(out) / "pipeline", max_shard_size="5GB")
    return None
