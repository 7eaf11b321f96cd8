"""The video decoder for what a model makes, beside what the encoder makes.

    python -m avdit train decoder --config decoder.json --out runs/decoder    # {"pipeline": DIR}

A decoder that knows the encoder's latents alone shows those of a model, which are a little too smooth, as soft
pictures. Here each clip is also *remade*: its latents are noised part of the way and sampled on from there (as in
SDEdit, Meng et al. 2022, arXiv 2108.01073). Such latents keep the clip's layout and have the model's own faults, and
are to be shown as the clip. What they no longer tell has more than one answer, so that beside the distance of features
an adversary judges these frames. The encoder's latents are shown as before, and latents themselves stay as they are, so
that the model goes on as before. The result is the pipeline with the new decoder, in ``out``/pipeline.

With ``"made": 1`` the model also makes clips from noise, which stand for no rendered one. What many of their frames, of
one class, have in common as they are shown is led to what rendered frames have in common (moments.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from avdit.checkpoint import weights_sha256
from avdit.data.latents import RandomShards, Shards, write_shard
from avdit.data.scenes import ALL_CLASSES, PACKS
from avdit.generate import between, whole
from avdit.geometry import ClipGeometry
from avdit.machine import fast_precision
from avdit.models.features import ImageFeatures, feature_distance
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import GUIDANCE_END, AVDiTPipeline
from avdit.training.adversary import Adversary, Together
from avdit.training.codecs import DEFAULTS as CODECS
from avdit.training.codecs import picture_error
from avdit.training.data import my_share, rendered_clips
from avdit.training.moments import WARMUP, Moments
from avdit.training.pictures import FeatureDiscriminator, Shown, scaled
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS: dict[str, Any] = {
    "pipeline": "checkpoints/avdit-xs",  # of the packs of the scenes
    "clips": 36,  # rendered clips a class
    "remade": 2,  # times that each of them is remade
    "made": 0,  # clips of its class that are made from noise for each of them
    "sampling_steps": 12,  # of the sampler where no turbo adapters are used, which are in half of the times
    "eta": 0.7,  # its new noise
    "detail": CODECS["detail"],
    "squared": 8.0,  # of the encoder's latents alone
    "remade_weight": 0.5,  # of the error of remade frames beside that of the encoder's
    "perceptual": 0.5,  # weight of the distance of ImageNet features
    "adversarial_weight": 0.6,  # of the adversary, as a share of the gradient of all else
    "moments_weight": 0.6,  # the same of the moments of frames that are made from noise
    "train": {
        "steps": 3000,
        "batch_size": 8,
        "learning_rate": 3e-4,
        "warmup_steps": 50,
        "ema_decay": 0.995,
        "sample_every": 500,
    },
}
ADVERSARY_WARMUP = 200  # steps in which its weight rises
LEAST_NOISE = 0.15  # share of the schedule from which on it pays to remake a clip
BATCH = 8  # clips that are remade at once


@torch.no_grad()
def remade(
    pipe: AVDiTPipeline,
    video: Tensor,
    audio: Tensor,
    labels: list[str],
    turbo: bool,
    steps: int,
    eta: float,
    generator: torch.Generator,
) -> Tensor:
    """What the model makes of the latents of clips: of their picture (B, F, C, h, w), noised part of the way.

    From no more noise than where guidance ends, so that sampling on is what it is when clips are made. The first frame
    of factorized adapters stays, as the pipeline has made it before the others.

    Args:
        audio: (B, C, T, f), which is noised alike.
        labels: The clips' classes, all of one pack.
        turbo: By turbo adapters where there are some, with their steps and new noise in place of ``steps`` and ``eta``.
    """
    pack, ids = pipe.pack_of(pipe.label_ids(labels))
    if turbo and (distilled := pipe.turbo_of(labels)):
        pack, steps, eta = pipe.turbo_pack(pack), distilled.steps, distilled.eta
    pipe.use_pack(pack)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps, device=video.device)
    last = len(scheduler.alphas_cumprod)
    times = [t for i, t in enumerate(scheduler.timesteps) if i >= GUIDANCE_END * steps]
    able = [k for k, t in enumerate(times) if t >= LEAST_NOISE * last] or [0]
    times = times[able[int(torch.randint(len(able), (), generator=generator))] :]
    batch, frames = video.shape[:2]
    clean, keep = video, torch.zeros(frames, dtype=torch.bool, device=video.device)
    keep[0] = pipe.factorized

    def noise() -> list[Tensor]:
        return [part.to(video.device) for part in pipe.prepare_latents(batch, generator)]

    state = [scheduler.add_noise(x, n, times[0].expand(batch)) for x, n in zip((video, audio), noise(), strict=True)]
    denoiser, columns = pipe.denoiser(), pipe.geometry.audio_columns
    classes = torch.tensor(ids, device=video.device)
    for t in times:
        state[0] = torch.where(keep.view(1, -1, 1, 1, 1), clean, state[0])
        now = t.expand(batch, frames).masked_fill(keep, 0), t.expand(batch, columns)
        out = denoiser(*(x.to(pipe.transformer.dtype) for x in state), *now, classes)
        state = [
            scheduler.step(v.float(), t, x, eta=eta, variance_noise=n).prev_sample
            for v, x, n in zip(out, state, noise(), strict=True)
        ]
    return torch.where(keep.view(1, -1, 1, 1, 1), clean, state[0])


@torch.no_grad()
def made(pipe: AVDiTPipeline, labels: list[str], turbo: bool, steps: int, generator: torch.Generator) -> Tensor:
    """Latents of pictures (B, F, C, h, w) that the model makes of noise; classes and ``turbo`` as in :func:`remade`."""
    how = {"turbo": turbo and pipe.turbo_of(labels) is not None, "num_inference_steps": steps}
    return pipe(labels, **how, generator=generator, output_type="latent", return_dict=False)[0]


def remade_latents(pipe: AVDiTPipeline, clips: Path, out: Path, config: dict[str, Any]) -> None:
    """Write the latents of the shards in ``clips``.

    Each holds ``video`` (n, F, C, h, w), ``remade`` and, where some are asked for, ``made`` (n, times, F, C, h, w).

    Shards that are there already are kept; every process makes its share.
    """
    share, state = my_share()
    for path in tqdm(sorted(clips.rglob("clips-*.safetensors"))[share], desc="remaking clips", mininterval=10):
        target = out / path.relative_to(clips)
        if target.exists():
            continue
        generator = torch.Generator().manual_seed(int(path.stem.split("-")[1]))
        kinds: dict[str, list[Tensor]] = {}
        with safe_open(path, "pt") as file:
            pictures, sounds, labels = file.get_slice("frames"), file.get_slice("audio"), file.get_tensor("label")
            for number, start in enumerate(range(0, len(labels), BATCH)):
                part = slice(start, start + BATCH)
                frames = pictures[part].to(pipe.device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
                names = [ALL_CLASSES[label] for label in labels[part].tolist()]
                with fast_precision(pipe.device), torch.no_grad():
                    clip = (
                        pipe.video_codec.encode(frames).float(),
                        pipe.audio_codec.encode(sounds[part].to(pipe.device)).float(),
                    )
                    steps = config["sampling_steps"]
                    again = [
                        remade(pipe, *clip, names, k % 2 == 1, steps, config["eta"], generator)
                        for k in range(config["remade"])
                    ]
                    anew = [made(pipe, names, (k + number) % 2 == 1, steps, generator) for k in range(config["made"])]
                found = {"video": clip[0]} | {k: torch.stack(v, 1) for k, v in (("remade", again), ("made", anew)) if v}
                for kind, rows in found.items():
                    kinds.setdefault(kind, []).append(rows.half().cpu())
        write_shard(target, {"label": labels, **{kind: torch.cat(rows) for kind, rows in kinds.items()}})
    state.wait_for_everyone()


class Critics(Together):
    """What judges frames that have more than one answer: an adversary remade ones, moments those made from noise.

    Args:
        adversary: None: remade frames are judged by their errors alone.
        moments: None where none are made from noise.
    """

    def __init__(self, adversary: Adversary | None, moments: Moments | None, moments_weight: float) -> None:
        self.adversary, self.moments, self.moments_weight = adversary, moments, moments_weight
        self.parts = {name: part for name, part in (("adversary", adversary), ("moments", moments)) if part}

    def __call__(
        self,
        y: Tensor,
        maps: tuple[list[Tensor], list[Tensor]],
        again: Tensor,
        anew: Tensor,
        labels: Tensor,
        loss: Tensor,
        generator: torch.Generator,
        step: int,
    ) -> dict[str, Tensor]:
        """``loss``, whose gradient now has beside its own what leads frames ``y`` (N, 3, H, W) to rendered ones.

        Args:
            maps: Features of rendered frames and of these.
            again, anew: Which rows are remade and which made from noise, (N,).
            labels: Classes, (N,).
        """
        told = {"loss": loss}
        if self.adversary:
            pair = (scaled([m[again].float() for m in of]) for of in maps)
            told = self.adversary.judged((y,), *pair, (), loss, generator, step)
        if self.moments:
            real, found = ([m[anew].float() for m in of] for of in maps)
            weight = min(1.0, step / WARMUP) * self.moments_weight
            told["loss"] = self.moments.pull((y,), told["loss"], (found, real), labels[anew], weight, loss)
            told["apart"] = self.moments.apart()
        return told


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Render and remake the clips where they are missing, train the decoder, and save the pipeline with it.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for settings or a pipeline that cannot be used.
    """
    config = {**DEFAULTS, **config}
    for name in ("clips", "remade", "sampling_steps"):
        whole(config[name], name, 1, 1_000 if name == "sampling_steps" else 1_000_000)
    between(config["eta"], "eta", 0, 1)
    whole(config["made"], "made", 0, 1_000_000)
    for name in ("adversarial_weight", "moments_weight"):
        between(config[name], name, 0, 10)
    settings = trainer_config({**DEFAULTS["train"], **config["train"]})
    if settings.batch_size < 2:
        raise ValueError(f"batch_size {settings.batch_size} must be 2 or more: every second row is a remade frame")
    if config["made"] and settings.batch_size % 4:
        raise ValueError(f"batch_size {settings.batch_size} must be a multiple of 4: half of it is made from noise")
    pipe = AVDiTPipeline.from_pretrained(config["pipeline"], torch_dtype=torch.bfloat16)
    pipe.to(processes().device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.geometry != ClipGeometry():
        raise ValueError(f"{config['pipeline']} makes clips of another size or rate than the scenes'")
    packs = [name for name, classes in PACKS.items() if list(classes) in pipe.packs.values()]
    if not packs:
        raise ValueError(f"{config['pipeline']} has no pack of the scenes' classes: it has {', '.join(pipe.packs)}")
    cache = Path(config.get("cache", out))
    if dry_run:
        kinds = {"classes": len(pipe.classes), "device": processes().device}
        pictures, latents = (
            RandomShards(pipe.geometry, latents=part, remade=config["remade"], made=config["made"], **kinds)
            for part in (False, True)
        )
    else:
        clips = rendered_clips(cache, config["clips"], packs)
        clips = clips / packs[0] if len(packs) == 1 else clips  # others' clips may lie there, too
        # What the model made holds for these weights and settings alone.
        asked = (config[name] for name in ("remade", "made", "sampling_steps", "eta"))
        how = [weights_sha256(Path(config["pipeline"]))[:12], *asked]
        folder = cache / "remade" / "-".join(map(str, [*packs, *how]))
        remade_latents(pipe, clips, folder, config)
        pictures, latents = Shards(clips), Shards(folder)
    torch.manual_seed(settings.seed)
    codec = VideoCodec.from_pretrained(Path(config["pipeline"]) / "video_codec").requires_grad_(False)
    codec.autoencoder.decoder.requires_grad_(True)
    codec.to(memory_format=torch.channels_last)
    frames = pipe.geometry.frames

    def draw(generator: torch.Generator, number: int, mine: Callable = lambda x: x) -> tuple[Tensor, ...]:
        """Pictures and their classes; the encoder's and remade latents of each, and such as were made of its class."""
        items = mine(torch.randint(len(pictures), (number,), generator=generator))
        parts = mine(torch.randint(frames, (number,), generator=generator))
        x = pictures.get("frames", items, parts).to(trainer.accelerator.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows, found = torch.arange(len(items)), [latents.get("video", items, parts)]
        for kind in ("remade", "made"):
            if config[kind]:
                which = mine(torch.randint(config[kind], (number,), generator=generator))
                found.append(latents.get(kind, items, which)[rows, parts.to(rows.device)])
        return x, latents.get("label", items).to(x.device), *(part.to(x.device).float() for part in found)

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        x, labels, encoded, *others = draw(generator, trainer.global_batch, trainer.mine)
        # Of two rows one is remade; where some are made from noise, of four rows one is, and two are these.
        kind = trainer.here(torch.arange(trainer.global_batch) % (4 if config["made"] else 2)).clamp(max=2)
        own, again, anew = (kind == k for k in range(3))
        shown = encoded
        for which, part in zip((again, anew), others, strict=False):
            shown = torch.where(which.view(-1, 1, 1, 1), part, shown)
        y = module(shown)
        total, l1 = picture_error(x[own], y[own], config["detail"], config["squared"])
        far, _ = picture_error(x[again], y[again], config["detail"], 0.0)
        with trainer.accelerator.autocast():
            with torch.no_grad():
                real = features(x)
            found = features(y)
        distance = feature_distance(*([m[~anew] for m in maps] for maps in (found, real)))
        terms = {"l1": l1.detach(), "far": far.detach(), "features": distance[own[~anew]].mean().detach()}
        terms["features_far"] = distance[again[~anew]].mean().detach()
        total = total + config["remade_weight"] * far + config["perceptual"] * distance.mean()
        return {**terms, **trainer.beside(y, (real, found), again, anew, labels, total, generator, step)}

    def sheet(path: Path) -> None:
        x, _, *found = draw(torch.Generator().manual_seed(1), 9)
        y, *others = (trainer.raw(part).clamp(-1, 1) for part in found)
        psnr = -10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3))).mean()
        trainer.accelerator.print(f"{path.name}: PSNR {psnr:.2f} dB on 9 frames")
        save_png(image_grid(torch.cat([x, y, *others]) / 2 + 0.5, 9), path)

    trainer = Trainer(Shown(codec), loss, settings, out, sheet)
    features = ImageFeatures().to(trainer.accelerator.device)
    weight, adversary, moments = config["adversarial_weight"], None, None
    if weight:
        adversary = Adversary(trainer, FeatureDiscriminator(), weight, ADVERSARY_WARMUP)
    if config["made"]:
        moments = Moments(trainer.accelerator, features, len(ALL_CLASSES))
    trainer.beside = Critics(adversary, moments, config["moments_weight"])
    if dry_run:
        return trainer.dry_run()
    trainer.run(resume)
    if processes().is_main_process:
        pipe.register_modules(video_codec=codec.to(torch.bfloat16))
        pipe.save_pretrained(Path(out) / "pipeline", max_shard_size="14MB")  # files that a repository takes
    return None
