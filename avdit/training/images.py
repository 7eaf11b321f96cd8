"""What an image of each class of a pack looks like, on single frames: its class table, and updates for images.

    python -m avdit train images --config looks.json --out runs/looks   # {"pipeline": DIR, "pack": "dance"}

Where the scenes of a pack are dressed otherwise, its frozen backbone often knows all that they show, but not which
class shows what. A row of the table for each class says that (as a new word does in textual inversion, Gal et al. 2022,
arXiv 2208.01618). ``"image_rank": 12`` teaches more, such as new garments: low-rank updates of the backbone's attention
and MLP (Hu et al. 2021, arXiv 2106.09685), which only frames have that know of no others, as the first frame of a clip
that is made alone. Nothing else moves, so that other packs on the backbone stay as they are.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from avdit.models.adapters import LoRA
from avdit.models.avdit import AVDiT
from avdit.pipeline import AVDiTPipeline
from avdit.training.adapters import from_pipeline, geometry_of, save_pipeline
from avdit.training.backbone import class_sheet, frame_error
from avdit.training.data import TrainingData, held_out_data, training_data
from avdit.training.diffusion import Diffusion
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "pipeline": "runs/adapters/pipeline",  # pipeline folder of one pack
    "pack": "landscape",
    "clips": 160,  # rendered clips a class
    "factorized": None,  # as the pipeline
    "class_table": True,  # trains; without class_dropout the row of no class stays as it is
    "image_rank": 0,  # of the updates for images, which train, too; may rise; 0: they stay as they are, or are none
    "class_dropout": 0.0,
    "moving_weight": 3.0,  # as the backbone
    "class_repeats": {},
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


class Images(nn.Module):
    """The joint model as one of images alone, called as the :class:`DiT` that it holds."""

    def __init__(self, model: AVDiT) -> None:
        super().__init__()
        self.model = model
        self.config = FrozenDict({**model.backbone.config, "num_classes": model.config.num_classes})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict from noised latents ``x`` (N, C, h, w), timesteps ``t`` (N,) and labels ``y`` (N,)."""
        return self.model(x.unsqueeze(1), None, t.unsqueeze(1), None, y, joint=False, temporal=False)[0].squeeze(1)


def give_updates(pipe: AVDiTPipeline, rank: int) -> None:
    """Give the model of ``pipe`` updates for images of ``rank``, or more of them; 0: as it is.

    Those that are new change nothing yet.

    Raises:
        ValueError: where it has some of a higher rank.
    """
    model = pipe.transformer
    known = model.config.image_rank
    if rank and rank < known:
        raise ValueError(f"image_rank {rank} is less than the pipeline's, which is {known}")
    if rank <= known:
        return
    wider = model.with_parts(image_rank=0).with_parts(image_rank=rank)
    if known:
        for old, new in zip(model.image_parts().modules(), wider.image_parts().modules(), strict=True):
            if isinstance(old, LoRA):
                with torch.no_grad():
                    new.down.weight[:known] = old.down.weight
                    new.up.weight[:, :known] = old.up.weight
    pipe.register_modules(transformer=wider)


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Train what a pipeline's pack has for images, and save that pipeline with it in ``out``/pipeline.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: where nothing would train, or the pipeline has updates of a higher rank.
    """
    config = {**DEFAULTS, **config}
    config, classes, scheduler = from_pipeline(config)
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    torch.manual_seed(settings.seed)
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"])
    rank = config["image_rank"]
    if not (config["class_table"] or rank):
        raise ValueError("class_table is false and image_rank 0: nothing would train")
    give_updates(pipe, rank)
    if rank:
        pipe.set_facts(image_steps=None)  # what these updates were taught of few steps is lost
    data = training_data(config, out, geometry_of(config), classes, dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    data = data.repeated(config["class_repeats"])
    model = Images(pipe.transformer.requires_grad_(False))
    model.model.class_embedder.requires_grad_(config["class_table"])
    model.model.image_parts().requires_grad_(bool(rank))
    diffusion = Diffusion(scheduler, processes().device)

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        weights = config["class_dropout"], config["moving_weight"]
        return frame_error(data, module, generator, trainer, diffusion, *weights)

    def sheet(path: Path) -> None:
        class_sheet(model, data.video_codec, path)

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, sheet, held_out=checked)
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        save_pipeline(pipe, out)
    return None
