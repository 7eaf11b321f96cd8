"""The page: its layout and what its buttons do."""

import random
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from avdit.demo.plots import synchrony_figure
from avdit.demo.service import KEPT_SECONDS, Finished, Service, parse_seed, whole_or_as_is
from avdit.generate import Request
from avdit.pipeline import SAMPLERS

CSS = Path(__file__).resolve().parents[2] / "assets" / "style.css"
INTRO = """# AV-DiT
A short video **and its sound**, made together by one diffusion transformer that learned from images only;
light adapters teach it time and sound ([paper](https://arxiv.org/abs/2406.07686)).
Choose a class and press **Generate**."""
# Fonts of the visitor's own system: the page asks nothing of any other server.
THEME = gr.themes.Soft(
    primary_hue="teal",
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)
# What a clip starts from, and the noun for the file that it needs.
MODES = {"New clip": None, "Video → sound": "video", "Sound → video": "sound", "Picture → clip": "picture"}
QUEUE_LENGTH = 20


def create_demo(checkpoint: Path, device: str = "cpu") -> gr.Blocks:
    """Build the page round one model.

    Raises:
        ValueError: where the checkpoint cannot be used.
    """
    service = Service(checkpoint, device)
    clip = service.pipe.geometry

    def run(
        visitor: gr.Request,
        class_label: str,
        steps: float = 12,
        guidance: float = 2.0,
        seed: str = "0",
        randomize: bool = False,
        sampler: str = "ddim",
        seconds: float = clip.seconds,
        mode: str = "New clip",
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
            mode: What the clip starts from, and so which of the three files is used.
            video: For "Video → sound": the video whose sound is made.
            audio: For "Sound → video": the sound whose picture is made.
            image: For "Picture → clip": the clip's first frame.
        """
        noun = MODES[mode]
        given = {"video": video, "sound": audio, "picture": image}.get(noun)
        try:
            if noun and not given:
                raise ValueError(f"{mode} needs a {noun}: upload one, or choose New clip")
            number = random.randrange(2**31) if randomize else parse_seed(seed)
            request = Request(
                class_label=class_label,
                seed=number,
                steps=whole_or_as_is(steps),
                guidance=guidance,
                sampler=sampler,
                seconds=seconds,
                video=given if noun == "video" else None,
                audio=given if noun == "sound" else None,
                image=given if noun == "picture" else None,
            )
            for report in service.run(request, visitor.session_hash or ""):
                if isinstance(report, Finished):
                    result = report.result
                    made = len(result.frames) / result.fps
                    line = f"{made:.1f} s of clip in {result.wall_s:.1f} s, seed {number}"
                    figure = synchrony_figure(result)
                    sound = gr.DownloadButton(value=str(report.audio), interactive=True)
                    yield str(report.video), str(number), line, figure, result.recipe, sound
                else:
                    progress((report.step, report.steps), desc="Denoising", unit="steps")
                    line = f"step {report.step} of {report.steps}"
                    yield gr.skip(), str(number), line, gr.skip(), gr.skip(), gr.skip()
        except (ValueError, OSError) as error:
            # The visitor knows the file by its name, not by where the server keeps it.
            text = str(error).replace(given, Path(given).name) if given else str(error)
            raise gr.Error(text, title="That did not work", print_exception=False) from error

    def stop_work(visitor: gr.Request) -> str:
        service.stop(visitor.session_hash or "")
        return "stopped"

    def leave(visitor: gr.Request) -> None:
        service.stop(visitor.session_hash or "")

    def show_upload(mode: str) -> list[dict]:
        return [gr.update(visible=MODES[mode] == noun) for noun in ("video", "sound", "picture")]

    with gr.Blocks(title="AV-DiT", delete_cache=(KEPT_SECONDS // 6, KEPT_SECONDS)) as demo:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column():
                class_label = gr.Radio(service.classes, value=service.classes[0], label="Class")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                with gr.Row():
                    steps = gr.Slider(1, 50, value=12, step=1, label="Steps")
                    guidance = gr.Slider(1, 10, value=2, step=0.5, label="Guidance")
                with gr.Row():
                    # Text, because a browser rounds whole numbers above 2^53.
                    seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                    randomize = gr.Checkbox(True, label="Randomize", info="draw a new seed for each clip")
                with gr.Accordion("Sampler and length", open=False):
                    sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler")
                    seconds = gr.Slider(clip.seconds, 12, value=clip.seconds, step=0.1, label="Seconds")
                with gr.Accordion("Start from a file", open=False):
                    mode = gr.Radio(list(MODES), value="New clip", label="Mode")
                    gr.Markdown(f"Of a video or a sound the first {clip.seconds} s are used; the clip is as long.")
                    video = gr.Video(label="Your video", sources=["upload"], visible=False)
                    audio = gr.Audio(label="Your sound", sources=["upload"], type="filepath", visible=False)
                    image = gr.Image(label="Your picture", sources=["upload"], type="filepath", visible=False)
            with gr.Column():
                player = gr.Video(label="Clip", autoplay=True, buttons=["download"], elem_id="clip", interactive=False)
                status = gr.Markdown("", elem_id="status")
                plot = gr.Plot(label="Spectrogram, motion and onsets", show_label=False, elem_id="plot")
                with gr.Accordion("Recipe", open=False):
                    recipe = gr.JSON(label="Recipe", show_label=False)
                wav = gr.DownloadButton("Download the sound (WAV)", interactive=False, elem_id="wav")
        mode.change(show_upload, mode, [video, audio, image], api_visibility="private", show_progress="hidden")
        inputs = [class_label, steps, guidance, seed, randomize, sampler, seconds, mode, video, audio, image]
        outputs = [player, seed, status, plot, recipe, wav]
        event = start.click(run, inputs, outputs, api_name="generate", concurrency_limit=1, show_progress_on=player)
        stop.click(stop_work, None, status, cancels=[event], queue=False, api_visibility="private")
        demo.unload(leave)
    return demo.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
