"""The page, served by app.py and driven in a real browser: clips, seeds, links, looks."""

import re
import subprocess
import sys
import time

import pytest
from demo_helpers import PATIENCE, ROOT, open_page, press, screenshot, set_number, status_has, tab
from playwright.sync_api import expect

from avdit.demo.looks import AXIS


def test_generate_plays_picture_and_sound(page):
    page.get_by_role("radio", name="thunder").check()
    set_number(page, "Steps", 4)
    seed = page.get_by_label("Seed", exact=True)
    expect(seed).to_have_value("0")
    press(page, "Generate")
    expect(page.locator("#plot img")).to_be_hidden(timeout=PATIENCE)  # the example's
    preview = page.locator("#status img")
    expect(preview).to_be_visible(timeout=PATIENCE)  # the picture is seen before it is done
    expect(preview).to_have_attribute("alt", re.compile(r"step \d of 5"))  # the sound follows in one more
    status_has(page, "1.6 s of clip")
    page.wait_for_function("document.querySelector('#clip video')?.currentTime > 0.3", timeout=PATIENCE)
    facts = page.locator("#clip video").evaluate(
        "v => [v.videoWidth, v.videoHeight, v.duration, v.webkitAudioDecodedByteCount]"
    )
    assert facts[:2] == [256, 256] and abs(facts[2] - 1.6) < 0.1 and facts[3] > 0
    used = seed.input_value()
    assert re.fullmatch(r"\d+", used) and used != "0"
    status_has(page, f"seed {used}")
    expect(page.locator("#plot img")).to_be_visible(timeout=PATIENCE)
    expect(preview).to_have_count(0)
    screenshot(page, "page-light")


def test_turbo_is_the_first_choice_until_steps_are_set(page):
    expect(page.get_by_role("radio", name="turbo")).to_be_checked()
    expect(page.get_by_text("turbo takes 8 steps without guidance")).to_be_visible()
    press(page, "Generate")
    status_has(page, "1.6 s of clip")
    expect(page.locator("#link a")).to_have_attribute("href", re.compile(r"steps=8.*sampler=turbo"))
    set_number(page, "Steps", 2)
    expect(page.get_by_role("radio", name="ddim")).to_be_checked()
    press(page, "Generate")
    expect(page.locator("#link a")).to_have_attribute("href", re.compile(r"steps=2.*sampler=ddim"))


def test_examples_play_at_once(page):
    """A class that is chosen is seen and heard without a click on Generate, until there is a clip of one's own."""
    status_has(page, "Example: explosion")
    for label in ("thunder", "underwater bubbling"):
        page.get_by_role("radio", name=label).check()
        status_has(page, f"Example: {label}, seed")
        name = label.replace(" ", "-")
        playing = f"v => v.src.endsWith('/{name}.mp4') && v.currentTime > 0.2"
        page.wait_for_function(f"({playing})(document.querySelector('#clip video'))", timeout=PATIENCE)
    expect(page.locator("#plot img")).to_be_visible(timeout=PATIENCE)
    set_number(page, "Steps", 1)
    press(page, "Generate")
    status_has(page, "1.6 s of clip")
    page.get_by_role("radio", name="raining").check()
    time.sleep(1)
    expect(page.locator("#status")).to_contain_text("1.6 s of clip")
    press(page, "Play an example")
    status_has(page, "Example: raining, seed")


def test_link_reopens_the_page_with_the_recipe(page):
    page.get_by_role("radio", name="raining").check()
    set_number(page, "Steps", 1)
    set_number(page, "Sound guidance", 3.5)
    page.get_by_label("Randomize").uncheck()
    page.get_by_label("Seed", exact=True).fill(str(2**62 + 1))  # more than a browser's numbers hold
    press(page, "Generate")
    status_has(page, "1.6 s of clip")  # until then the link is the example's
    page.get_by_role("link", name="Link to this recipe").click(timeout=PATIENCE)
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(2**62 + 1), timeout=PATIENCE)
    expect(page.get_by_role("radio", name="raining")).to_be_checked()
    expect(page.get_by_label("Randomize")).not_to_be_checked()
    expect(page.get_by_label("number input for Steps")).to_have_value("1")
    expect(page.get_by_label("number input for Sound guidance")).to_have_value("3.5")
    first = page.locator("#status")
    press(page, "Generate")
    status_has(page, f"seed {2**62 + 1}")
    expect(first).to_contain_text("1.6 s of clip")


def test_link_of_another_pack_tells_the_steps_of_its_turbo(address, browser):
    page = open_page(browser, address, "/?class=krump&sampler=turbo")
    expect(page.get_by_role("radio", name="krump")).to_be_checked(timeout=PATIENCE)
    expect(page.get_by_text("turbo takes 6 steps without guidance")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("radio", name="turbo")).to_be_checked()
    page.get_by_role("radio", name="landscape", exact=True).check()
    expect(page.get_by_text("turbo takes 8 steps without guidance")).to_be_visible(timeout=PATIENCE)
    page.close()


