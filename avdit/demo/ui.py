"""The page: its layout, and which handler each control calls."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from avdit.demo.api import add_endpoints
from avdit.demo.controls import (
    SAMPLES,
    chosen,
    class_gallery,
    fitting_sampler,
    sample_buttons,
    sampler_choice,
)
from avdit.demo.examples import FOLDER, SHOW_PLOT, example_of, show_example, shown_examples
from avdit.demo.handlers import MODES, Handlers, Mode, lane
from avdit.demo.links import link_html, read_link
from avdit.demo.looks import (
    ASKED,
    INTRO,
    NOT_BEGUN,
    NOTE_STOP,
    STOPPED,
    picture_data,
    script,
    status,
    stream_line,
)
from avdit.demo.player import LiveVideo
from avdit.demo.service import KEPT_SECONDS, STREAM_SECONDS, Finished, Progress, Service
from avdit.generate import SAMPLERS, TURBO, Request, Result, recipe_of

QUEUE_LENGTH = 20
LINE_SECONDS = 1.0  # between two changes of a stream's line, each of which costs the machine a little of its speed
TEXTS = {
    "generate": "",
    "stream": "Window after window, each continuing the last, until you press Stop. "
    "**Class and steps can be changed while it plays**; the scene moves over to the new class. Guidance of the picture "
    "is for the window that begins a scene: what continues it is settled by what came before.",
    "video": "The sound that fits your video.",
    "sound": "A picture that fits your sound.",
    "picture": "Your picture is the first frame; what follows, and its sound, is made.",
}
BUTTONS = {
    "generate": "Generate",
    "stream": "Start the stream",
    "video": "Make the sound",
    "sound": "Make the picture",
    "picture": "Bring it to life",
}


def create_demo(service: Service) -> gr.Blocks:
    """Build the page round one model."""
    handlers = Handlers(service)
    clip = service.checkpoint.geometry

    gr.set_static_paths([FOLDER, SAMPLES])  # sent from where they lie, so that no hourly clean-up takes them
    first = example_of(service.classes[0])
    with gr.Blocks(title="AV-DiT", delete_cache=(KEPT_SECONDS // 6, KEPT_SECONDS)) as demo:
        gr.Markdown(INTRO, elem_id="intro")
        with gr.Row(elem_id="main"):
            with gr.Column():
                pack, class_label = class_gallery(service.packs)
                starts: dict[str, list] = {}  # a mode's button, and its own inputs: seconds, file, start
                samples: dict[str, dict] = {}  # a mode's buttons that try it, each with its class and file
                with gr.Tabs() as tabs:
                    for name, mode in MODES.items():
                        with gr.Tab(mode.title, id=name):
                            starts[name], samples[name] = _tab(name, mode, clip.seconds, handlers)
                with gr.Accordion("Settings", open=True, elem_id="settings"):
                    sampler = sampler_choice(service.checkpoint.turbo_steps(service.classes[0]))
                    with gr.Row(elem_id="fine"):
                        steps = gr.Slider(1, 100, value=12, step=1, label="Steps")
                        guidance = gr.Slider(1, 10, Request.guidance, step=0.5, label="Picture guidance")
                        audio_guidance = gr.Slider(1, 10, Request.guidance, step=0.5, label="Sound guidance")
                    with gr.Row():
                        # Text, because a browser rounds whole numbers above 2^53.
                        seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                        randomize = gr.Checkbox(True, label="Randomize", info="draw a new seed for each clip")
            with gr.Column():
                with gr.Column(elem_id="stage"):
                    screen = {"interactive": False, "show_label": False, "buttons": []}
                    player = gr.Video(first and str(first.video), label="Clip", elem_id="clip", loop=True, **screen)
                    live = LiveVideo(
                        label="Stream", elem_id="live", autoplay=True, streaming=True, visible=False, **screen
                    )
                    with gr.Row(elem_id="bar"):  # while there is work Stop is seen in it, otherwise the other one
                        look = gr.HTML(status(""), elem_id="status", show_label=False)
                        stop = gr.Button("Stop", variant="stop", elem_id="stop", size="md", min_width=0)
                        watch = gr.Button(
                            "Play an example", elem_id="watch", size="md", min_width=0, visible=first is not None
                        )
                plot = gr.Plot(label="Spectrogram, motion and onsets", show_label=False, elem_id="plot", visible=False)
                drawn = gr.Plot(visible=False)  # that of an example, until the browser shows it
                ready = gr.JSON(shown_examples(service.packs, service.weights), visible=False)
                with gr.Row(elem_classes="together"):
                    mp4 = gr.DownloadButton("Clip (MP4)", interactive=False, elem_id="mp4", size="md")
                    wav = gr.DownloadButton("Sound (WAV)", interactive=False, elem_id="wav", size="md")
                link = gr.HTML("", elem_id="link", show_label=False)
                with gr.Accordion("Recipe", open=False):
                    recipe = gr.JSON(label="Recipe", show_label=False)

        settings = [class_label, steps, guidance, audio_guidance, seed, randomize, sampler]
        outputs = [player, live, look, seed, plot, recipe, link, mp4, wav]
        opened = demo.load(
            _open_link(service, clip.seconds),
            None,
            [tabs, pack, *settings, starts["generate"][1], starts["picture"][1]],
            api_visibility="private",
            show_progress="hidden",  # through the queue, which carries warnings to the page
        )
        quiet = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        # Turbo has steps of its own and no guidance: who sets these wants another sampler. In the browser, at once.
        leave_turbo = f"name => name === '{TURBO}' ? '{SAMPLERS[0]}' : name"
        for control in (steps, guidance, audio_guidance):
            control.input(None, sampler, sampler, js=leave_turbo, **quiet)
        pack.change(_fit_sampler(service), [pack, sampler], sampler, **quiet)  # by a click, a link or a sample
        other = pack.input(_open_pack(service), pack, class_label, **quiet)
        plots = []
        for event, asked, plays in (
            (opened.then, False, False),
            (other.then, False, True),
            (class_label.input, False, True),
            (watch.click, True, True),
        ):
            # In the browser, so that each comes at once, and never after a click that asked for something else. The
            # server draws the plot, which takes a while, where the visitor stays; the browser shows it or not.
            show = event(
                None,
                [ready, class_label, pack],
                [player, live, look, recipe, link, mp4, wav],
                js=show_example(asked, plays),
                **quiet,
            )
            plot_it = show.then(
                _plot_example(handlers),
                recipe,
                drawn,
                trigger_mode="always_last",
                concurrency_id="example",
                api_visibility="private",
                show_progress="hidden",
            )
            plot_it.success(None, drawn, plot, js=SHOW_PLOT, **quiet)
            plots.append(plot_it)

        events: dict[str, list] = {}
        for name, mode in MODES.items():
            button, *inputs = starts[name]
            work = {
                "fn": _work(handlers, name, mode),
                "inputs": [*settings, *inputs, pack],
                "outputs": outputs,
                "trigger_mode": "multiple",  # a click right after Stop counts; a second one ends the first one's work
                "api_visibility": "private",
                **lane(streams=name == "stream"),
                "show_progress": "minimal",  # its place in the page's queue
                "show_progress_on": look,
                "scroll_to_output": True,
            }
            for one in (button, *samples[name]):
                one.click(None, None, look, js=ASKED, cancels=plots, **quiet)  # at once, in the browser
            events[name] = [button.click(**work)]
            for one, (label, file) in samples[name].items():
                fill = one.click(
                    _try_sample(service, label, file), None, [pack, class_label, *starts[name][2:]], **quiet
                )
                events[name].append(fill.then(**work))
            for event in events[name]:  # such as that the queue is full, of which the work itself knows nothing
                event.failure(None, look, look, js=NOT_BEGUN, **quiet)
        stop.click(None, None, None, js=NOTE_STOP, **quiet)
        stop.click(handlers.stop, None, None, **quiet)
        stop.click(lambda: STOPPED, None, look, cancels=sum(events.values(), []), **quiet)
        live_controls = [class_label, steps, guidance, audio_guidance, sampler]
        gr.on([control.change for control in live_controls], handlers.change, [*live_controls, pack], None, **quiet)
        demo.load(None, None, None, js=script(), **quiet)
        demo.unload(handlers.stop)
        add_endpoints(handlers, service.classes, clip.seconds)
    return demo.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)


def _tab(name: str, mode: Mode, seconds: float, handlers: Handlers) -> tuple[list, dict]:
    """A mode's own controls: its button and what gives the seconds, the file and the start; and its samples."""
    if TEXTS[name]:
        gr.Markdown(TEXTS[name])
    length, file, start = gr.State(seconds), gr.State(None), gr.State(0.0)
    if mode.noun == "video":
        file = gr.Video(label="Your video", sources=["upload"], elem_id="your-video", height=220)
    elif mode.noun == "sound":
        file = gr.Audio(label="Your sound", sources=["upload"], type="filepath", elem_id="your-sound")
    elif mode.noun == "picture":
        file = gr.Image(label="Your picture", sources=["upload"], type="filepath", elem_id="your-picture", height=220)
    if name in ("generate", "picture"):
        length = gr.Slider(seconds, 60, value=seconds, step=0.1, label="Seconds")
    if mode.noun in ("video", "sound"):
        start = gr.Number(0, minimum=0, step=0.1, label="Start (seconds)", info=f"{seconds} s from here on are used")
    if mode.noun:
        used = gr.Markdown("", elem_classes="used")
        gr.on(
            [file.change] + ([start.change] if isinstance(start, gr.Number) else []),
            lambda given, at: handlers.used_part(given, at or 0.0, mode.noun),
            [file, start],
            used,
            queue=False,
            api_visibility="private",
            show_progress="hidden",
        )
    button = gr.Button(BUTTONS[name], variant="primary", elem_id=f"{name}-button")
    samples = sample_buttons(mode.noun, handlers.service.classes) if mode.noun else {}
    return [button, length, file, start], samples


