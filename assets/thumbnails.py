"""Render the class thumbnails of the page: ``python assets/thumbnails.py`` (from the repository root)."""

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from avdit.data.scenes import ALL_CLASSES, LANDSCAPE, render_clip  # noqa: E402

SIZE = 160
# Which seed and frame tell most: the flash, the splash, the lightning.
TELLING = {
    "explosion": (101, 10),
    "fire crackling": (100, 6),
    "raining": (101, 6),
    "splashing water": (100, 6),
    "squishing water": (101, 6),
    "thunder": (100, 8),
    "underwater bubbling": (101, 6),
    "waterfall burbling": (101, 6),
    "wind noise": (101, 6),
}


def main() -> None:
    for label in ALL_CLASSES:
        seed, frame = TELLING.get(label, (100 + (label != "break"), 8))
        picture = Image.fromarray((render_clip(label, seed).frames[frame].numpy() * 255).astype("uint8"))
        if label not in LANDSCAPE:
            picture = picture.crop((26, 34, 230, 238))  # the dancer, not the stage
        path = HERE / "classes" / f"{label.replace(' ', '-')}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(path, quality=82, optimize=True)


if __name__ == "__main__":
    main()
