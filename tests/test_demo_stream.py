"""The endless stream: it plays, follows the visitor, stops, and leaves nothing behind."""

import multiprocessing
import re
import threading
import time

import numpy as np
import pytest
import torch
from demo_helpers import PATIENCE, open_page, press, screenshot, set_number, status_has, tab, wait_until
from gradio_client import Client
from playwright.sync_api import expect

from avdit.demo.service import Chunk
from avdit.demo.turns import Turns
from avdit.generate import Request, Stopped
from avdit.media import probe
from avdit.pipeline import AVDiTPipeline
from avdit.streaming import CONTRAST_STEP, OVERLAP, led_back, windows
from benchmarks.page_stream import Fetched, choose, marked_stream, measure
from benchmarks.page_stream import play as play_stream


def play(page, seconds):
    page.wait_for_function(f"document.querySelector('#live video')?.currentTime > {seconds}", timeout=PATIENCE)


def test_stream_plays_follows_a_class_change_and_stops(page):
    tab(page, "Endless stream")
    set_number(page, "Steps", 1)
    page.get_by_role("radio", name="thunder").check()
    press(page, "Start the stream")
    status_has(page, re.compile(r"thunder · .* windows? made"))
    play(page, 0.5)
    page.get_by_role("radio", name="raining").check()
    status_has(page, re.compile(r"raining · .* × real time · .* windows .* buffered · first picture after .* made"))
    screenshot(page, "stream")
    play(page, 2.5)
    assert page.locator("#live video").evaluate("v => v.webkitAudioDecodedByteCount") > 0
    press(page, "Stop")
    status_has(page, "stopped")
    time.sleep(1)
    expect(page.locator("#status")).to_contain_text("stopped")  # nothing more comes


def test_sound_stays_with_its_picture_and_no_joint_has_a_gap(service, local, browser, monkeypatch):
    """On what a browser fetched, over changes of the class within a pack and to another."""
    monkeypatch.setattr("avdit.demo.service.stream", marked_stream)  # as benchmarks.page_stream does for ten minutes
    page = open_page(browser, local)
    fetched, labels = Fetched(page), iter(["raining", "krump", "house", "thunder"] * 9)
    set_number(page, "Steps", 1)
    play_stream(page, fetched, 10, lambda: choose(page, service, next(labels)), every=3, limit=600)
    joints = measure(fetched.segments)
    page.close()
    assert joints.segments >= 3 and joints.marks >= 7 and joints.lost == 0
    assert joints.seconds == pytest.approx(1.2 * joints.marks, abs=1.3)  # every window is there once
    assert joints.offset_ms_most <= 40 and joints.spacing_ms <= 40
    assert joints.picture_gap_ms <= 1 and joints.sound_gap_ms <= 1


def test_closed_tab_frees_everything_at_once(service, local, browser):
    def close_a_streaming_tab():
        page = open_page(browser, local)
        tab(page, "Endless stream")
        set_number(page, "Steps", 1)
        press(page, "Start the stream")
        play(page, 0.5)
        set_number(page, "Steps", 100)
        page.close()
        # Two seconds are the promise; the rest is for a machine that is busy with other things.
        wait_until(
            lambda: not service.running and not service.turns._waiting, 2 + 18, "the work of a closed tab goes on"
        )
        wait_until(lambda: set(service.folder.iterdir()) <= files, 2 + 18, "its files stay")

    files = set(service.folder.iterdir())
    close_a_streaming_tab()  # the first one leaves what the server keeps for all that come
    threads = threading.active_count()
    close_a_streaming_tab()
    wait_until(lambda: threading.active_count() <= threads + 6, 20, "its threads stay")  # the server keeps a few


def _listen(address, started):
    job = Client(address, verbose=False).submit(class_label="thunder", steps=1, windows=500, api_name="/stream")
    for _ in job:
        started.set()


