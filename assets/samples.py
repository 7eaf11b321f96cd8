"""Render what the page's upload tabs are tried with: ``python assets/samples.py`` (from the repository root).

A silent video, a sound or a picture of procedural scenes that no part of the model was trained on.
"""

import sys
from pathlib import Path

import ffmpeg
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from avdit.data.scenes import HELD_OUT, render_clip  # noqa: E402
from avdit.demo.controls import SAMPLES, SUFFIXES  # noqa: E402
from avdit.media import ensure_ffmpeg, write_wav  # noqa: E402

SEEDS = {  # counted from the first held-out one
    "video": {"splashing water": 100, "squishing water": 100, "thunder": 100, "break": 100},
    "sound": {"explosion": 101, "raining": 101, "house": 101},
    "picture": {"fire crackling": 100, "waterfall burbling": 101, "krump": 101},
}


def main() -> None:
    ensure_ffmpeg()
    SAMPLES.mkdir(exist_ok=True)
    for noun, seeds in SEEDS.items():
        for label, seed in seeds.items():
            clip, path = render_clip(label, HELD_OUT + seed), SAMPLES / f"{label.replace(' ', '-')}{SUFFIXES[noun]}"
            frames = (clip.frames.numpy() * 255).round().astype("uint8")
            if noun == "sound":
                write_wav(path, clip.audio.numpy(), 16000)
            elif noun == "picture":
                Image.fromarray(frames[0]).save(path, quality=88, optimize=True)
            else:
                size = f"{frames.shape[2]}x{frames.shape[1]}"
                picture = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=size, framerate=10)
                options = {"vcodec": "libx264", "pix_fmt": "yuv420p", "crf": 20, "movflags": "+faststart"}
                picture.output(str(path), **options).overwrite_output().run(input=frames.tobytes(), quiet=True)


if __name__ == "__main__":
    main()
