import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from demo_helpers import CHROMIUM, FLAGS, open_page, served
from gradio_client import Client
from PIL import Image
from playwright.sync_api import sync_playwright

from avdit.data.scenes import CLASSES, GENRES
from avdit.demo.looks import style_sheet, theme
from avdit.demo.service import Service
from avdit.demo.ui import create_demo
from avdit.generate import DEFAULT_CHECKPOINT, load_pipeline
from avdit.geometry import ClipGeometry
from avdit.media import ensure_ffmpeg
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:  # each has one core, and so have the programs that it starts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def random_transformer() -> AVDiT:
    """A small joint model with open gates: nothing in it is zero."""
    torch.manual_seed(0)
    shape = {"input_size": 16, "in_channels": 16, "num_classes": len(CLASSES), "learn_sigma": False}
    backbone = DiT(hidden_size=32, depth=2, num_heads=2, **shape)
    sizes = {"temporal_width": 32, "lora_rank": 4, "interaction_rank": 4, "interaction_pool": 2}
    parts = {
        "exchange_features": 8,
        "anchor_rank": 4,
        "neighbour_rank": 4,
        "temporal_rank": 4,
        "image_rank": 4,
        "foley_width": 8,
        "shared_noise": 0.5,
    }
    model = AVDiT.from_backbone(backbone, ClipGeometry(), **sizes, **parts)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A pipeline folder with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    pipe = AVDiTPipeline(random_transformer(), VideoCodec(), AudioCodec(), xs_scheduler(), classes=list(CLASSES))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint) -> AVDiTPipeline:
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def two_packs_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The same with the dance genres as a second pack of adapters."""
    folder = tmp_path_factory.mktemp("packs")
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    draw = torch.Generator().manual_seed(1)
    shapes = {name: list(value.shape) for name, value in pipe.transformer.adapter_state_dict().items()}
    shapes["class_embedder.embedding_table.weight"][0] = len(GENRES) + 1
    state = {name: 0.05 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    pipe.add_pack("dance", Pack(list(GENRES), state))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def service(two_packs_checkpoint) -> Service:
    """What serves ``local``; its state can be looked at."""
    ensure_ffmpeg()
    return Service(two_packs_checkpoint, bfloat16=False)


@pytest.fixture(scope="session")
def local(service) -> Iterator[str]:
    """The address of a page in this process, with two packs of random weights."""
    demo = create_demo(service)
    options = {"theme": theme(), "css": style_sheet(service.classes)}
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **options)
    yield url.rstrip("/")
    demo.close()


@pytest.fixture(scope="session")
def shipped_checkpoint() -> Path:
    return DEFAULT_CHECKPOINT


@pytest.fixture(scope="session")
def shipped_pipeline(shipped_checkpoint) -> AVDiTPipeline:
    return load_pipeline(shipped_checkpoint)


@pytest.fixture(scope="session")
def address(shipped_checkpoint, tiny_checkpoint, tmp_path_factory):
    """Where ``app.py`` serves the shipped model, or a random one where a checkout has no weights."""
    folder = shipped_checkpoint if (shipped_checkpoint / "model_index.json").exists() else tiny_checkpoint
    with served(folder, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("AVDIT_REQUIRE_BROWSER") == "1":
            pytest.fail("chromium is not installed, and AVDIT_REQUIRE_BROWSER=1 asks for it")
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield instance
        instance.close()


@pytest.fixture
def page(address, browser):
    """The open page; fails where it asks anything of another server."""
    asked = []
    page = open_page(browser, address, on_request=lambda request: asked.append(request.url))
    yield page
    page.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False, httpx_kwargs={"timeout": 300})


@pytest.fixture(scope="session")
def media_files(tmp_path_factory) -> SimpleNamespace:
    """Uploads unlike the model's own: other sizes, rates and codecs. ``video`` is silent; ``text`` is no media."""
    ensure_ffmpeg()
    folder = tmp_path_factory.mktemp("uploads")
    files = SimpleNamespace(
        video=folder / "tall.webm", sound=folder / "stereo.flac", picture=folder / "wide.png", text=folder / "notes.mp4"
    )
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    test_picture = "testsrc=duration=4:size=180x320:rate=25"
    run(["ffmpeg", "-f", "lavfi", "-i", test_picture, "-c:v", "libvpx", "-deadline", "realtime", files.video])
    run(["ffmpeg", "-f", "lavfi", "-i", "sine=frequency=440:duration=3:sample_rate=44100", "-ac", "2", files.sound])
    Image.linear_gradient("L").resize((640, 200)).convert("RGB").save(files.picture)
    files.text.write_text("not a video")
    return files
