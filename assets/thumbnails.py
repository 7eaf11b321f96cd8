"""Render the page's class thumbnails and a contact sheet of all scenes: ``python assets/thumbnails.py``."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from avdit.data.scenes import ALL_CLASSES, LANDSCAPE, PACKS, render_clip  # noqa: E402

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


SHOWN = (2, 6, 10, 14)  # frames of a clip on the sheet
TILE = 100  # pixels
NAMES = 150


def main() -> None:
    clips = {}
    for label in ALL_CLASSES:
        seed, frame = TELLING.get(label, (100 + (label != "break"), 8))
        frames = (render_clip(label, seed).frames.numpy() * 255).astype("uint8")
        clips[label] = [Image.fromarray(frames[k]) for k in SHOWN]
        picture = Image.fromarray(frames[frame])
        if label not in LANDSCAPE:
            picture = picture.crop((26, 34, 230, 238))  # the dancer, not the stage
        path = HERE / "classes" / f"{label.replace(' ', '-')}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(path, quality=82, optimize=True)
    sheet(clips).save(HERE / "scenes.jpg", quality=85, optimize=True)


def sheet(clips: dict[str, list[Image.Image]]) -> Image.Image:
    """Frames of every class in a row behind its name, a column for each pack."""
    width, height = NAMES + len(SHOWN) * TILE, TILE * max(len(classes) for classes in PACKS.values())
    page = Image.new("RGB", (len(PACKS) * width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for column, classes in enumerate(PACKS.values()):
        for row, label in enumerate(classes):
            left, top = column * width, row * TILE
            draw.text((left + NAMES - 12, top + TILE // 2), label, "black", font, "rm")
            for k, picture in enumerate(clips[label]):
                tile = picture.resize((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
                page.paste(tile, (left + NAMES + k * TILE, top + 1))
    return page


if __name__ == "__main__":
    main()
