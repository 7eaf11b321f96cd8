"""Clips from a visitor's file: sound for a video, a picture for a sound, a clip from a picture."""

import pytest
from demo_helpers import PATIENCE, press, screenshot, set_number, status_has, tab
from playwright.sync_api import expect


@pytest.mark.parametrize(
    ("title", "button", "file", "said"),
    [
        ("Video → sound", "Make the sound", "video", "Used: 0.0 s to 1.6 s of the 4.0 s of tall.webm"),
        ("Sound → video", "Make the picture", "sound", "Used: 0.0 s to 1.6 s of the 3.0 s of stereo.flac"),
        ("Picture → clip", "Bring it to life", "picture", "The middle of wide.png, scaled to 256 × 256"),
    ],
)
def test_upload_is_used(page, media_files, title, button, file, said):
    tab(page, title)
    set_number(page, "Steps", 1)
    page.locator("input[type=file]:visible, [role=tabpanel]:visible input[type=file]").first.set_input_files(
        getattr(media_files, file)
    )
    expect(page.get_by_text(said)).to_be_visible(timeout=PATIENCE)
    press(page, button)
    status_has(page, "1.6 s of clip")
    page.wait_for_function("document.querySelector('#clip video')?.currentTime > 0.2", timeout=PATIENCE)
    page.get_by_role("button", name="Recipe").click()
    expect(page.get_by_text(getattr(media_files, file).name).last).to_be_visible()
    screenshot(page, f"mode-{file}")


@pytest.mark.parametrize(
    ("title", "label", "file"),
    [
        ("Video → sound", "splashing water", "splashing-water.mp4"),
        ("Sound → video", "raining", "raining.wav"),
        ("Picture → clip", "waterfall burbling", "waterfall-burbling"),
    ],
)
def test_sample_tries_a_mode_with_one_click(page, title, label, file):
    tab(page, title)
    set_number(page, "Steps", 1)
    page.locator(".samples:visible button", has_text=label).click()
    status_has(page, "1.6 s of clip")
    expect(page.get_by_role("radio", name=label)).to_be_checked()
    expect(page.get_by_text(file).first).to_be_visible()


def test_mode_without_its_file_says_what_to_do(page):
    tab(page, "Sound → video")
    press(page, "Make the picture")
    status_has(page, "Sound → video needs a sound: upload one")


def test_file_that_is_no_video_is_refused_with_a_sentence(page, media_files):
    tab(page, "Video → sound")
    page.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(media_files.text)
    expect(page.get_by_text("notes.mp4 is not a video that can be read")).to_be_visible(timeout=PATIENCE)
    press(page, "Make the sound")
    status_has(page, "notes.mp4 is not a video, sound or picture that can be read")
