"""How many channels the video latents should have: codecs, and backbones on them, under one equal budget.

    python -m benchmarks.codec_channels runs/channels --cache runs/codecs --codec-minutes 10 --backbone-minutes 10

More channels keep more of a picture and give the transformer more to learn, so both are measured. Every codec begins
with the shipped one's layers but for the two at the latent, every backbone with the shipped one's layers but for the
first and the last; those begin anew, for the shipped number of channels too. What is finished is not done again.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from avdit.benchmark import measure
from avdit.cli import Parser
from avdit.data.latents import encode_shards
from avdit.data.scenes import ALL_CLASSES, HELD_OUT, PACKS, render_clip
from avdit.evaluation.frechet import frechet_distance
from avdit.evaluation.judge import FrameStatistics
from avdit.generate import DEFAULT_CHECKPOINT
from avdit.geometry import ClipGeometry
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.features import ImageFeatures, feature_distance
from avdit.models.video_codec import VideoCodec
from avdit.training import backbone, codecs
from avdit.training.adapters import geometry_of
from avdit.training.backbone import sample_images
from avdit.training.codecs import with_channels
from avdit.training.data import load_codecs

ENDS = ("x_embedder.", "final_layer.linear.")  # of a backbone: what its number of channels shapes


def parser() -> Parser:
    said = Parser(prog="python -m benchmarks.codec_channels", description="Compare numbers of latent channels.")
    said.add_argument("out", type=Path, help="folder of the variants, the results and the table")
    said.add_argument("--cache", type=Path, required=True, help="folder whose clips/ holds rendered clips")
    said.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="pipeline to begin with")
    said.add_argument("--pack", choices=PACKS, default="landscape")
    said.add_argument("--channels", type=int, nargs="+", default=[16, 24, 32])
    said.add_argument("--codec-minutes", type=float, required=True, help="of training, each codec")
    said.add_argument("--backbone-minutes", type=float, required=True, help="of training, each backbone")
    said.add_argument("--pictures", type=int, default=16, help="of each class that are measured")
    said.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    return said


def train_codec(args: argparse.Namespace, channels: int, folder: Path) -> None:
    """Train one codec and encode the clips with it."""
    start, clips = folder / "start", args.cache / "clips"
    with_channels(VideoCodec.from_pretrained(args.checkpoint / "video_codec"), channels).save_pretrained(start)
    config = {"parts": ["video"], "video_channels": channels, "video_from": start, "cache": args.cache, "clips": 0}
    config["video"] = {"steps": 10**9, "minutes": args.codec_minutes, "batch_size": 16, "sample_every": 0}
    config["video"] |= {"mixed_precision": args.precision}
    codecs.run({**config, "audio": {}}, folder, resume=True)
    shutil.copytree(args.checkpoint / "audio_codec", folder / "audio_codec", dirs_exist_ok=True)
    video, audio = load_codecs(folder, geometry(args, channels))
    with torch.autocast(video.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        encode_shards(clips / args.pack, folder / "latents" / args.pack, video, audio)


def geometry(args: argparse.Namespace, channels: int) -> ClipGeometry:
    """The checkpoint's with other channels."""
    return replace(geometry_of({"start": args.checkpoint / "transformer"}), video_channels=channels)


def train_backbone(args: argparse.Namespace, channels: int, folder: Path) -> None:
    """Train one backbone on the latents of its codec."""
    shipped = AVDiT.from_pretrained(args.checkpoint / "transformer").backbone
    shape = {name: value for name, value in shipped.config.items() if not name.startswith("_")}
    start = DiT(**{**shape, "in_channels": channels, "num_classes": len(ALL_CLASSES)})
    sizes = {name: value.shape for name, value in start.state_dict().items() if not name.startswith(ENDS)}
    kept = {name: value for name, value in shipped.state_dict().items() if sizes.get(name) == value.shape}
    start.load_state_dict(kept, strict=False)
    start.save_pretrained(folder / "backbone-start")
    train = {**backbone.DEFAULTS["train"], "steps": 10**9, "minutes": args.backbone_minutes, "sample_every": 0}
    train |= {"mixed_precision": args.precision}
    config = {"start": folder / "backbone-start", "codecs": folder, "cache": folder, "clips": 0, "train": train}
    sizes = {name: value for name, value in geometry(args, channels).as_dict().items() if name != "samples"}
    backbone.run({**config, "geometry": sizes}, folder / "training", resume=True)


