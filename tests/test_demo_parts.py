"""What the page is made of, without a server: plots, links, looks, the machine, the front matter of a Space."""

import os
import re
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import parse_qsl

import gradio
import numpy as np
import pytest
import torch
from demo_helpers import ROOT
from huggingface_hub import SpaceCard, SpaceCardData

from avdit import pipeline
from avdit.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, weights_sha256
from avdit.data.scenes import ALL_CLASSES, CLASSES
from avdit.demo.examples import FOLDER, example_of
from avdit.demo.links import link_of, read_link
from avdit.demo.looks import ASSETS, picture_data, status, stream_line, style_sheet
from avdit.demo.plots import synchrony_figure
from avdit.demo.service import Chunk, Finished, Service, parse_seed
from avdit.generate import SAMPLERS, Request
from avdit.geometry import ClipGeometry
from avdit.machine import usable_cores, use_bfloat16
from avdit.media import read_recipe
from avdit.pipeline import AVDiTPipeline

# https://huggingface.co/docs/hub/spaces-config-reference
SPACE_KEYS = (
    "title emoji colorFrom colorTo sdk sdk_version python_version app_file license short_description tags"
    " suggested_hardware pinned thumbnail"
).split()
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_onsets_are_drawn_where_the_clicks_are():
    audio = np.zeros(25600, np.float32)
    for time_s in (0.4, 0.9, 1.3):
        start = round(time_s * 16000)
        audio[start : start + 400] = np.random.default_rng(0).standard_normal(400) * np.linspace(0.5, 0, 400)
    clip = SimpleNamespace(frames=np.zeros((16, 8, 8, 3)), audio=audio, fps=10, sampling_rate=16000)
    lines = [line.get_xdata()[0] for line in synchrony_figure(clip).axes[0].lines]
    np.testing.assert_allclose(lines, [0.4, 0.9, 1.3], atol=0.03)


def test_figure_of_a_silent_still_clip_is_drawn(tmp_path):
    still = SimpleNamespace(frames=np.zeros((16, 8, 8, 3)), audio=np.zeros(25600), fps=10, sampling_rate=16000)
    synchrony_figure(still).savefig(tmp_path / "still.png")


def test_link_gives_the_recipe_back():
    recipe = {"class": "wind noise", "seed": 2**62, "steps": 3, "guidance": 2.5, "sampler": "dpm++", "seconds": 4.0}
    asked = read_link(dict(parse_qsl(link_of(recipe, "picture")[1:])), list(CLASSES), ["generate", "picture"])
    request = asked.request
    assert asked.mode == "picture" and request.class_label == "wind noise" and request.seed == 2**62
    assert (request.steps, request.guidance, request.sampler, request.seconds) == (3, 2.5, "dpm++", 4)
    assert read_link({}, list(CLASSES), ["generate"]) is None


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"class": "thundr"}, "unknown class 'thundr'"),
        ({"class": "thunder", "steps": "nan"}, "steps nan must be"),
        ({"class": "thunder", "seed": "x"}, "seed 'x' must be"),
        ({"class": "thunder", "mode": "y"}, "mode 'y' in the link must be one of generate"),
    ],
)
def test_wrong_link_is_named(query, message):
    with pytest.raises(ValueError, match=message):
        read_link(query, list(CLASSES), ["generate"])


def test_every_class_has_a_small_picture():
    for label in ALL_CLASSES:
        picture = ASSETS / "classes" / f"{label.replace(' ', '-')}.jpg"
        assert 1000 < picture.stat().st_size < 15_000, label
    assert style_sheet(CLASSES).count("data:image/jpeg") == len(CLASSES)


def test_every_class_has_an_example_that_the_model_made():
    """Made with ``python -m benchmarks.page_examples``; small, for they travel with every clone."""
    weights = weights_sha256(DEFAULT_CHECKPOINT)
    for label in ALL_CLASSES:
        example = example_of(label)
        assert example.recipe == read_recipe(example.video)
        assert example.recipe["class"] == label
        assert example.recipe["weights_sha256"] == weights, f"{label}: run benchmarks.page_examples anew"
        result = example.result(ClipGeometry())
        assert result.frames.shape == (16, 256, 256, 3) and len(result.audio) == pytest.approx(25600, abs=1100)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_500_000
    assert example_of("no such class") is None


def test_example_of_other_weights_says_so():
    example = example_of("thunder")
    assert "other weights" not in example.line(None) and "other weights" not in example.line(
        example.recipe["weights_sha256"]
    )
    assert "other weights" in example.line("0" * 64)


