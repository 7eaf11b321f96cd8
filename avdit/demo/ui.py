"""The page: its layout and what its buttons do."""

import random
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from avdit.demo.plots import synchrony_figure
from avdit.demo.service import Finished, Service, parse_seed
from avdit.generate import Request
from avdit.pipeline import SAMPLERS

CSS = Path(__file__).resolve().parents[2] / "assets" / "style.css"
INTRO = """# AV-DiT
A short video **and its sound**, made together by one diffusion transformer that learned from images only;
light adapters teach it time and sound ([paper](https://arxiv.org/abs/2406.07686)).
Choose a class and press Generate."""
THEME = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def create_demo(checkpoint: Path, device: str = "cpu") -> gr.Blocks:
    """Build the page round one model.

    Raises:
        ValueError: where the checkpoint cannot be used.
    """
    service = Service(checkpoint, device)

    def run(
        class_label: str,
        steps: float = 12,
        guidance: float = 2.0,
        seed: str = "0",
        randomize: bool = False,
        sampler: str = "ddim",
        seconds: float = 1.6,
        video: str | None = None,
        audio: str | None = None,
        image: str | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it as a default
    ) -> Iterator[tuple]:
        """Make a clip with its sound.

        Args:
            class_label: What is seen and heard.
            steps: Sampler steps, 1 to 50.
            guidance: Classifier-free guidance, 1 to 10.
            seed: Whole number, 0 or more.
            randomize: Draw a seed instead.
            sampler: ddim, dpm++ or unipc.
            seconds: Length of the clip.
            video: A video whose sound is made.
            audio: A sound whose picture is made.
            image: The clip's first frame.
        """
        try:
            number = random.randrange(2**31) if randomize else parse_seed(seed)
            request = Request(
                class_label=class_label,
                seed=number,
                steps=int(steps),
                guidance=guidance,
                sampler=sampler,
                seconds=seconds,
                video=video,
                audio=audio,
                image=image,
            )
            for report in service.run(request):
                if isinstance(report, Finished):
                    result = report.result
                    line = f"{len(result.frames) / result.fps:.1f} s of clip in {result.wall_s:.1f} s"
                    yield (
                        str(report.video),
                        str(number),
                        line,
                        synchrony_figure(result),
                        result.recipe,
                        str(report.audio),
                    )
                else:
                    progress((report.step, report.steps), desc="Denoising", unit="steps")
                    line = f"step {report.step} of {report.steps}"
                    yield gr.skip(), str(number), line, gr.skip(), gr.skip(), gr.skip()
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from error

    with gr.Blocks(title="AV-DiT") as demo:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column():
                class_label = gr.Dropdown(service.classes, value=service.classes[0], label="Class")
                with gr.Row():
                    steps = gr.Slider(1, 50, value=12, step=1, label="Steps")
                    guidance = gr.Slider(1, 10, value=2, step=0.5, label="Guidance")
                with gr.Row():
                    seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                    randomize = gr.Checkbox(True, label="Randomize")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("Sampler and length", open=False):
                    sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler")
                    seconds = gr.Slider(1.6, 12, value=1.6, step=0.1, label="Seconds")
                with gr.Accordion("Start from a file", open=False):
                    gr.Markdown("Give one of these: its first 1.6 s (or the picture) is used, the rest is made.")
                    video = gr.Video(label="Video → sound", sources=["upload"])
                    audio = gr.Audio(label="Sound → video", sources=["upload"], type="filepath")
                    image = gr.Image(label="Picture → clip", sources=["upload"], type="filepath")
            with gr.Column():
                clip = gr.Video(label="Clip", autoplay=True, buttons=["download"], elem_id="clip", interactive=False)
                status = gr.Markdown("", elem_id="status")
                plot = gr.Plot(label="Sound and motion")
                with gr.Accordion("Recipe and sound file", open=False):
                    recipe = gr.JSON(label="Recipe")
                    wav = gr.File(label="Sound (WAV)")
        inputs = [class_label, steps, guidance, seed, randomize, sampler, seconds, video, audio, image]
        outputs = [clip, seed, status, plot, recipe, wav]
        event = start.click(run, inputs, outputs, api_name="generate", concurrency_limit=1)
        stop.click(lambda: "stopped", None, status, cancels=[event], api_visibility="private")
    return demo.queue(max_size=20, default_concurrency_limit=1)