def test_wrong_link_says_what_is_wrong(address, browser):
    page = open_page(browser, address, "/?class=thunder&steps=many")
    expect(page.get_by_text("steps 'many' in the link is no number")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_label("number input for Steps")).to_have_value("12")
    page.close()


def test_stop_ends_the_work_and_frees_the_worker(page):
    page.get_by_role("radio", name="surprise me").check()
    set_number(page, "Steps", 50)
    stop = page.get_by_role("button", name="Stop", exact=True)
    expect(stop).to_be_hidden()  # there is nothing to stop
    press(page, "Generate")
    expect(stop).to_be_visible()
    status_has(page, "of 58")  # the sound follows in a sixth more
    press(page, "Stop")
    status_has(page, "stopped")
    expect(stop).to_be_hidden()
    set_number(page, "Steps", 1)
    press(page, "Generate")
    status_has(page, "1.6 s of clip")


def test_error_is_readable_and_loses_nothing(page):
    page.get_by_label("Randomize").uncheck()
    page.get_by_label("Seed", exact=True).fill("seven")
    press(page, "Generate")
    expect(page.locator("#status").get_by_role("alert")).to_contain_text("seed 'seven' must be a whole number from 0")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("seven")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    page.get_by_label("Seed", exact=True).fill("eight")
    tab(page, "Endless stream")
    press(page, "Start the stream")
    expect(page.locator("#status").get_by_role("alert")).to_contain_text("seed 'eight' must be a whole number from 0")
    screenshot(page, "error")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_shows_everything_without_scrolling_sideways(address, browser, scheme):
    page = open_page(browser, address, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    set_number(page, "Steps", 1)
    assert page.get_by_role("tab").count() == 5  # none is hidden behind three dots
    press(page, "Generate")
    status_has(page, "1.6 s of clip")
    expect(page.locator("#plot img")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    screenshot(page, f"phone-{scheme}")
    page.locator("#seed").scroll_into_view_if_needed()  # far down; the clip stays in sight
    box = page.locator("#clip video").bounding_box()
    assert page.evaluate("window.scrollY") > 400 and 0 <= box["y"] and box["y"] + box["height"] <= 800
    page.close()


def test_every_mode_is_in_sight_at_any_width(page):
    """None is hidden behind three dots, no line is a column of words, and nothing scrolls sideways."""
    for width in (390, 480, 600, 720, 820, 900, 950, 1040, 1100, 1250, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        for title in ("Generate", "Endless stream", "Video → sound", "Sound → video", "Picture → clip"):
            expect(page.get_by_role("tab", name=title, exact=True)).to_be_visible()
        status = page.locator("#status p")
        lines = status.evaluate("p => p.offsetHeight / parseFloat(getComputedStyle(p).lineHeight)")
        assert lines < 2.5, (width, status.inner_text())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), width


def test_keyboard_chooses_a_class_and_starts(page):
    page.get_by_role("radio", name="explosion").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_role("radio", name="fire crackling")).to_be_checked()
    set_number(page, "Steps", 1)
    page.get_by_role("button", name="Generate", exact=True).focus()
    page.keyboard.press("Enter")
    status_has(page, "1.6 s of clip")


def test_every_control_has_a_name(page):
    """What a screen reader reads out: nothing to press or fill in is nameless."""
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, video')].filter(e =>
            e.offsetParent && e.type != 'file' && !e.ariaLabel && !e.innerText?.trim() && !e.title
            && ![...(e.labels || [])].some(l => l.innerText.trim()) && e.tagName != 'VIDEO').map(e => e.outerHTML)"""
    )
    assert nameless == []


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


def test_line_in_the_plot_follows_the_clip_and_a_press_on_the_plot_leads_it(page):
    plot = page.locator("#plot img")
    expect(plot).to_be_visible()
    first = plot.get_attribute("src")
    page.get_by_role("radio", name="thunder").check()
    expect(plot).not_to_have_attribute("src", first)  # the clip and then its plot have taken the first one's place
    expect(plot).to_be_visible()
    at = "Number(document.documentElement.style.getPropertyValue('--at'))"
    page.wait_for_function(f"{at} > 0.2", timeout=PATIENCE)
    page.locator("#clip video").evaluate("video => { video.loop = false; video.pause(); }")
    box = plot.bounding_box()
    axis = [box["x"] + box["width"] * part for part in AXIS]
    plot.click(position={"x": axis[0] + 0.25 * (axis[1] - axis[0]) - box["x"], "y": box["height"] / 2})
    page.wait_for_function(f"Math.abs({at} - 0.25) < 0.02", timeout=PATIENCE)
    assert page.locator("#clip video").evaluate("video => video.currentTime") == pytest.approx(0.4, abs=0.05)


def test_long_clip_is_continued(page):
    set_number(page, "Steps", 1)
    set_number(page, "Seconds", 3)
    press(page, "Generate")
    status_has(page, "3.0 s of clip")
    page.wait_for_function("document.querySelector('#clip video')?.duration > 2.9", timeout=PATIENCE)