def test_status_is_announced_and_escaped():
    line = status("a <b>", 3, 12, picture_data(np.zeros((4, 32, 32, 3), np.float32)))
    assert 'role="status">a &lt;b&gt;<' in line and 'value="3"' in line and "at step 3 of 12" in line
    assert "progress" not in status("done") and 'role="alert"' in status("wrong", wrong=True)


@pytest.mark.parametrize(("steps", "advice"), [(12, True), (4, False)])
def test_line_of_a_stream_counts_down_and_says_what_makes_a_slow_machine_faster(steps, advice):
    chunk = Chunk(Path("x"), 1.2, "thunder", steps, windows=4, seconds=4.8, speed=0.5, first_picture_s=1, ahead_s=2.4)
    assert "2.0 windows (2.4 s) buffered" in stream_line(chunk)
    assert "1.0 windows (1.2 s) buffered" in stream_line(chunk, 1.2)
    assert "0.0 windows (0.0 s) buffered" in stream_line(chunk, 99)
    assert "slower than real time" in stream_line(chunk) and ("fewer steps" in stream_line(chunk)) == advice
    assert "slower" not in stream_line(replace(chunk, speed=1.5))


def test_number_format_is_measured_quickly():
    begun = time.monotonic()
    assert use_bfloat16(torch.device("cpu")) in (True, False)
    assert time.monotonic() - begun < 10


def test_no_more_threads_than_cores():
    assert 1 <= usable_cores() <= os.cpu_count()


def test_front_matter_is_what_spaces_accepts():
    card = SpaceCard.load(ROOT / "README.md").data
    assert isinstance(card, SpaceCardData)
    data = card.to_dict()
    assert set(data) <= set(SPACE_KEYS) and all(value is not None for value in data.values())
    assert data["sdk"] == "gradio" and data["sdk_version"] == gradio.__version__
    assert (ROOT / data["app_file"]).is_file()
    assert data["colorFrom"] in COLOURS and data["colorTo"] in COLOURS
    assert len(data["short_description"]) <= 60 and len(data["emoji"]) <= 2
    assert re.fullmatch(r"3\.\d+", data["python_version"]) and data["license"] == "apache-2.0"


def test_lent_gpu_is_asked_for(tiny_checkpoint, monkeypatch):
    """On ZeroGPU the work runs inside ``spaces.GPU``, which cannot be handed what lives in this process."""
    lent = ModuleType("spaces")
    lent.__spec__ = ModuleSpec("spaces", None)
    calls = []

    def gpu(function, duration):
        def lend(*arguments):
            calls.append((duration, arguments))
            yield from function(*arguments)

        return lend

    lent.GPU = gpu
    monkeypatch.setitem(sys.modules, "spaces", lent)
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    *_, last = Service(tiny_checkpoint, bfloat16=False).run(Request("thunder", seed=1, steps=1), "visitor")
    assert isinstance(last, Finished) and last.video.exists()
    [(duration, arguments)] = calls
    assert duration >= 60 and arguments == (Request("thunder", seed=1, steps=1), False, "visitor", None)


def test_page_knows_its_model_before_that_is_loaded(two_packs_checkpoint, shipped_checkpoint, shipped_pipeline):
    for folder, pipe in (
        (two_packs_checkpoint, AVDiTPipeline.from_pretrained(two_packs_checkpoint)),
        (shipped_checkpoint, shipped_pipeline),
    ):
        told = Checkpoint.read(folder)
        assert (told.packs, told.classes, told.geometry) == (pipe.packs, pipe.classes, pipe.geometry)
        assert [told.turbo_steps(name) for name in told.classes] == [pipe.turbo_steps(name) for name in pipe.classes]
    assert tuple(pipeline.SAMPLERS) == SAMPLERS


def test_who_comes_before_the_model_is_loaded_waits_for_it(tiny_checkpoint):
    service = Service(tiny_checkpoint, bfloat16=False)
    assert service.classes == list(CLASSES) and not service.loaded
    first, *_, last = service.run(Request("thunder", seed=1, steps=1), "visitor")
    assert first.loading and isinstance(last, Finished) and service.loaded


@pytest.mark.parametrize("text", ["1.5", "", "x" * 500, "9" * 5000, "-1", str(2**63)])
def test_wrong_seed_is_named_shortly(text):
    with pytest.raises(ValueError, match="must be a whole number from 0") as error:
        parse_seed(text)
    assert len(str(error.value)) < 150
    assert parse_seed(" 7 ") == 7
