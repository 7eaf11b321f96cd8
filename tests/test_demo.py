"""The page, served by app.py and driven in a real browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import expect, sync_playwright

from avdit.demo.plots import onsets, synchrony_figure
from avdit.media import read_recipe

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENS = os.environ.get("AVDIT_SCREENSHOTS")  # a folder in which to keep pictures of the page


@pytest.fixture(scope="module")
def address(shipped_checkpoint, tiny_checkpoint, tmp_path_factory):
    """Where ``app.py`` serves the shipped model, or a random one where a checkout has no weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = shipped_checkpoint if (shipped_checkpoint / "model_index.json").exists() else tiny_checkpoint
    temp = tmp_path_factory.mktemp("server")
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port), "--checkpoint", str(folder)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(temp)})
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "app.py did not start"
            time.sleep(0.5)
    yield url
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
    assert not list(temp.glob("avdit-clips-*"))  # nothing that visitors made is left behind


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("AVDIT_REQUIRE_BROWSER") == "1":
            pytest.fail("chromium is not installed, and AVDIT_REQUIRE_BROWSER=1 asks for it")
        pytest.skip("chromium is not installed: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    flags += ["--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield instance
        instance.close()


@pytest.fixture
def page(address, browser):
    """The open page; fails where it asks anything of another server."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible(timeout=60_000)
    yield page
    page.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def set_number(page, label, value):
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def generate(page):
    page.get_by_role("button", name="Generate", exact=True).click()


def test_generate_plays_picture_and_sound(page):
    set_number(page, "Steps", 2)
    seed = page.get_by_label("Seed", exact=True)
    expect(seed).to_have_value("0")
    generate(page)
    video = page.locator("#clip video")
    expect(video).to_be_visible(timeout=120_000)
    page.wait_for_function("document.querySelector('#clip video').currentTime > 0.3", timeout=60_000)
    facts = video.evaluate("v => [v.videoWidth, v.videoHeight, v.duration, v.webkitAudioDecodedByteCount]")
    assert facts[:2] == [256, 256] and abs(facts[2] - 1.6) < 0.1 and facts[3] > 0
    used = seed.input_value()
    assert re.fullmatch(r"\d+", used) and used != "0"
    expect(page.locator("#status")).to_contain_text(f"seed {used}")
    expect(page.locator("#plot img")).to_be_visible(timeout=30_000)
    if SCREENS:
        page.screenshot(path=f"{SCREENS}/page-desktop.png", full_page=True)


def test_narrow_page_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 390, "height": 800})
    set_number(page, "Steps", 1)
    generate(page)
    expect(page.locator("#plot img")).to_be_visible(timeout=120_000)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    if SCREENS:
        page.screenshot(path=f"{SCREENS}/page-phone.png", full_page=True)


def test_stop_ends_the_work(page):
    set_number(page, "Steps", 50)
    generate(page)
    expect(page.locator("#status")).to_contain_text("of 50", timeout=60_000)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#status")).to_contain_text("stopped", timeout=30_000)
    set_number(page, "Steps", 1)
    generate(page)  # the worker is free again
    expect(page.locator("#status")).to_contain_text("1.6 s of clip", timeout=60_000)


def test_mode_without_its_file_says_what_to_do(page):
    page.get_by_role("button", name="Start from a file").click()
    page.get_by_role("radio", name="Sound → video").click()
    expect(page.get_by_text("Your sound")).to_be_visible(timeout=30_000)
    generate(page)
    expect(page.get_by_text("needs a sound: upload one, or choose New clip")).to_be_visible(timeout=30_000)


def clip_of(made):
    return made[0] if isinstance(made[0], str) else made[0]["video"]


def test_api_gives_the_same_clip_for_the_same_seed(client):
    wanted = {"class_label": "thunder", "steps": 2, "seed": "11", "randomize": False}
    first, second = (client.predict(**wanted, api_name="/generate") for _ in "ab")
    assert first[1] == "11"
    assert Path(clip_of(first)).read_bytes() == Path(clip_of(second)).read_bytes()
    recipe = read_recipe(clip_of(first))
    assert (recipe["class"], recipe["seed"], recipe["steps"]) == ("thunder", 11, 2)


def test_clip_of_the_api_is_the_given_video_with_another_sound(client):
    first = clip_of(client.predict(class_label="thunder", steps=1, seed="1", api_name="/generate"))
    made = client.predict(
        class_label="thunder",
        steps=1,
        mode="Video → sound",
        video=handle_file(first),
        api_name="/generate",
    )
    assert read_recipe(clip_of(made))["video"] == Path(first).name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": "-1"}, "seed -1 must be a whole number from 0"),
        ({"seed": str(2**70)}, "must be a whole number from 0"),
        ({"seed": "seven"}, "seed 'seven' must be"),
        ({"steps": 2.5}, "steps 2.5 must be a whole number"),
        ({"mode": "Picture → clip"}, "Picture → clip needs a picture: upload one"),
    ],
)
def test_bad_request_is_a_sentence(client, wrong, message):
    with pytest.raises(AppError, match=message):
        client.predict(**{"class_label": "thunder", "steps": 1, "randomize": False} | wrong, api_name="/generate")


def test_file_that_is_no_video_is_named_without_its_folder(client, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    with pytest.raises(AppError) as error:
        client.predict(
            class_label="thunder",
            steps=1,
            mode="Video → sound",
            video=handle_file(text),
            api_name="/generate",
        )
    assert "notes.mp4" in str(error.value) and "/" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a pipeline folder"),
        (["--port", "70000"], "--port 70000 must be from 1 to 65535"),
        (["--port", "many"], "invalid int value: 'many'"),
    ],
)
def test_page_that_cannot_start_says_why(arguments, message):
    run = subprocess.run([sys.executable, "app.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1


def test_onsets_are_where_the_clicks_are():
    audio = np.zeros(25600, np.float32)
    for time_s in (0.4, 0.9, 1.3):
        start = round(time_s * 16000)
        audio[start : start + 400] = np.random.default_rng(0).standard_normal(400) * np.linspace(0.5, 0, 400)
    np.testing.assert_allclose(onsets(audio, 16000), [0.4, 0.9, 1.3], atol=0.03)
    assert len(onsets(np.zeros(25600, np.float32), 16000)) == 0


def test_figure_of_a_silent_still_clip_is_drawn(tmp_path):
    still = SimpleNamespace(frames=np.zeros((16, 8, 8, 3)), audio=np.zeros(25600), fps=10, sampling_rate=16000)
    synchrony_figure(still).savefig(tmp_path / "still.png")
