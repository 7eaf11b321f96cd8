"""How long a visitor waits: ``python -m benchmarks.page`` starts app.py and drives it with Debian's chromium.

Prints the seconds from the start to a page with its classes whose example plays, those to a clip that was asked for at
that moment, and for each class the seconds from a click on Generate to the first picture and to the playing clip. The
browser, which is open before, shares the machine's cores.
"""

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
PLAYS = "document.querySelector('#clip video')?.currentTime > 0.05"
DONE = "document.querySelector('#status')?.innerText.includes('s of clip')"
LIMIT = 120_000  # ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", default=["thunder", "fire crackling", "underwater bubbling"])
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.exit(2, "chromium is not installed: apt-get install chromium\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=FLAGS).new_page()
        page.set_default_timeout(LIMIT)
        begun = time.monotonic()
        server = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], stdout=subprocess.DEVNULL)
        try:
            while server.poll() is None:
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            page.goto(url)
            page.get_by_role("radio", name="thunder").check()
            page.wait_for_function(PLAYS)
            print(f"page ready and an example playing {time.monotonic() - begun:.1f} s after the start")
            generate = page.get_by_role("button", name="Generate", exact=True)
            generate.click()
            page.wait_for_function(f"{DONE} && {PLAYS}")
            print(f"a clip that was asked for then, playing {time.monotonic() - begun:.1f} s after the start")
            for name in args.classes:
                page.get_by_role("radio", name=name).check()
                time.sleep(3)
                clicked = time.monotonic()
                generate.click()
                page.locator("#status img").wait_for()
                first = time.monotonic() - clicked
                page.wait_for_function(f"{DONE} && {PLAYS}")
                print(f"{name}: first picture {first:.2f} s, clip playing {time.monotonic() - clicked:.2f} s")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    main()