def test_client_that_dies_mid_stream_frees_everything(service, local):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    listener = context.Process(target=_listen, args=(local, started), daemon=True)
    listener.start()
    wait_until(started.is_set, 120, "no piece came")
    assert service.running
    listener.kill()
    wait_until(lambda: not service.running and not service.turns._waiting, 4, "the work of a dead client goes on")


def test_chunks_follow_live_changes_and_their_files_go(service):
    chunks, seen = [], []
    for report in service.run(Request("thunder", seed=1, steps=1), "visitor", endless=True):
        if isinstance(report, Chunk):
            assert not any(c.video.exists() for c in chunks)
            chunks.append(report)
            seen += [stream["duration"] for stream in probe(report.video)["streams"] if stream["codec_type"] == "video"]
            if len(chunks) == 1:
                service.change("visitor", class_label="raining", steps=2)
            if report.class_label == "raining":
                service.stop("visitor")
    assert chunks[0].class_label == "thunder" and chunks[-1].class_label == "raining"
    assert float(seen[0]) == pytest.approx(1.2, abs=0.05) and chunks[0].seconds == pytest.approx(1.2)
    assert chunks[-1].seconds == pytest.approx(chunks[-1].windows * 1.2)
    wait_until(lambda: not any(c.video.exists() for c in chunks), 20, "a stream's files stay behind")
    assert not service.running and not service.live


def test_closing_the_iterator_ends_the_work(service):
    before = threading.active_count()
    reports = service.run(Request("thunder", steps=50), "visitor", endless=True)
    next(reports)
    reports.close()
    wait_until(lambda: threading.active_count() <= before, 20, "the worker goes on")


def test_stream_and_clip_take_turns(service):
    """A clip asked for while a stream runs is made between two of its windows."""
    stream = service.run(Request("thunder", seed=1, steps=2), "one", endless=True)
    next(stream)
    made = [r for r in service.run(Request("raining", seed=3, steps=2), "two")][-1].result
    stream.close()
    alone = [r for r in service.run(Request("raining", seed=3, steps=2), "two")][-1].result
    assert np.array_equal(made.frames, alone.frames) and np.array_equal(made.audio, alone.audio)


def test_turns_are_fair_and_can_be_called_off():
    turns, order, gone = Turns(), [], threading.Event()

    def work(name):
        with turns.turn(lambda: False):
            order.append(name)

    def leave():
        with pytest.raises(Stopped), turns.turn(gone.is_set):
            order.append("never")

    threads = []
    with turns.turn(lambda: False):
        for target, arguments in ((work, "a"), (leave, None), (work, "b")):
            threads.append(threading.Thread(target=target, args=(arguments,) if arguments else ()))
            threads[-1].start()
            wait_until(lambda: len(turns._waiting) == len(threads) + 1, 10, "no one waits")  # noqa: B023
        gone.set()
        threads[1].join(10)
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b"]


def test_windows_are_as_long_in_sound_as_in_picture_and_dissolve(tiny_pipeline):
    labels = iter(["thunder", "thunder", "raining", "raining"])

    def settings():
        return {"class_labels": next(labels), "num_inference_steps": 1, "guidance_scale": 1.0}

    made = list(windows(tiny_pipeline, settings, torch.Generator().manual_seed(0), 4))
    assert [len(f) for f, _ in made] == [12, 12, 12, 16]
    assert all(len(audio) == len(frames) * 1600 for frames, audio in made)
    joint = made[2][0]  # the old scene gives way frame by frame
    steps = np.abs(np.diff(np.concatenate([made[1][0][-1:], joint[: OVERLAP + 1]]), axis=0)).mean((1, 2, 3))
    assert steps.max() < 3 * steps.mean()


