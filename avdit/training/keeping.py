"""What packs make stays as it is while the backbone behind them goes on learning.

A backbone that learned from images again usually wants all its packs trained anew. Where new images concern one pack
alone, the others' own predictions for noised clips, made with the backbone of before, are what they are held to (after
*learning without forgetting*, Li and Hoiem 2016, arXiv 1606.09282). These have no noise in them, so that a clip a step
is enough. A backbone learns nothing new from clips by it: what is asked of it there is what it did already.
"""

from dataclasses import replace

import torch
from torch import Tensor

from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.noise import draw_noise
from avdit.pipeline import AVDiTPipeline
from avdit.training.data import TrainingData
from avdit.training.diffusion import Diffusion
from avdit.training.trainer import Trainer


class KeptPacks:
    """Measures how far predictions of packs move with their backbone.

    Args:
        pipe: A pipeline of the packs on the backbone of before.
        names: Packs that are to stay as they are, turbo ones, too.
        backbone: That which learns; the packs are put round it as well.
        data: Clips of all classes, in the order of ``ALL_CLASSES``.

    Raises:
        ValueError: for a pack that the pipeline does not have, or of which there are no clips.
    """

    def __init__(self, pipe: AVDiTPipeline, names: list[str], backbone: DiT, data: TrainingData) -> None:
        self.pairs, self.clips, self.diffusion = [], [], Diffusion(pipe.scheduler, next(backbone.parameters()).device)
        known = {**pipe.packs, **turbo_packs(pipe)}
        everything = torch.arange(len(data.shards))
        labels = data.labels(everything, torch.zeros_like(everything, dtype=torch.bool)).cpu()
        for name in names:
            if name not in known:
                raise ValueError(f"keeps {name!r}, a pack that the pipeline does not have: {', '.join(known)}")
            pipe.use_pack(name)
            before, after = (AVDiT.from_config(pipe.transformer.config) for _ in range(2))
            for model in (before, after):
                model.load_state_dict(pipe.transformer.state_dict())
                model.to(next(backbone.parameters()).device).requires_grad_(False)
            after.backbone = backbone
            self.pairs.append((before, after))
            rows = torch.tensor([data.classes.index(label) for label in known[name]])
            of_pack = everything[torch.isin(labels, rows)]
            if not len(of_pack):
                raise ValueError(f"keeps {name!r}, of whose classes there are no clips")
            self.clips.append(replace(data, shards=data.shards.picked(of_pack), first_label=int(rows[0])))

    def error(self, trainer: Trainer, generator: torch.Generator, step: int, number: int) -> Tensor:
        """Mean squared change of what one pack predicts for ``number`` noised clips; the packs take turns.

        A quarter of the steps leaves out the class, another one takes frames and sound each alone: sampling asks for
        these, too, to lead away from them.
        """
        (before, after), data = self.pairs[step % len(self.pairs)], self.clips[step % len(self.pairs)]
        device, clip = trainer.accelerator.device, before.clip
        items = torch.randint(len(data.shards), (number,), generator=generator)
        kind = int(torch.randint(4, (), generator=generator))
        labels = data.labels(items, torch.full((number,), kind == 0)).clamp(max=before.config.num_classes).to(device)
        alone = {"joint": kind != 1, "temporal": kind != 1}
        video, audio = (data.shards.get(name, items).to(device).float() for name in ("video", "audio"))
        noise = [part.to(device) for part in draw_noise(clip, before.config.shared_noise, generator, clips=(number,))]
        t = self.diffusion.timesteps(generator, number).to(device)
        given = torch.zeros_like(t, dtype=torch.bool)
        state = [self.diffusion.noised(x, n, t, given)[0] for x, n in zip((video, audio), noise, strict=True)]
        state += [t.unsqueeze(1).expand(-1, count) for count in (clip.frames, clip.audio_columns)]
        with trainer.accelerator.autocast():
            with torch.no_grad():
                wanted = before(*state, labels, **alone)
            found = after(*state, labels, **alone)
        return sum((new.float() - old.float()).square().mean() for new, old in zip(found, wanted, strict=True))


def turbo_packs(pipe: AVDiTPipeline) -> dict[str, list[str]]:
    """The turbo packs of ``pipe`` and their classes."""
    return {turbo: classes for name, classes in pipe.packs.items() if (turbo := pipe.turbo_pack(name))}
