"""The named endpoints, as gradio_client uses them."""

import asyncio
import base64
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from demo_helpers import clip_of
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from avdit.media import probe, read_audio, read_recipe, read_video

QUICK = {"class_label": "thunder", "steps": 1}
LOAD = os.environ.get("AVDIT_LOAD") == "1"
# AVDIT_LOAD=1 does the same with the page's own sampler, and its figures are seen with -n 0 -s.
WORK = {"sampler": "turbo"} if LOAD else {"steps": 1}
CLIENTS, REQUESTS = 8, 10


def test_endpoints_and_their_parameters_are_documented(client):
    info = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(info) == {"/generate", "/stream", "/video_to_audio", "/audio_to_video", "/animate"}
    for name, endpoint in info.items():
        for parameter in endpoint["parameters"]:
            if parameter["parameter_name"] not in ("video", "audio", "image"):
                assert parameter["parameter_has_default"], (name, parameter["parameter_name"])


def test_classes_and_samplers_are_listed(client):
    """Who calls a tool by its description alone learns from it what can be asked for."""
    for endpoint in client.view_api(return_format="dict", print_info=False)["named_endpoints"].values():
        types = {p["parameter_name"]: p["type"].get("enum", []) for p in endpoint["parameters"]}
        assert "thunder" in types["class_label"] and "surprise me" in types["class_label"]
        assert types["sampler"] == ["ddim", "dpm++", "unipc", "turbo"]


def test_endpoints_are_mcp_tools(address):
    """Where the extra is installed: ``pip install "gradio[mcp]"``."""
    pytest.importorskip("mcp")
    schema = httpx.get(f"{address}/gradio_api/mcp/schema", timeout=120).json()
    tools = {tool["name"]: tool for tool in schema}
    assert set(tools) == {"generate", "stream", "video_to_audio", "audio_to_video", "animate"}
    for tool in tools.values():
        assert tool["description"] and all(p.get("description") for p in tool["inputSchema"]["properties"].values())


def test_mcp_client_makes_a_clip_with_every_tool(address, media_files):
    pytest.importorskip("mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    def data(kind: str, file: Path) -> str:
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"

    wanted = {
        "generate": {},
        "stream": {"windows": 2},
        "video_to_audio": {"video": data("video/webm", media_files.video)},
        "audio_to_video": {"audio": data("audio/flac", media_files.sound)},
        "animate": {"image": data("image/png", media_files.picture)},
    }

    async def call() -> dict:
        transport = streamable_http_client(f"{address}/gradio_api/mcp/")
        async with transport as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return {name: await session.call_tool(name, QUICK | {"seed": "5"} | more) for name, more in wanted.items()}

    for name, answer in asyncio.run(call()).items():
        text = "\n".join(part.text for part in answer.content if part.type == "text")
        assert not answer.isError and (".ts" if name == "stream" else ".mp4") in text, (name, text)
        assert ("windows made" if name == "stream" else '"seed": 5') in text.replace("'", '"'), (name, text)


def test_same_seed_gives_the_same_clip(client):
    wanted = {"class_label": "thunder", "steps": 2, "seed": "11"}  # a seed that is given is used
    first, second = (client.predict(**wanted, api_name="/generate") for _ in "ab")
    assert first[1] == "11"
    assert Path(clip_of(first)).read_bytes() == Path(clip_of(second)).read_bytes()
    recipe = read_recipe(clip_of(first))
    assert (recipe["class"], recipe["seed"], recipe["steps"]) == ("thunder", 11, 2)
    assert Path(first[3]).suffix == ".wav"


def test_seed_is_drawn_where_none_is_given(client):
    first, second = (client.predict(**QUICK, api_name="/generate") for _ in "ab")
    assert first[1] != second[1] and first[2]["seed"] == int(first[1])


@pytest.mark.parametrize(
    ("endpoint", "field", "file"),
    [("/video_to_audio", "video", "video"), ("/audio_to_video", "audio", "sound"), ("/animate", "image", "picture")],
)
def test_clip_is_made_from_the_given_file(client, media_files, endpoint, field, file):
    path = getattr(media_files, file)
    made = client.predict(**QUICK, seed="1", **{field: handle_file(path)}, api_name=endpoint)
    clip = clip_of(made)
    assert read_recipe(clip)[field] == path.name
    assert float(probe(clip)["format"]["duration"]) == pytest.approx(1.6, abs=0.1)
    if field == "video":  # the visitor's own picture, with a sound
        size = {"fps": 10, "height": 256, "width": 256, "max_frames": 16}
        assert np.abs(read_video(clip, **size) - read_video(path, **size)).mean() < 0.05
    if field == "audio":
        sounds = [read_audio(file, sampling_rate=16000, max_samples=24000) for file in (clip, path)]
        tones = [np.abs(np.fft.rfft(sound)).argmax() for sound in sounds]
        assert tones[0] == tones[1] == round(440 * 1.5)


def test_stream_gives_piece_after_piece(client):
    pieces = list(client.submit(**QUICK, windows=3, api_name="/stream"))
    assert len(pieces) >= 2 and "windows made" in pieces[-1][1]
    assert all(float(probe(path)["format"]["duration"]) > 1 for path, _ in pieces)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": "-1"}, "seed -1 must be a whole number from 0"),
        ({"seed": str(2**70)}, "must be a whole number from 0"),
        ({"seed": "seven"}, "seed 'seven' must be"),
        ({"steps": 2.5}, "steps 2.5 must be a whole number"),
        ({"steps": 1e300}, "must be a whole number from 1 to 100"),
        ({"guidance": 1e9}, "must be a number from 1 to 10"),
        ({"seconds": 1000}, "seconds 1000 must be a number from 0.1 to 60"),
        ({"class_label": "thundr"}, "unknown class 'thundr'"),
    ],
)
def test_bad_request_is_a_sentence(client, wrong, message):
    with pytest.raises(AppError, match=message):
        client.predict(**QUICK | wrong, api_name="/generate")