def held_out(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The middle pictures (n, 3, H, W) in [-1, 1] of held-out clips, and their labels (n,)."""
    labels = [ALL_CLASSES.index(name) for name in PACKS[args.pack] for _ in range(args.pictures)]
    clips = (render_clip(label, HELD_OUT + i % args.pictures) for i, label in enumerate(labels))
    pictures = torch.stack([clip.frames[len(clip.frames) // 2].permute(2, 0, 1) for clip in clips])
    return pictures * 2 - 1, torch.tensor(labels)


@torch.no_grad()
def figures(folder: Path, channels: int, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """What one codec keeps of ``pictures``, and how far pictures of its backbone are from them."""
    codec = VideoCodec.from_pretrained(folder / "video_codec", torch_dtype=torch.float32).eval()
    model = DiT.from_pretrained(folder / "training" / "backbone", torch_dtype=torch.float32).eval()
    network, statistics = ImageFeatures(), FrameStatistics()

    def told(x: Tensor) -> Any:
        shown = (x / 2 + 0.5).clamp(0, 1).movedim(1, -1).unsqueeze(1).expand(-1, 2, -1, -1, -1)  # as still clips
        return torch.cat([statistics(part) for part in shown.split(16)]).numpy()

    latents = codec.encode(pictures.unsqueeze(1))
    rebuilt = codec.decode(latents).squeeze(1)
    made = torch.cat([codec.decode(sample_images(model, part).unsqueeze(1)).squeeze(1) for part in labels.split(48)])
    psnr = -10 * torch.log10(((rebuilt - pictures) / 2).square().mean((1, 2, 3)))
    pairs = zip(pictures.split(16), rebuilt.split(16), strict=True)
    distance = [feature_distance(network(a), network(b)) for a, b in pairs]
    real, sixteen = told(pictures), latents[:16].movedim(1, 0).bfloat16()
    half = codec.to(torch.bfloat16)
    return {
        "channels": channels,
        "psnr_db": float(psnr.mean()),
        "psnr_db_worst": float(psnr.min()),
        "feature_distance": float(torch.cat(distance).mean()),
        "decode_ms": measure(lambda: half.decode(sixteen), 5)["median_ms"],
        "picture_distance_codec": frechet_distance(real, told(rebuilt)),
        "picture_distance": frechet_distance(real, told(made)),
        "codec_steps": last_step(folder / "video"),
        "backbone_steps": last_step(folder / "training"),
    }


def last_step(folder: Path) -> int:
    with safe_open(folder / "state.safetensors", "pt") as file:
        return int(file.metadata()["step"])


def table(found: list[dict[str, float]]) -> str:
    head = ["channels", "PSNR", "worst", "feature distance", "decoding 16 frames"]
    head += ["Fréchet distance of rebuilt pictures", "of generated pictures", "steps of the codec", "of the backbone"]
    rows = [head, ["---:"] * len(head)]
    for one in found:
        row = [f"{one['channels']}", f"{one['psnr_db']:.2f} dB", f"{one['psnr_db_worst']:.2f} dB"]
        row += [f"{one['feature_distance']:.3f}", f"{one['decode_ms']:.0f} ms"]
        row += [f"{one['picture_distance_codec']:.1f}", f"{one['picture_distance']:.1f}"]
        rows.append([*row, f"{one['codec_steps']}", f"{one['backbone_steps']}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Train what is not finished, then print and write the table; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        if min(args.codec_minutes, args.backbone_minutes, args.pictures - 1) <= 0:
            raise ValueError("minutes must be more than 0, and pictures 2 or more")
        if not list((args.cache / "clips" / args.pack).glob("clips-*.safetensors")):
            raise ValueError(f"{args.cache}/clips/{args.pack} holds no rendered clips")
        pictures = labels = None
        for channels in args.channels:
            folder = args.out / f"{channels}-channels"
            note = folder / "result.json"
            if note.exists():
                continue
            train_codec(args, channels, folder)
            train_backbone(args, channels, folder)
            if pictures is None:
                pictures, labels = held_out(args)
            note.write_text(json.dumps(figures(folder, channels, pictures, labels), indent=1))
    except (ValueError, OSError) as error:
        print(f"codec_channels: {error}", file=sys.stderr)
        return 2
    found = [json.loads((args.out / f"{channels}-channels" / "result.json").read_text()) for channels in args.channels]
    (args.out / "channels.md").write_text(table(found))
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
