"""Packs on the page: a choice where there are several, the classes of each, and everything that goes by the class."""

import re

import gradio as gr
import pytest
from demo_helpers import PATIENCE, open_page, press, set_number, status_has, tab
from gradio_client import Client
from playwright.sync_api import expect

from avdit.data.scenes import CLASSES, GENRES
from avdit.demo.controls import SURPRISE, class_gallery, one_of, pack_of

PACKS = {"own": list(CLASSES), "dance": list(GENRES)}


@pytest.fixture
def packs_page(local, browser):
    page = open_page(browser, local)
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def gallery(page):
    return [box.get_attribute("value") for box in page.locator("#classes input").all()]


def test_pack_filters_the_gallery_and_its_classes_are_made(packs_page):
    page = packs_page
    assert gallery(page) == [*CLASSES, SURPRISE]
    page.get_by_role("radio", name="dance", exact=True).check()
    expect(page.get_by_role("radio", name=GENRES[0], exact=True)).to_be_checked()
    assert gallery(page) == [*GENRES, SURPRISE]
    picture = page.locator("#classes label", has_text="krump").evaluate(
        "label => getComputedStyle(label, '::before').backgroundImage"
    )
    assert picture.startswith('url("data:image/jpeg')
    page.get_by_role("radio", name="krump").check()
    set_number(page, "Steps", 1)
    press(page, "Generate")
    status_has(page, "1.6 s of clip")
    link = page.get_by_role("link", name="Link to this recipe")
    expect(link).to_have_attribute("href", re.compile("class=krump"))
    link.click()
    expect(page.get_by_role("radio", name="krump")).to_be_checked()
    expect(page.get_by_role("radio", name="dance", exact=True)).to_be_checked()
    assert gallery(page) == [*GENRES, SURPRISE]


def test_surprise_stays_in_the_pack(packs_page):
    page = packs_page
    page.get_by_role("radio", name="dance", exact=True).check()
    page.get_by_role("radio", name=SURPRISE).check()
    set_number(page, "Steps", 1)
    press(page, "Generate")
    status_has(page, "1.6 s of clip")
    href = page.get_by_role("link", name="Link to this recipe").get_attribute("href")
    assert any(f"class={name.replace(' ', '+')}&" in href for name in GENRES)


def test_stream_goes_over_to_another_pack(packs_page):
    page = packs_page
    tab(page, "Endless stream")
    set_number(page, "Steps", 1)
    press(page, "Start the stream")
    status_has(page, "explosion · ")
    page.get_by_role("radio", name="dance", exact=True).check()
    status_has(page, f"{GENRES[0]} · ")
    page.get_by_role("radio", name="krump").check()
    set_number(page, "Steps", 2)
    status_has(page, "krump · ")
    press(page, "Stop")
    status_has(page, "stopped")


def test_every_class_can_be_asked_for_through_the_api(local):
    client = Client(local, verbose=False)
    for label in ("thunder", "krump", "raining"):
        assert client.predict(class_label=label, steps=1, api_name="/generate")[2]["class"] == label


def test_one_pack_asks_for_no_choice():
    with gr.Blocks():
        pack, label = class_gallery({"own": list(CLASSES)})
        assert not pack.visible and [value for _, value in label.choices] == [*CLASSES, SURPRISE]
        assert class_gallery(PACKS)[0].visible


def test_class_and_pack_find_each_other():
    assert pack_of(PACKS, "krump") == "dance" and pack_of(PACKS, "no class") == "own"
    assert one_of(PACKS, "dance", "thunder") == "thunder"
    assert {one_of(PACKS, "dance", SURPRISE) for _ in range(99)} <= set(GENRES)
    assert {one_of(PACKS, None, SURPRISE) for _ in range(99)} & set(CLASSES)