def _open_pack(service: Service) -> Callable:
    """What shows the classes of a pack."""

    def open_pack(name: str) -> dict:
        return chosen(service.packs, service.packs[name][0])[1]

    return open_pack


def _fit_sampler(service: Service) -> Callable:
    """What offers the samplers that there are for the classes of a pack."""

    def fit(name: str, sampler: str) -> dict:
        return fitting_sampler(service.checkpoint.turbo_steps(service.packs[name][0]), sampler)

    return fit


def _try_sample(service: Service, label: str, file: Path) -> Callable:
    """What fills in a sample: its pack and class, the file, used from its start on."""

    def fill() -> tuple:
        return *chosen(service.packs, label), str(file), 0.0

    return fill


def _work(handlers: Handlers, name: str, mode: Mode) -> Callable:
    """What a mode's button does; yields values for the player, the stream, the status line and the rest."""

    def work(visitor: gr.Request, *values: object) -> Iterator[tuple]:
        streams, preview, unchanged = name == "stream", None, gr.skip()
        last, came, told = None, 0.0, 0.0  # the latest piece of a stream, when it came, and when the page last heard
        shown = [gr.update(visible=not streams), gr.update(visible=streams)]
        plot = gr.update(visible=False)  # that of the last clip says nothing of this one
        handlers.stop(visitor)  # one page shows one work at a time
        try:
            for request, report in handlers.reports(mode, visitor, *values):
                seed = str(request.seed)
                if isinstance(report, Progress):
                    if last is not None and time.monotonic() - told < LINE_SECONDS:
                        continue
                    if report.preview is not None and last is None:
                        preview = picture_data(report.preview)
                    if last is not None:
                        text = stream_line(last, time.monotonic() - came)
                    elif report.step:
                        text = f"{request.class_label}: step {report.step} of {report.steps}"
                    else:
                        what = "the model, which is being loaded" if report.loading else "its turn"
                        text = f"{request.class_label}: waiting for {what}"
                        text += f", {report.before} before it" if report.before else ""
                    bar = status(text, report.step, report.steps, preview)
                    yield *shown, bar, seed, plot, *[unchanged] * 4
                elif isinstance(report, Finished):
                    result = report.result
                    made = f"{len(result.frames) / result.fps:.1f} s of clip in {result.wall_s:.1f} s, seed {seed}"
                    clip = gr.update(value=str(report.video), autoplay=True)
                    files = [gr.update(value=str(file), interactive=True) for file in (report.video, report.audio)]
                    link = link_html(result.recipe, name)
                    yield clip, unchanged, status(made), seed, plot, result.recipe, link, *files
                    # After the clip, which can be watched while it is drawn.
                    yield *[unchanged] * 4, gr.update(value=_figure(result), visible=True), *[unchanged] * 4
                else:
                    facts = [unchanged] * 4
                    if last is None:  # the recipe of the whole stream; there is no file of it
                        made = recipe_of(handlers.service.pipe, request)
                        facts = [made, link_html(made, name), *[gr.update(interactive=False)] * 2]
                    last, came, preview = report, time.monotonic(), None
                    line = status(stream_line(report), report.steps, report.steps)
                    yield unchanged, report, line, seed, unchanged, *facts
                shown, plot, told = [unchanged] * 2, unchanged, time.monotonic()
        except gr.Error as error:  # as a message that goes away, and here, where it stays
            yield unchanged, unchanged, status(str(error.message), wrong=True), *[unchanged] * 6
            raise
        if last is not None and last.seconds >= STREAM_SECONDS:
            line = f"The stream ended by itself after {last.seconds / 60:.0f} minutes: start another"
            yield unchanged, unchanged, status(line), *[unchanged] * 6

    return work


