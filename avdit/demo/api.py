"""The named endpoints for gradio_client and, where that is installed, MCP; their values are those of the page."""

from collections.abc import Iterator

import gradio as gr

from avdit.demo.controls import SURPRISE
from avdit.demo.handlers import MODES, Handlers, Mode, lane
from avdit.demo.looks import stream_line
from avdit.demo.service import Chunk, Finished
from avdit.generate import SAMPLERS, TURBO, Request

MOST_WINDOWS = 1000  # of one call of /stream


def add_endpoints(handlers: Handlers, classes: list[str], seconds: float) -> None:
    """Add /generate, /stream, /video_to_audio, /audio_to_video and /animate to the page that is being built.

    They have components of their own, which are never shown, so that what the page shows is not their default.
    """

    def finish(mode: Mode, visitor: gr.Request, *values: object) -> tuple:
        for _, report in handlers.reports(mode, visitor, *values):
            if isinstance(report, Finished):
                recipe = report.result.recipe
                return str(report.video), str(recipe["seed"]), recipe, str(report.audio)
        raise gr.Error("The work was stopped.", print_exception=False)

    def generate(
        visitor: gr.Request,
        class_label: str = classes[0],
        steps: float = 12,
        guidance: float = Request.guidance,
        audio_guidance: float | None = None,
        seed: str = "",
        randomize: bool = False,
        sampler: str = "ddim",
        seconds: float = seconds,
    ) -> tuple:
        """Make a short video and its sound.

        Args:
            class_label: What is seen and heard, or "surprise me".
            steps: Sampler steps, 1 to 100.
            guidance: Classifier-free guidance of the picture, 1 to 10.
            audio_guidance: That of the sound, 1 to 10; as the picture's where it is left out.
            seed: Whole number, 0 or more; one is drawn where it is empty.
            randomize: Draw a seed even where one is given.
            sampler: ddim, dpm++, unipc, or turbo: few steps without guidance.
            seconds: Length of the clip, up to 60; longer than 1.6 it is continued window by window.

        Returns:
            The clip (mp4), the seed that was used, the recipe, and the sound (WAV).
        """
        values = (class_label, steps, guidance, audio_guidance, seed, randomize, sampler, seconds)
        return finish(MODES["generate"], visitor, *values)

    def video_to_audio(
        visitor: gr.Request,
        video: str,
        class_label: str = classes[0],
        steps: float = 12,
        guidance: float = Request.guidance,
        audio_guidance: float | None = None,
        seed: str = "",
        sampler: str = "ddim",
        start: float = 0,
    ) -> tuple:
        """Make the sound of a silent video, of which 1.6 s are used.

        Args:
            video: Any video that ffmpeg reads.
            class_label: What is heard, or "surprise me".
            steps: Sampler steps, 1 to 100.
            guidance: Classifier-free guidance of the picture, 1 to 10.
            audio_guidance: That of the sound, 1 to 10; as the picture's where it is left out.
            seed: Whole number, 0 or more; one is drawn where it is empty.
            sampler: ddim, dpm++, unipc, or turbo: few steps without guidance.
            start: Where in the video the part begins that is used, in seconds.

        Returns:
            The clip (mp4), the seed that was used, the recipe, and the sound (WAV).
        """
        values = (class_label, steps, guidance, audio_guidance, seed, False, sampler, seconds, video, start)
        return finish(MODES["video"], visitor, *values)

    def audio_to_video(
        visitor: gr.Request,
        audio: str,
        class_label: str = classes[0],
        steps: float = 12,
        guidance: float = Request.guidance,
        audio_guidance: float | None = None,
        seed: str = "",
        sampler: str = "ddim",
        start: float = 0,
    ) -> tuple:
        """Make the picture of a sound, of which 1.6 s are used.

        Args:
            audio: Any sound that ffmpeg reads.
            class_label: What is seen, or "surprise me".
            steps: Sampler steps, 1 to 100.
            guidance: Classifier-free guidance of the picture, 1 to 10.
            audio_guidance: That of the sound, 1 to 10; as the picture's where it is left out.
            seed: Whole number, 0 or more; one is drawn where it is empty.
            sampler: ddim, dpm++, unipc, or turbo: few steps without guidance.
            start: Where in the sound the part begins that is used, in seconds.

        Returns:
            The clip (mp4), the seed that was used, the recipe, and the sound (WAV).
        """
        values = (class_label, steps, guidance, audio_guidance, seed, False, sampler, seconds, audio, start)
        return finish(MODES["sound"], visitor, *values)

    def animate(
        visitor: gr.Request,
        image: str,
        class_label: str = classes[0],
        steps: float = 12,
        guidance: float = Request.guidance,
        audio_guidance: float | None = None,
        seed: str = "",
        sampler: str = "ddim",
        seconds: float = seconds,
    ) -> tuple:
        """Make a clip with its sound from a first frame.

        Args:
            image: Any picture; the middle square of it is used.
            class_label: What happens, or "surprise me".
            steps: Sampler steps, 1 to 100.
            guidance: Classifier-free guidance of the picture, 1 to 10.
            audio_guidance: That of the sound, 1 to 10; as the picture's where it is left out.
            seed: Whole number, 0 or more; one is drawn where it is empty.
            sampler: ddim, dpm++, unipc, or turbo: few steps without guidance.
            seconds: Length of the clip, up to 60.

        Returns:
            The clip (mp4), the seed that was used, the recipe, and the sound (WAV).
        """
        values = (class_label, steps, guidance, audio_guidance, seed, False, sampler, seconds, image)
        return finish(MODES["picture"], visitor, *values)

    def stream(
        visitor: gr.Request,
        class_label: str = classes[0],
        steps: float = 12,
        guidance: float = Request.guidance,
        audio_guidance: float | None = None,
        seed: str = "",
        sampler: str = "ddim",
        windows: float = 8,
    ) -> Iterator[tuple]:
        """Make a stream, piece after piece, each continuing the last; cancel the job to end it early.

        Args:
            class_label: What is seen and heard, or "surprise me".
            steps: Sampler steps a window, 1 to 100.
            guidance: Classifier-free guidance of the picture, 1 to 10.
            audio_guidance: That of the sound, 1 to 10; as the picture's where it is left out.
            seed: Whole number, 0 or more; one is drawn where it is empty.
            sampler: ddim, dpm++, unipc, or turbo: few steps without guidance.
            windows: How many windows of 1.2 s at least are made, 1 to 1000.

        Returns:
            The next piece (MPEG-TS; joined end to end the pieces are one file), and how the stream does.
        """
        if not 1 <= windows <= MOST_WINDOWS:
            raise gr.Error(f"windows {windows} must be from 1 to {MOST_WINDOWS}", print_exception=False)
        values = (class_label, steps, guidance, audio_guidance, seed, False, sampler, seconds)
        for _, report in handlers.reports(MODES["stream"], visitor, *values):
            if isinstance(report, Chunk):
                yield str(report.video), stream_line(report)
                if report.windows >= windows:
                    return

    with gr.Row(visible=False):
        trigger = gr.Button("API")
        # As choices, so that the API's and MCP's descriptions list them; what is wrong gets the service's own sentence.
        label = gr.Dropdown([*classes, SURPRISE], value=classes[0], label="class_label", allow_custom_value=True)
        steps = gr.Number(12, label="steps")
        guidance = gr.Number(Request.guidance, label="guidance")
        audio_guidance = gr.Number(None, label="audio_guidance")
        seed = gr.Textbox("", label="seed")
        randomize = gr.Checkbox(False, label="randomize")
        sampler = gr.Dropdown([*SAMPLERS, TURBO], value=SAMPLERS[0], label="sampler", allow_custom_value=True)
        length = gr.Number(seconds, label="seconds")
        start = gr.Number(0, label="start")
        windows = gr.Number(8, label="windows")
        video = gr.File(label="video", type="filepath")
        audio = gr.File(label="audio", type="filepath")
        image = gr.File(label="image", type="filepath")
        clip = gr.Video(label="clip")
        used_seed = gr.Textbox(label="seed used")
        recipe = gr.JSON(label="recipe")
        wav = gr.File(label="sound")
        piece = gr.File(label="piece")
        line = gr.Textbox(label="line")
    common = [label, steps, guidance, audio_guidance, seed]
    made = [clip, used_seed, recipe, wav]
    for function, inputs, outputs in (
        (generate, [*common, randomize, sampler, length], made),
        (video_to_audio, [video, *common, sampler, start], made),
        (audio_to_video, [audio, *common, sampler, start], made),
        (animate, [image, *common, sampler, length], made),
        (stream, [*common, sampler, windows], [piece, line]),
    ):
        trigger.click(function, inputs, outputs, api_name=function.__name__, **lane(streams=function is stream))
