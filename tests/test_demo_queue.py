"""More visitors than can be served: each learns its place in the queue, or that it is full."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from demo_helpers import PATIENCE, open_page, press, screenshot, set_number, status_has, wait_until
from gradio_client import Client
from playwright.sync_api import expect

from avdit.demo.examples import Example
from avdit.demo.handlers import CLIPS_AT_ONCE
from avdit.demo.ui import QUEUE_LENGTH

ASKED = {"data": ["thunder", 1, 1, None, "1", False, "ddim", 1.6]}


@pytest.fixture
def crowd(service, local):
    """What sends any number of requests at once, while the model is held: their answers."""
    url, answers = f"{local}/gradio_api/call/generate", []
    with httpx.Client(timeout=PATIENCE / 1000) as http, ThreadPoolExecutor(8) as pool:

        def send(count: int) -> list[httpx.Response]:
            answers.extend(pool.map(lambda _: http.post(url, json=ASKED), range(count)))
            return answers

        with service.turns.turn(lambda: False):
            yield send
            for session in list(service.running):
                service.stop(session)
        # An empty queue is not yet the end: what it let go last may not have begun, and would meet the next test.
        for answer in answers:
            if answer.status_code == 200:
                http.get(f"{url}/{answer.json()['event_id']}").raise_for_status()
        assert not service.running


def test_thousand_requests_at_once_fill_the_queue_and_do_no_harm(crowd, local, browser):
    page = open_page(browser, local)
    answers = crowd(1000)
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer.json()["detail"] for answer in answers if answer.status_code == 503]
    assert len(taken) + len(refused) == 1000
    assert QUEUE_LENGTH <= len(taken) <= QUEUE_LENGTH + CLIPS_AT_ONCE
    assert all("Queue is full" in text for text in refused)
    press(page, "Generate")  # of a page the same is readable, and stays so
    status_has(page, "The page is busy or out of reach: try again in a minute")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    screenshot(page, "queue-full")
    page.close()


def test_place_in_the_queue_is_shown_and_can_be_given_up(crowd, service, local, browser):
    page = open_page(browser, local)
    crowd(CLIPS_AT_ONCE + 3)
    wait_until(lambda: len(service.turns) > CLIPS_AT_ONCE, PATIENCE / 1000, "nobody waits")
    press(page, "Generate")
    status_has(page, re.compile(r"queue: \d+/4"))
    screenshot(page, "queue")
    press(page, "Stop")
    status_has(page, "stopped")
    page.close()


def test_late_example_never_replaces_a_visitors_own_clip(service, local, browser, monkeypatch):
    """A starved server answers what was asked for first last: the page then goes on showing what was asked for last."""
    page, held, release, begun = open_page(browser, local), [], threading.Event(), threading.Event()
    drawn = Example.result

    def draw_late(*arguments):
        begun.set()
        release.wait(PATIENCE / 1000)
        return drawn(*arguments)

    monkeypatch.setattr(Example, "result", draw_late)
    page.route("**/gradio_api/run/**", lambda route: held.append(route))
    page.get_by_role("radio", name="thunder").check()
    status_has(page, "Example: thunder")  # without a word from the server
    wait_until(begun.is_set, PATIENCE / 1000, "no plot is drawn")
    set_number(page, "Steps", 1)
    press(page, "Generate")
    status_has(page, "1.6 s of clip")
    plot = page.locator("#plot img")
    expect(plot).to_be_visible()
    shown = [page.locator("#clip video").get_attribute("src"), plot.get_attribute("src")]
    release.set()
    for route in held:
        route.continue_()
    page.get_by_role("radio", name="raining").check()
    page.wait_for_timeout(3000)
    assert [page.locator("#clip video").get_attribute("src"), plot.get_attribute("src")] == shown
    expect(page.locator("#status")).to_contain_text("1.6 s of clip")
    page.close()


def test_server_goes_on_after_a_crowd(local):
    answer = Client(local, verbose=False, httpx_kwargs={"timeout": 300}).predict(
        steps=1, seed="1", api_name="/generate"
    )
    assert answer[1] == "1"