def _plot_example(handlers: Handlers) -> Callable:
    """What draws the plot of the example that is shown."""

    def plot(recipe: dict | None) -> Any:
        example = example_of(recipe["class"]) if recipe else None
        if example is None or example.recipe != recipe:
            return gr.skip()
        handlers.service.load()  # which comes first, for it is what a click may be waiting for
        return _figure(example.result(handlers.service.checkpoint.geometry))

    return plot


def _figure(result: Result) -> Any:
    from avdit.demo.plots import synchrony_figure  # late: the start need not wait for matplotlib

    return synchrony_figure(result)


def _open_link(service: Service, seconds: float) -> Callable:
    """What reads the settings from the address under which the page was opened."""

    def open_link(visitor: gr.Request) -> list:
        try:
            asked = read_link(visitor.query_params, service.classes, list(MODES))
        except ValueError as error:
            gr.Warning(str(error), title="The link was not used")
            asked = None
        if asked is None:
            return [gr.skip()] * 11
        request = asked.request
        audio_guidance = request.guidance if request.audio_guidance is None else request.audio_guidance
        values = [*chosen(service.packs, request.class_label), request.steps, request.guidance, audio_guidance]
        values.append(str(request.seed))
        length = max(seconds, request.seconds)
        draw = "seed" not in visitor.query_params
        return [gr.Tabs(selected=asked.mode), *values, draw, request.sampler, length, length]

    return open_link
