"""The server under test, and what the tests of the page do again and again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENS = os.environ.get("AVDIT_SCREENSHOTS")  # a folder in which to keep pictures of the page
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--autoplay-policy=no-user-gesture-required",
]
PATIENCE = 120_000  # ms; a busy machine is slow
expect.set_options(timeout=PATIENCE)


@contextmanager
def served(checkpoint: Path, temp: Path) -> Iterator[str]:
    """Run ``app.py``; yields its address and, at the end, checks that nothing of the visitors' is left behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port), "--checkpoint", str(checkpoint)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(temp)})
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 600  # a busy machine is slow
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "app.py did not start"
                time.sleep(0.5)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(120)  # a busy machine is slow
    assert status == 0
    assert not list(temp.glob("avdit-*"))


def open_page(browser, address: str, path: str = "", on_request=None, **settings) -> Page:
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | settings)
    if on_request:
        page.on("request", on_request)
    page.goto(address + path)
    expect(page.get_by_role("radio", name="surprise me")).to_be_visible(timeout=PATIENCE)  # of whatever pack
    status_has(page, "Example")  # the last thing that comes by itself
    return page


def set_number(page: Page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def tab(page: Page, title: str) -> None:
    """Choose a mode; on a narrow page it may be in the menu of further tabs."""
    page.get_by_role("tab", name=title).first.click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def status_has(page: Page, text, timeout: int = PATIENCE) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=timeout)


def screenshot(page: Page, name: str) -> None:
    if SCREENS:
        page.screenshot(path=f"{SCREENS}/{name}.png", full_page=True)


def clip_of(made) -> str:
    """The path of the clip in what gradio_client gives for an endpoint."""
    return made[0] if isinstance(made[0], str) else made[0]["video"]


def wait_until(true, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
