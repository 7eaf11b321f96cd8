"""The README's crops of what the video codec keeps: ``python -m benchmarks.codec_crops assets/codec.jpg``."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from avdit.data.scenes import HELD_OUT, render_clip
from avdit.generate import DEFAULT_CHECKPOINT, load_pipeline

CROP, ZOOM = 96, 2
PLACES = {  # what is hard to keep: class, and the crop's left upper corner
    "raining": (80, 96),
    "underwater bubbling": (80, 60),
    "splashing water": (80, 110),
    "fire crackling": (80, 90),
    "squishing water": (80, 120),
    "krump": (80, 80),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--seed", type=int, default=0, help="held-out clip, from 0 on")
    args = parser.parse_args()
    codec, side = load_pipeline(args.checkpoint).video_codec, CROP * ZOOM
    sheet = Image.new("RGB", (len(PLACES) * side, 2 * side))
    for column, (name, (left, top)) in enumerate(PLACES.items()):
        clip = render_clip(name, HELD_OUT + args.seed)
        frame = clip.frames[len(clip.frames) // 2].permute(2, 0, 1)
        with torch.no_grad():
            rebuilt = codec.decode(codec.encode(frame[None, None] * 2 - 1))[0, 0] / 2 + 0.5
        for row, picture in enumerate((frame, rebuilt)):
            pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()[top : top + CROP, left : left + CROP]
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * side, row * side))
    sheet.save(args.out, quality=90)


if __name__ == "__main__":
    main()
