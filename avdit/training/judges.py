"""The judges of ``python -m avdit evaluate``: they tell a clip's class from its picture and from its sound.

    python -m avdit train judges --out runs/judges

Their clips have seeds of their own, between those that models learn from and those that models are measured on. Of a
clip only what the judges look at is kept: the statistics of its frames and its log-mel spectrogram.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from avdit.data.latents import RandomShards, Shards, write_shard
from avdit.data.scenes import CLASSES, HELD_OUT, JUDGES, render_clip
from avdit.evaluation.judge import STATISTICS, FrameStatistics, PictureJudge, SoundJudge
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import LogMel
from avdit.training.data import my_share
from avdit.training.trainer import Trainer, trainer_config

DEFAULTS = {
    "clips": 48,  # rendered clips a class
    "test_clips": 8,  # held-out clips a class on which their own accuracy is measured
    "noise": 0.2,  # on the picture's statistics, in their deviations: what the codecs change must not matter
    "picture": {"steps": 500, "batch_size": 64, "learning_rate": 2e-3, "weight_decay": 0.1, "sample_every": 0},
    "sound": {"steps": 260, "batch_size": 32, "learning_rate": 2e-3, "weight_decay": 0.05, "sample_every": 0},
    "parts": ["picture", "sound"],
}
ROUNDS = 4  # clips of every class in a shard
TEST_SEEDS = HELD_OUT + (1 << 20)  # far from the first held-out seeds, which measure the models
SILENCE = -11.5  # log of the least mel energy that is told apart


@torch.no_grad()
def render_judged(out: Path, clips: int, first_seed: int, share: slice = slice(None)) -> None:
    """Render ``clips`` clips of every class into shards of what is kept of them.

    A shard holds ``picture`` (n, STATISTICS), ``mel`` (n, T, bins) float16 and ``label`` (n,). Shards that are there
    already are kept. ``share`` picks the shards that this process makes.
    """
    clip = ClipGeometry()
    statistics, log_mel = FrameStatistics(), LogMel(clip.sampling_rate, clip.hop_length, clip.mel_bins)
    for start in tqdm(range(0, clips, ROUNDS)[share], desc=f"rendering {out.name}", mininterval=10):
        path = out / f"clips-{start:06d}.safetensors"
        if path.exists():
            continue
        rows: dict[str, list[Tensor]] = {"picture": [], "mel": [], "label": []}
        for seed in range(first_seed + start, first_seed + min(start + ROUNDS, clips)):
            for label in range(len(CLASSES)):
                made = render_clip(label, seed, clip)
                rows["picture"].append(statistics(made.frames[None])[0])
                rows["mel"].append(log_mel(made.audio[None])[0].half())
                rows["label"].append(torch.tensor(label))
        write_shard(path, {name: torch.stack(values) for name, values in rows.items()})


def varied(mel: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mels (B, T, bins) that start elsewhere, louder or softer, with a little noise: their class stays."""
    shifts = torch.randint(mel.shape[1], (len(mel),), generator=generator).tolist()
    rolled = torch.stack([row.roll(shift, 0) for row, shift in zip(mel, shifts, strict=True)])
    gain = torch.rand(len(mel), 1, 1, generator=generator) * 1.8 - 1.4  # nepers: -12 to +3.5 dB
    return (rolled + gain + 0.2 * torch.randn(mel.shape, generator=generator)).clamp(min=SILENCE)


def train(
    judge: nn.Module, key: str, shards: Shards | RandomShards, settings: dict, noise: float, out: Path
) -> Trainer:
    """The trainer of one judge on ``key`` of the shards."""

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        items = trainer.mine(torch.randint(len(shards), (trainer.global_batch,), generator=generator))
        x = shards.get(key, items).float()
        draw = trainer.generators()[0]
        if key == "picture":
            x = x + noise * judge.scale.cpu() * torch.randn(x.shape, generator=draw)
        else:
            x = varied(x, draw)
        device = trainer.accelerator.device
        logits, labels = module(x.to(device)), shards.get("label", items).to(device)
        hits = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.05), "accuracy": hits.detach()}

    trainer = Trainer(judge, loss, trainer_config(settings), out)
    return trainer


@torch.no_grad()
def accuracy(judge: nn.Module, key: str, shards: Shards) -> float:
    """Share of the clips in ``shards`` whose class the judge tells."""
    items = torch.arange(len(shards))
    told = judge.eval().cpu()(shards.get(key, items).float()).argmax(1)
    return round(float((told == shards.get("label", items)).float().mean()), 4)


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Render the clips where they are missing, train both judges and save them in ``out``.

    A dry run says what that would cost and writes nothing.
    """
    config = {**DEFAULTS, **config}
    out, (share, state) = Path(out), my_share()
    cache = Path(config.get("cache", out))
    if dry_run:
        shards: Shards | RandomShards = RandomShards(ClipGeometry(), len(CLASSES))
        clip = ClipGeometry()
        shards.shapes |= {"picture": (STATISTICS,), "mel": (clip.mel_frames, clip.mel_bins)}
    else:
        render_judged(cache / "judged", config["clips"], JUDGES, share)
        render_judged(cache / "judged-test", config["test_clips"], TEST_SEEDS, share)
        state.wait_for_everyone()
        shards, test = Shards(cache / "judged"), Shards(cache / "judged-test")
    costs = {}
    for part in config["parts"]:
        key = {"picture": "picture", "sound": "mel"}[part]
        settings = {**DEFAULTS[part], **config[part]}
        torch.manual_seed(settings.get("seed", 0))
        judge = (PictureJudge if part == "picture" else SoundJudge)(list(CLASSES))
        if part == "picture" and not dry_run:
            judge.set_statistics(shards.get(key, torch.arange(len(shards))))
        trainer = train(judge, key, shards, settings, config["noise"], out / part)
        if dry_run:
            costs[part] = trainer.dry_run()
            continue
        if resume:
            trainer.resume()
        trainer.run()
        if state.is_main_process:
            judge.to(torch.bfloat16).float()  # measured as it is saved
            judge.register_to_config(accuracy=accuracy(judge, key, test))
            trainer.accelerator.print(f"{part} judge: accuracy {judge.config.accuracy} on {len(test)} held-out clips")
            judge.to(torch.bfloat16).save_pretrained(out / f"{part}_judge")
    return costs if dry_run else None
