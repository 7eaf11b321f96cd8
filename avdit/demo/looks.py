"""What the page looks like: theme, style sheet with the class pictures, and the small pieces of HTML."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from avdit.demo.service import Chunk

ASSETS = Path(__file__).resolve().parents[2] / "assets"
STRIP_HEIGHT = 224  # pixels of the preview
AXIS = 0.07, 0.98  # where the plot's time axis begins and ends, as parts of its width

INTRO = """# AV-DiT
A short video **and its sound**, made together by one diffusion transformer that learned from images only;
light adapters teach it time and sound ([paper](https://arxiv.org/abs/2406.07686))."""


def theme() -> gr.themes.Base:
    """Teal on slate, light and dark. Fonts are those of the visitor's own system: nothing comes from another server."""
    return gr.themes.Base(
        primary_hue="teal",
        secondary_hue="amber",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")],
    ).set(
        body_background_fill="*neutral_100",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_title_text_weight="600",
        # These keep a contrast of 4.5 to 1 and more between the words and what is behind them.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        slider_color="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_700",
        block_label_text_color="*neutral_700",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300",
        link_text_color_hover="*primary_800",
        link_text_color_hover_dark="*primary_200",
    )


def thumbnail(label: str) -> Path | None:
    """The picture of a class; None where it has none."""
    picture = ASSETS / "classes" / f"{label.replace(' ', '-')}.jpg"
    return picture if picture.is_file() else None


def style_sheet(classes: Sequence[str]) -> str:
    """assets/style.css, and a picture on the choice of each class that has one in assets/classes."""
    rules = [f":root {{ --axis-left: {AXIS[0]}; --axis-right: {AXIS[1]}; }}", (ASSETS / "style.css").read_text()]
    for label in classes:
        if picture := thumbnail(label):
            data = base64.b64encode(picture.read_bytes()).decode()
            rules.append(
                f'#classes label:has(input[value="{label}"])::before '
                f'{{ background-image: url("data:image/jpeg;base64,{data}"); }}'
            )
    return "\n".join(rules)


def picture_data(frames: np.ndarray) -> str:
    """Frames (N, H, W, 3) in [0, 1] side by side, as the address of a JPEG."""
    strip = Image.fromarray((np.concatenate(list(frames), axis=1).clip(0, 1) * 255).astype(np.uint8))
    strip = strip.resize((round(strip.width * STRIP_HEIGHT / strip.height), STRIP_HEIGHT))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def status(text: str, step: int = 0, steps: int = 0, preview: str | None = None, wrong: bool = False) -> str:
    """A line that screen readers announce; while there is work, with a bar, and with a look at the picture if any."""
    parts = []
    if preview:
        parts.append(f'<img src="{preview}" alt="What the picture is becoming, at step {step} of {steps}">')
    if steps:
        done = f' value="{step}"' if step else ""  # without it the bar tells that something is under way
        parts.append(f'<progress max="{steps}"{done} aria-label="Steps done"></progress>')
    parts.append(f'<p role="{"alert" if wrong else "status"}">{html.escape(text)}</p>')
    return "".join(parts)


# What the page does in the browser, at the click: it answers at once, and a clip that plays gives way to the work.
# From then on what is shown is the visitor's own, which no example replaces that nobody asked for.
ASKING = "asking for a place in the queue"
ASKED = f"""() => {{
  document.documentElement.dataset.own = "yes";
  document.documentElement.dataset.stopped = "";
  document.querySelectorAll('#stage video').forEach(video => video.pause());
  return {json.dumps(status(ASKING, 0, 1))};
}}"""
STOPPED = status("stopped")
NOTE_STOP = "() => { document.documentElement.dataset.stopped = 'yes'; }"
# Of a request that failed, the line that is there; where it never began, there is none. A stopped one fails, too, and
# may tell of it with the line that stood there before.
NOT_BEGUN = f"""line => document.documentElement.dataset.stopped ? {json.dumps(STOPPED)} : line.includes({
    json.dumps(ASKING)
}) ? {json.dumps(status("The page is busy or out of reach: try again in a minute", wrong=True))} : line"""


def script() -> str:
    """What runs in the browser as long as the page is open."""
    return (ASSETS / "page.js").read_text()


def stream_line(chunk: Chunk, since: float = 0.0) -> str:
    """How a stream does, in one line, ``since`` seconds after its last piece."""
    ahead = max(0.0, chunk.ahead_s - since)
    windows = chunk.windows * ahead / chunk.seconds
    line = (
        f"{chunk.class_label} · {chunk.speed:.2f} × real time · {windows:.1f} windows ({ahead:.1f} s) buffered · "
        f"first picture after {chunk.first_picture_s:.1f} s · {_count(chunk.windows, 'window')} made, "
        f"{chunk.seconds:.1f} s"
    )
    if chunk.speed < 1:
        line += " · slower than real time here: each piece is made, then played"
        line += "; turbo or fewer steps make it faster" if chunk.steps > 4 else ""
    return line


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
