"""What visitors send that is no good, or that is a lot: each gets a sentence, and the server goes on."""

import os
import resource
import struct
import subprocess
import time
import wave
from pathlib import Path

import httpx
import numpy as np
import pytest
from demo_helpers import clip_of, wait_until
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from avdit.demo.files import keep_newest
from avdit.demo.handlers import Handlers
from avdit.demo.service import Finished, Service
from avdit.demo.ui import create_demo
from avdit.generate import Request, conditions
from avdit.media import ensure_ffmpeg, probe

QUICK = {"class_label": "thunder", "steps": 1, "seed": "1"}
ENDPOINTS = {"video": "/video_to_audio", "audio": "/audio_to_video", "image": "/animate"}


@pytest.fixture(scope="module")
def odd(tmp_path_factory, media_files) -> Path:
    """A folder of odd files."""
    ensure_ffmpeg()
    folder = tmp_path_factory.mktemp("odd")

    def film(name: str, source: str, *options: str) -> None:
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *options, str(folder / name)]
        subprocess.run(command, check=True, capture_output=True)

    film("three-hours.mp4", "color=red:size=16x16:rate=1:duration=10800", "-preset", "ultrafast", "-g", "600")
    film("thread.mkv", "testsrc=size=2x1200:rate=10:duration=2", "-c:v", "ffv1")
    film("half.mp4", "testsrc=size=64x64:rate=10:duration=0.8")
    (folder / "cut.webm").write_bytes(media_files.video.read_bytes()[:3000])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "film.png").write_bytes(media_files.video.read_bytes())
    (folder / "sound.mp4").write_bytes(media_files.sound.read_bytes())
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    Image.new("RGB", (7680, 4320), "blue").save(folder / "8k.png")
    Image.new("L", (1, 30_000), 128).save(folder / "thread.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    with wave.open(str(folder / "click.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 1, "NONE", ""))
        file.writeframes(b"\x00\x7f")
    return folder


@pytest.mark.parametrize(
    ("field", "name", "start"),
    [
        ("video", "three-hours.mp4", 0),
        ("video", "three-hours.mp4", 10_790),
        ("video", "thread.mkv", 0),
        ("audio", "sound.mp4", 0),  # a sound under another name is a sound
        ("audio", "click.wav", 0),  # one sample; silence follows
        ("image", "dot.png", None),
        ("image", "8k.png", None),
        ("image", "thread.png", None),
    ],
)
def test_odd_files_are_used(client, odd, field, name, start):
    given = {field: handle_file(odd / name)} | ({} if start is None else {"start": start})
    made = client.predict(**QUICK, **given, api_name=ENDPOINTS[field])
    assert float(probe(clip_of(made))["format"]["duration"]) == pytest.approx(1.6, abs=0.1)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("video", "half.mp4", "half.mp4 is too short: 1.6 s of picture are needed"),
        ("video", "cut.webm", "cut.webm"),
        ("video", "empty.mp4", "empty.mp4 is not a video, sound or picture that can be read"),
        ("video", "sound.mp4", "sound.mp4 has no picture"),
        ("audio", "three-hours.mp4", "three-hours.mp4 has no sound"),
        ("audio", "dot.png", "dot.png has no sound"),
        ("image", "film.png", "film.png is not a picture that can be read"),
        ("image", "bomb.png", "bomb.png has too many pixels"),
    ],
)
def test_files_that_cannot_be_used_are_named(client, odd, field, name, message):
    with pytest.raises(AppError, match=message) as error:
        client.predict(**QUICK, **{field: handle_file(odd / name)}, api_name=ENDPOINTS[field])
    assert "/" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("noun", "name", "start", "said"),
    [
        ("video", "three-hours.mp4", 7200, "Used: 7200.0 s to 7201.6 s of the 10800.0 s of three-hours.mp4."),
        ("video", "half.mp4", 0, "half.mp4 is 0.8 s long, and 1.6 s from the start on are needed."),
        ("video", "three-hours.mp4", 10_801, "choose an earlier start."),
        ("video", "three-hours.mp4", -1, "Choose a start of 0 s or more."),
        ("video", "three-hours.mp4", float("nan"), "Choose a start of 0 s or more."),
        ("video", "sound.mp4", 0, "sound.mp4 has no picture: choose another file."),
        ("sound", "click.wav", 0, "of click.wav, then silence."),
        ("sound", "dot.png", 0, "dot.png has no sound: choose another file."),
        ("picture", "8k.png", 0, "The middle of 8k.png, scaled to 256 × 256, becomes the first frame."),
        ("picture", "film.png", 0, "film.png is not a picture that can be read: choose another file."),
    ],
)
def test_part_that_is_used_is_said_before_anything_is_made(service, odd, noun, name, start, said):
    assert Handlers(service).used_part(str(odd / name), start, noun).endswith(said)


