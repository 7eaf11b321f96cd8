"""The README's picture of one clip a class: ``python -m benchmarks.examples assets/generated.jpg --seed 1``."""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from avdit.generate import DEFAULT_CHECKPOINT, Request, Result, generate, load_pipeline
from avdit.machine import fast_dtype, fast_precision
from avdit.models.mel import LogMel

TILE, STRIP = 112, 40  # pixels of a frame's side and of the spectrogram's height
SHOWN = 8  # frames of a clip


def row(result: Result, name: str) -> Image.Image:
    """Every second frame over the log-mel spectrogram of the same time."""
    picture = Image.new("RGB", (SHOWN * TILE, TILE + STRIP), "white")
    for k, frame in enumerate(result.frames[:: len(result.frames) // SHOWN][:SHOWN]):
        tile = Image.fromarray((frame * 255).round().astype("uint8"))
        picture.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (k * TILE, 0))
    mel = LogMel(result.sampling_rate, 160, 64)(torch.from_numpy(result.audio).float()[None])[0]
    grey = ((mel.T.flip(0) + 11.5) / 12).clamp(0, 1).mul(255).byte().numpy()  # ln 1e-5 is black
    picture.paste(Image.fromarray(grey).convert("RGB").resize((SHOWN * TILE, STRIP - 2)), (0, TILE))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(draw.textbbox((4, 1), name), fill="black")
    draw.text((4, 1), name, fill="white")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--pack", help="whose classes; the checkpoint's first by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sampler", default="ddim", help="ddim, dpm++, unipc or turbo")
    args = parser.parse_args()
    cpu = torch.device("cpu")
    pipe = load_pipeline(args.checkpoint, dtype=fast_dtype(cpu))
    if args.pack is not None and args.pack not in pipe.packs:
        parser.error(f"unknown pack {args.pack!r}: choose one of {', '.join(pipe.packs)}")
    classes = pipe.packs[args.pack or next(iter(pipe.packs))]
    with fast_precision(cpu):
        clips = {name: generate(pipe, Request(name, seed=args.seed, sampler=args.sampler)) for name in classes}
    rows = [row(clip, name) for name, clip in clips.items()]
    sheet = Image.new("RGB", (SHOWN * TILE, len(rows) * (TILE + STRIP + 4)), "white")
    for k, line in enumerate(rows):
        sheet.paste(line, (0, k * (TILE + STRIP + 4)))
    sheet.save(args.out, quality=88)


if __name__ == "__main__":
    main()
