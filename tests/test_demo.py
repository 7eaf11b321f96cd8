"""The page, served by app.py and driven in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def checkpoint(shipped, tiny):
    return shipped if (shipped / "model_index.json").exists() else tiny


@pytest.fixture(scope="module")
def address(shipped_checkpoint, tiny_checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = checkpoint(shipped_checkpoint, tiny_checkpoint)
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port), "--checkpoint", str(folder)]
    server = subprocess.Popen(command, cwd=ROOT)
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
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("AVDIT_REQUIRE_BROWSER"):
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    flags += ["--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield instance
        instance.close()


def set_number(page, label, value):
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def test_generate_plays_picture_and_sound(address, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    button = page.get_by_role("button", name="Generate", exact=True)
    expect(button).to_be_visible(timeout=60_000)
    set_number(page, "Steps", 2)
    seed = page.get_by_label("Seed")
    expect(seed).to_have_value("0")
    button.click()
    video = page.locator("#clip video")
    expect(video).to_be_visible(timeout=120_000)
    page.wait_for_function("document.querySelector('#clip video').currentTime > 0.3", timeout=60_000)
    facts = video.evaluate("v => [v.videoWidth, v.videoHeight, v.duration, v.webkitAudioDecodedByteCount]")
    assert facts[:2] == [256, 256] and abs(facts[2] - 1.6) < 0.1 and facts[3] > 0
    assert re.fullmatch(r"\d+", seed.input_value()) and seed.input_value() != "0"
    expect(page.locator("#status")).to_contain_text("1.6 s of clip")
    page.close()


def test_narrow_page_does_not_scroll_sideways(address, browser):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(address)
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


def test_stop_ends_the_work(address, browser):
    page = browser.new_page()
    page.goto(address)
    button = page.get_by_role("button", name="Generate", exact=True)
    expect(button).to_be_visible(timeout=60_000)
    set_number(page, "Steps", 50)
    button.click()
    expect(page.locator("#status")).to_contain_text("of 50", timeout=60_000)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#status")).to_contain_text("stopped", timeout=30_000)
    set_number(page, "Steps", 1)
    button.click()  # the worker is free again
    expect(page.locator("#status")).to_contain_text("1.6 s of clip", timeout=60_000)
    page.close()


def test_api_gives_the_same_clip_for_the_same_seed(address):
    client = Client(address, verbose=False)

    def clip():
        made = client.predict(class_label="thunder", steps=2, seed="11", randomize=False, api_name="/generate")
        return made[0] if isinstance(made[0], str) else made[0]["video"], made[1]

    (first, seed), (second, _) = clip(), clip()
    assert seed == "11"
    assert Path(first).read_bytes() == Path(second).read_bytes()


@pytest.mark.parametrize(("seed", "message"), [("-1", "seed -1 must be"), ("seven", "seed 'seven' must be")])
def test_bad_seed_is_a_sentence(address, seed, message):
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match=message):
        client.predict(class_label="thunder", steps=1, seed=seed, randomize=False, api_name="/generate")


def test_checkpoint_that_is_missing_is_named():
    run = subprocess.run(
        [sys.executable, "app.py", "--checkpoint", "nowhere"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and "nowhere is not a pipeline folder" in run.stderr