@pytest.mark.parametrize(
    ("noun", "name", "options"),
    [
        ("video", "phone.mp4", ["testsrc=size=180x320:rate=60:duration=2", "-c:v", "libx265", "-preset", "ultrafast"]),
        (
            "video",
            "web.webm",
            ["testsrc=size=130x98:rate=24000/1001:duration=2", "-c:v", "libvpx-vp9"],
        ),
        ("video", "moving.gif", ["testsrc=size=64x64:rate=10:duration=2"]),
        ("sound", "five.flac", ["sine=duration=2:sample_rate=96000", "-ac", "6"]),
        ("sound", "voice.ogg", ["sine=duration=2:sample_rate=8000", "-c:a", "libopus"]),
        ("sound", "note.mp3", ["sine=duration=2:sample_rate=44100", "-ac", "2"]),
    ],
)
def test_whatever_ffmpeg_reads_is_read(service, tmp_path, noun, name, options):
    file = str(tmp_path / name)
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", *options, file], check=True, capture_output=True)
    field = {"video": "video", "sound": "audio"}[noun]
    given = conditions(service.pipe, Request("thunder", **{field: file}))[field]
    assert len(given) == {"video": 16, "sound": 25600}[noun] and given.std() > 0.05
    assert Handlers(service).used_part(file, 0.0, noun).startswith("Used: 0.0 s to 1.6 s of the 2.")


def test_part_after_the_end_is_named(client, odd):
    file = handle_file(odd / "three-hours.mp4")
    with pytest.raises(AppError, match="three-hours.mp4"):
        client.predict(**QUICK, video=file, start=10_900, api_name="/video_to_audio")
    with pytest.raises(AppError, match="start 1000000 must be a number from 0 to 86400"):
        client.predict(**QUICK, video=file, start=1_000_000, api_name="/video_to_audio")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e308", "-0.5", '"many"', "null"])
def test_numbers_that_are_none_are_refused(address, value):
    """As raw JSON, for no client of Python's would send these."""
    call = f"{address}/gradio_api/call/generate"
    body = f'{{"data": ["thunder", {value}, 2, null, "1", false, "ddim", 1.6]}}'
    made = httpx.post(call, content=body, headers={"Content-Type": "application/json"}, timeout=120)
    assert made.status_code < 500, made.text
    if made.status_code == 200:
        answer = httpx.get(f"{call}/{made.json()['event_id']}", timeout=120).text
        assert "event: error" in answer
        if value not in ('"many"', "null"):
            assert "must be a whole number from 1 to 100" in answer
    assert httpx.get(address, timeout=120).status_code == 200


def test_full_disk_is_a_sentence_and_the_next_clip_is_made(service):
    before = set(service.folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond
    try:
        for endless in (False, True):
            with pytest.raises(ValueError, match="the server's disk may be full: try again later") as error:
                list(service.run(Request("thunder", steps=1), "visitor", endless))
            assert "/" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wait_until(lambda: set(service.folder.iterdir()) <= before, 20, "something half-written stays")
    assert not service.running
    *_, last = service.run(Request("thunder", steps=1), "visitor")
    assert isinstance(last, Finished) and last.video.stat().st_size > 1000


def test_visitors_files_go_by_themselves(tiny_checkpoint, media_files, tmp_path, monkeypatch):
    """On a server of its own, where an hour is over at once."""
    ensure_ffmpeg()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("avdit.demo.service.CLEANED_EVERY", 0.5)
    service = Service(tiny_checkpoint, bfloat16=False)
    demo = create_demo(service)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": 300})
        made = client.predict(**QUICK, video=handle_file(media_files.video), api_name="/video_to_audio")
        assert Path(clip_of(made)).stat().st_size > 1000  # the visitor's own copy
        assert any(service.folder.iterdir()) and any(tmp_path.iterdir())
        service.kept_seconds = 0.5
        wait_until(lambda: not any(service.folder.iterdir()), 60, "what was made stays")
        wait_until(lambda: not [path for path in tmp_path.rglob("*") if path.is_file()], 60, "an upload stays")
        service.kept_seconds = 3600
        assert clip_of(client.predict(**QUICK, api_name="/generate"))
    finally:
        demo.close()


def test_newest_files_stay_within_the_limit(tmp_path):
    for k, name in enumerate(("oldest", "middle", "newest")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "clip").write_bytes(b"x" * 1000)
        os.utime(folder, (time.time() - 10 + k,) * 2)
    keep_newest(tmp_path, 3600, 2500)
    assert {path.name for path in tmp_path.iterdir()} == {"middle", "newest"}
    keep_newest(tmp_path, 3600, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["newest"]
    (tmp_path / "old").write_bytes(b"x")
    os.utime(tmp_path / "old", (0, 0))
    keep_newest(tmp_path, 3600, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["newest"]
    keep_newest(tmp_path / "nowhere", 1, 1)


def test_sound_that_holds_no_numbers_is_named(client, tmp_path):
    samples = np.full(16000, np.nan, "<f4").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 3, 1, 16000, 64000, 4,
                         32, b"data", len(samples))  # fmt: skip
    (tmp_path / "nan.wav").write_bytes(header + samples)
    with pytest.raises(AppError, match="nan.wav holds samples that are no numbers"):
        client.predict(**QUICK, audio=handle_file(tmp_path / "nan.wav"), api_name="/audio_to_video")
