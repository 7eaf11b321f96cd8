"""The judges of ``python -m avdit evaluate``: they tell a clip's class from its picture and from its sound.

    python -m avdit train judges --out runs/judges                     # of the landscape scenes
    python -m avdit train judges --config dance.json --out runs/dance  # {"pack": "dance", "clips": 60}

Their clips have seeds of their own, between those that models learn from and those that models are measured on. Of a
clip only what the judges look at is kept: the statistics of its frames and its log-mel spectrogram, and for dance its
small frames and the truth about its beat, which two further networks learn to tell (``avdit.evaluation.beats``).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from avdit.data.latents import RandomShards, Shards, write_shard
from avdit.data.scenes import ALL_CLASSES, GENRES, HELD_OUT, JUDGES, PACKS, Dice, clip_seed, render_clip
from avdit.data.scenes.music import play
from avdit.evaluation.beats import SIZE, PictureBeat, SoundBeat, apart, small_frames, true_phase
from avdit.evaluation.judge import MOVING, STATISTICS, FrameStatistics, PictureJudge, SoundJudge
from avdit.geometry import ClipGeometry
from avdit.models.mel import LogMel
from avdit.training.data import my_share
from avdit.training.trainer import Trainer, trainer_config

DEFAULTS = {
    "pack": "landscape",
    "clips": 48,  # rendered clips a class
    "test_clips": 8,  # held-out clips a class on which their own accuracy is measured
    "noise": 0.2,  # on the picture's statistics, in their deviations: what the codecs change must not matter
    "picture": {"steps": 500, "batch_size": 64, "learning_rate": 2e-3, "weight_decay": 0.1, "sample_every": 0},
    "sound": {"steps": 260, "batch_size": 32, "learning_rate": 2e-3, "weight_decay": 0.05, "sample_every": 0},
    "picture_beat": {"steps": 300, "batch_size": 32, "learning_rate": 2e-3, "weight_decay": 0.05, "sample_every": 0},
    "sound_beat": {"steps": 200, "batch_size": 32, "learning_rate": 2e-3, "weight_decay": 0.05, "sample_every": 0},
    "parts": None,  # of the four above; all for dance, else the first two
}
INPUTS = {"picture": "picture", "sound": "mel", "picture_beat": "small", "sound_beat": "mel"}
FILES = {"picture": "picture_judge", "sound": "sound_judge", "picture_beat": "picture_beat", "sound_beat": "sound_beat"}
ROUNDS = 4  # clips of every class in a shard
TEST_SEEDS = HELD_OUT + (1 << 20)  # far from the first held-out seeds, which measure the models
SILENCE = -11.5  # log of the least mel energy that is told apart
CLOSE = 0.05  # seconds: as near as a beat judge must be to the truth


@torch.no_grad()
def render_judged(out: Path, clips: int, first_seed: int, classes: tuple[str, ...], share: slice = slice(None)) -> None:
    """Render ``clips`` clips of every class into shards of what is kept of them.

    A shard holds ``picture`` (n, STATISTICS; with MOVING for dance), ``mel`` (n, T, bins) float16 and ``label`` (n,),
    the place in ``classes``; of dance also ``small`` (n, F, 3, SIZE, SIZE) uint8 and ``beat`` (n, 2), seconds of the
    first beat and of its length. Shards that are there already are kept. ``share`` picks the shards that this process
    makes.
    """
    clip = ClipGeometry()
    statistics = FrameStatistics(moving=classes == GENRES)
    log_mel = LogMel(clip.sampling_rate, clip.hop_length, clip.mel_bins)
    for start in tqdm(range(0, clips, ROUNDS)[share], desc=f"rendering {out.name}", mininterval=10):
        path = out / f"clips-{start:06d}.safetensors"
        if path.exists():
            continue
        rows: dict[str, list[Tensor]] = {"picture": [], "mel": [], "label": [], "small": [], "beat": []}
        for seed in range(first_seed + start, first_seed + min(start + ROUNDS, clips)):
            for label, name in enumerate(classes):
                made = render_clip(name, seed, clip)
                rows["picture"].append(statistics(made.frames[None])[0])
                rows["mel"].append(log_mel(made.audio[None])[0].half())
                rows["label"].append(torch.tensor(label))
                if name in GENRES:
                    # The music is the first that a clip draws, so the same dice play it again.
                    _, beats, beat = play(Dice(clip_seed(ALL_CLASSES.index(name), seed)), clip, name)
                    rows["small"].append((small_frames(made.frames[None])[0] * 255).round().to(torch.uint8))
                    rows["beat"].append(torch.tensor([beats[0], beat]))
        write_shard(path, {name: torch.stack(values).contiguous() for name, values in rows.items() if values})


def varied(mel: Tensor, generator: torch.Generator, shift: bool = True) -> Tensor:
    """Log-mels (B, T, bins), louder or softer, with a little noise: their class stays, also where they ``shift``."""
    if shift:
        shifts = torch.randint(mel.shape[1], (len(mel),), generator=generator).tolist()
        mel = torch.stack([row.roll(places, 0) for row, places in zip(mel, shifts, strict=True)])
    gain = torch.rand(len(mel), 1, 1, generator=generator) * 1.8 - 1.4  # nepers: -12 to +3.5 dB
    return (mel + gain + 0.2 * torch.randn(mel.shape, generator=generator)).clamp(min=SILENCE)


def varied_frames(small: Tensor, generator: torch.Generator) -> Tensor:
    """Small frames (B, F, 3, SIZE, SIZE) in [0, 255] to [0, 1], some mirrored, brighter or darker, with noise."""
    mirrored = torch.rand(len(small), generator=generator) < 0.5
    frames = torch.where(mirrored.view(-1, 1, 1, 1, 1), small.flip(-1), small) / 255
    gain = 0.8 + 0.4 * torch.rand(len(small), 1, 1, 1, 1, generator=generator)
    return frames * gain + 0.01 * torch.randn(frames.shape, generator=generator)


def phases(shards: Shards | RandomShards, items: Tensor) -> Tensor:
    """The true phase of the beat (n, F, 2) at every frame of ``items`` (n,)."""
    clip, beat = ClipGeometry(), shards.get("beat", items)
    return true_phase(beat[:, 0], beat[:, 1], torch.arange(clip.frames) / clip.fps)


def train(
    judge: nn.Module, part: str, shards: Shards | RandomShards, settings: dict, noise: float, out: Path
) -> Trainer:
    """The trainer of one judge on the shards."""

    def batch(items: Tensor, draw: torch.Generator) -> Tensor:
        x = shards.get(INPUTS[part], items).float()
        if part == "picture":
            return x + noise * judge.scale.cpu() * torch.randn(x.shape, generator=draw)
        return varied_frames(x, draw) if part == "picture_beat" else varied(x, draw, shift=part == "sound")

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        items = trainer.mine(torch.randint(len(shards), (trainer.global_batch,), generator=generator))
        device = trainer.accelerator.device
        out = module(batch(items, trainer.generators()[0]).to(device))
        if part.endswith("beat"):
            return {"loss": (out - phases(shards, items).to(device)).square().sum(-1).mean()}
        labels = shards.get("label", items).to(device)
        hits = (out.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(out, labels, label_smoothing=0.05), "accuracy": hits.detach()}

    trainer = Trainer(judge, loss, trainer_config(settings), out)
    return trainer


@torch.no_grad()
def accuracy(judge: nn.Module, part: str, shards: Shards) -> float:
    """Share of the clips in ``shards`` whose class, or whose beat to within ``CLOSE``, the judge tells."""
    items = torch.arange(len(shards))
    x = shards.get(INPUTS[part], items).float() / (255 if part == "picture_beat" else 1)
    told = judge.eval().cpu()(x)
    if part.endswith("beat"):
        right = apart(told, phases(shards, items), ClipGeometry().fps).abs() <= CLOSE
    else:
        right = told.argmax(1) == shards.get("label", items)
    return round(float(right.float().mean()), 4)


def parts_of(config: dict) -> list[str]:
    """The judges that are to be trained.

    Raises:
        ValueError: for a pack or a part that does not exist.
    """
    if config["pack"] not in PACKS:
        raise ValueError(f"unknown pack {config['pack']!r}: choose one of {', '.join(PACKS)}")
    able = [part for part in INPUTS if config["pack"] == "dance" or not part.endswith("beat")]
    for part in config["parts"] or ():
        if part not in able:
            raise ValueError(f"unknown part {part!r} of {config['pack']}: choose from {', '.join(able)}")
    return config["parts"] or able


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Render the clips where they are missing, train the judges and save them in ``out``.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for a pack or a part that does not exist.
    """
    config = {**DEFAULTS, **config}
    parts, classes = parts_of(config), PACKS[config["pack"]]
    out, (share, state) = Path(out), my_share()
    cache = Path(config.get("cache", out))
    inputs = STATISTICS + (MOVING if classes == GENRES else 0)
    if dry_run:
        clip = ClipGeometry()
        shards: Shards | RandomShards = RandomShards(clip, len(classes))
        shards.shapes |= {"picture": (inputs,), "mel": (clip.mel_frames, clip.mel_bins), "beat": (2,)}
        shards.shapes |= {"small": (clip.frames, 3, SIZE, SIZE)}
    else:
        render_judged(cache / "judged", config["clips"], JUDGES, classes, share)
        render_judged(cache / "judged-test", config["test_clips"], TEST_SEEDS, classes, share)
        state.wait_for_everyone()
        shards, test = Shards(cache / "judged"), Shards(cache / "judged-test")
    kinds: dict[str, Callable[[], nn.Module]] = {
        "picture": lambda: PictureJudge(list(classes), inputs=inputs),
        "sound": lambda: SoundJudge(list(classes)),
        "picture_beat": PictureBeat,
        "sound_beat": SoundBeat,
    }
    costs = {}
    for part in parts:
        settings = {**DEFAULTS[part], **config[part]}
        torch.manual_seed(settings.get("seed", 0))
        judge = kinds[part]()
        if part == "picture" and not dry_run:
            judge.set_statistics(shards.get("picture", torch.arange(len(shards))))
        trainer = train(judge, part, shards, settings, config["noise"], out / "training" / part)
        if dry_run:
            costs[part] = trainer.dry_run()
            continue
        trainer.run(resume)
        if state.is_main_process:
            judge.to(torch.bfloat16).float()  # measured as it is saved
            judge.register_to_config(accuracy=accuracy(judge, part, test))
            trainer.accelerator.print(f"{FILES[part]}: accuracy {judge.config.accuracy} on {len(test)} held-out clips")
            judge.to(torch.bfloat16).save_pretrained(out / FILES[part])
    return costs if dry_run else None