def test_a_window_begins_as_strong_as_what_it_continues():
    scene = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scene /= scene.std((2, 3, 4), keepdim=True)
    stronger = torch.cat([scene[:, :OVERLAP], 1.2 * scene[:, OVERLAP:]], 1)
    torch.testing.assert_close(led_back(stronger, torch.tensor(1.0)), scene, rtol=0.02, atol=0.02)
    flash = stronger.clone()
    flash[:, 10] *= 3  # what happens later in a window stays as bright beside its neighbours
    torch.testing.assert_close(led_back(flash, torch.tensor(1.0))[:, 10], 3 * scene[:, 10], rtol=0.02, atol=0.02)
    weaker = torch.cat([scene[:, :OVERLAP], 0.7 * scene[:, OVERLAP:]], 1)
    assert torch.equal(led_back(weaker, torch.tensor(1.0)), weaker)
    faded = led_back(stronger, torch.tensor(0.5))[:, OVERLAP:].std()  # a stream that has become stronger than it began
    assert 1 - CONTRAST_STEP < faded < 0.95


def test_windows_are_the_same_whether_or_not_the_next_one_is_made_beside(tiny_pipeline, monkeypatch):
    made = []
    for count in (1, 2):
        monkeypatch.setattr("avdit.streaming.own_threads", lambda: count)  # noqa: B023
        labels = iter(["thunder", "thunder", "raining"])
        made.append(
            list(
                windows(
                    tiny_pipeline,
                    lambda: {"class_labels": next(labels), "num_inference_steps": 2},  # noqa: B023
                    torch.Generator().manual_seed(0),
                    3,
                )
            )
        )
    for (frames, audio), (others, sound) in zip(*made, strict=True):
        np.testing.assert_allclose(frames, others, atol=1e-4)
        # The phase of its faintest parts, which the vocoder finds step by step, hangs on rounding.
        assert np.square(audio - sound).mean() < 1e-4 * np.square(sound).mean()


def test_every_window_of_a_scene_looks_back_to_its_first_frame(tiny_pipeline, monkeypatch):
    given, made, labels = [], [], iter(["thunder", "thunder", "thunder", "raining", "raining"])
    call = AVDiTPipeline.__call__

    def record(pipe, *args, given_latents=None, **settings):
        given.append(given_latents and given_latents[0])
        made.append(call(pipe, *args, given_latents=given_latents, **settings))
        return made[-1]

    monkeypatch.setattr(AVDiTPipeline, "__call__", record)
    settings = lambda: {"class_labels": next(labels), "num_inference_steps": 1}  # noqa: E731
    assert len(list(windows(tiny_pipeline, settings, torch.Generator().manual_seed(0), 5))) == 5
    assert [shown is None for shown in given] == [True, False, False, True, False]
    for number, scene in ((1, 0), (2, 0), (4, 3)):
        assert torch.equal(given[number][:, :1], made[scene].frames[:, :1])
        before = made[number - 1].frames[:, 1 - OVERLAP :]
        # Led back to the scene's contrast they may be, but these are the last frames of the window before.
        assert torch.corrcoef(torch.stack([given[number][:, 1:].flatten(), before.flatten()]))[0, 1] > 0.99


def test_a_scene_keeps_what_its_frames_have_in_common(tiny_pipeline, monkeypatch):
    """Windows of one scene start from noise that is half the same; those of two scenes from noise that is not."""
    seen, labels = [], iter(["thunder", "thunder", "thunder", "raining"])
    call = AVDiTPipeline.__call__

    def record(pipe, *args, latents, **settings):
        seen.append(latents[0].mean((0, 1)).flatten())
        return call(pipe, *args, latents=latents, **settings)

    monkeypatch.setattr(AVDiTPipeline, "__call__", record)
    settings = lambda: {"class_labels": next(labels), "num_inference_steps": 1}  # noqa: E731
    assert len(list(windows(tiny_pipeline, settings, torch.Generator().manual_seed(0), 4))) == 4
    alike = torch.corrcoef(torch.stack(seen))
    assert alike[:3, :3].min() > 0.8 and alike[3, :3].abs().max() < 0.1