def test_file_that_is_no_video_is_named_without_its_folder(client, media_files):
    with pytest.raises(AppError) as error:
        client.predict(**QUICK, video=handle_file(media_files.text), api_name="/video_to_audio")
    assert "notes.mp4" in str(error.value) and "/" not in str(error.value)


def test_clients_at_once_get_their_own_clips(address, client):
    """Nothing is lost or mixed up: each answer is of what was asked for, and the same bytes as asked for alone."""

    def ask(number):
        visitor = Client(address, verbose=False, httpx_kwargs={"timeout": 300})
        made = []
        for k in range(REQUESTS):
            wanted = {"class_label": ("thunder", "raining")[(number + k) % 2], "seed": str(100 * number + k)}
            begun = time.monotonic()
            answer = visitor.predict(**wanted, **WORK, api_name="/generate")
            made.append((wanted, answer, time.monotonic() - begun))
        return made

    begun = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for made in pool.map(ask, range(CLIENTS)) for answer in made]
    seconds, waits = time.monotonic() - begun, sorted(wait for *_, wait in answers)
    print(
        f"{CLIENTS} clients x {REQUESTS} requests: {seconds:.1f} s, {seconds / len(answers):.2f} s a clip; "
        f"an answer after {waits[len(waits) // 2]:.1f} s (median), {waits[-1]:.1f} s at most"
    )
    assert len(answers) == CLIENTS * REQUESTS
    for wanted, (clip, seed, recipe, wav), _ in answers:
        video = clip if isinstance(clip, str) else clip["video"]
        assert seed == wanted["seed"] and Path(wav).stat().st_size > 44
        for found in (recipe, read_recipe(video)):
            assert (found["class"], str(found["seed"])) == (wanted["class_label"], wanted["seed"])
    assert len({Path(clip_of(answer)).read_bytes() for _, answer, _ in answers}) == len(answers)
    for wanted, answer, _ in answers[:: max(1, len(answers) // 3)]:  # same seed, same bytes, also under load
        alone = client.predict(**wanted, **WORK, api_name="/generate")
        for one, other in ((clip_of(alone), clip_of(answer)), (alone[3], answer[3])):
            assert Path(one).read_bytes() == Path(other).read_bytes()
