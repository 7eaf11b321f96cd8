"""Clips written to and read from real files, with the real ffmpeg."""

import resource
import wave
from pathlib import Path

import ffmpeg
import numpy as np
import pytest
from PIL import Image

from avdit import media
from avdit.live import LiveEncoder
from avdit.media import MediaError

FPS, RATE, FRAMES, SIZE = 10, 16000, 16, 64
SAMPLES = FRAMES * RATE // FPS


def picture(frames: int = FRAMES, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A smooth picture (F, H, W, 3) whose colours drift from frame to frame."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    waves = [0.5 + 0.4 * np.sin(3 * x + 2 * t), 0.5 + 0.4 * np.cos(3 * y - t), 0.3 + 0.4 * x * y]
    return np.stack(waves, -1).astype(np.float32)


def click(at: float, samples: int = SAMPLES) -> np.ndarray:
    """Silence with one short tone burst ``at`` seconds."""
    audio = np.zeros(samples, np.float32)
    start = round(at * RATE)
    audio[start : start + 320] = 0.8 * np.sin(np.arange(320) * 2 * np.pi * 1000 / RATE)
    return audio


def write(path: Path, **options) -> Path:
    return media.write_clip(path, picture(), click(0.8), fps=FPS, sampling_rate=RATE, **options)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("clip") / "a clip, é.mp4", metadata={"seed": 7, "class": 'thünder "x"'})


def test_written_clip_plays_everywhere(clip):
    streams = {stream["codec_type"]: stream for stream in ffmpeg.probe(str(clip))["streams"]}
    assert streams["video"]["codec_name"] == "h264"
    assert streams["video"]["pix_fmt"] == "yuv420p"
    assert streams["audio"]["codec_name"] == "aac"
    assert int(streams["audio"]["sample_rate"]) == RATE
    assert int(streams["video"]["nb_frames"]) == FRAMES
    lengths = [float(streams[kind]["duration"]) for kind in ("video", "audio")]
    assert lengths[0] == pytest.approx(FRAMES / FPS, abs=1e-3)
    assert abs(lengths[0] - lengths[1]) < 1 / FPS
    raw = clip.read_bytes()
    assert 0 < raw.index(b"moov") < raw.index(b"mdat")


@pytest.mark.parametrize("samples", [0, SAMPLES // 2, SAMPLES * 2])
def test_sound_gets_the_length_of_the_picture(tmp_path, samples):
    audio = np.full(samples, 0.1, np.float32)
    path = media.write_clip(tmp_path / "c.mp4", picture(), audio, fps=FPS, sampling_rate=RATE)
    streams = {stream["codec_type"]: float(stream["duration"]) for stream in ffmpeg.probe(str(path))["streams"]}
    assert abs(streams["video"] - streams["audio"]) < 1 / FPS


def test_recipe_round_trip(clip):
    assert media.read_recipe(clip) == {"seed": 7, "class": 'thünder "x"'}


def test_clip_without_recipe(tmp_path):
    assert media.read_recipe(write(tmp_path / "c.mp4")) == {}


def test_frames_come_back(clip):
    frames = media.read_video(clip, fps=FPS, height=SIZE, width=SIZE)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert frames.dtype == np.float32
    assert -10 * np.log10(np.mean((frames - picture()) ** 2)) > 25


def test_click_keeps_its_time(clip):
    audio = media.read_audio(clip, sampling_rate=RATE)
    onset = np.argmax(np.abs(audio) > 0.2) / RATE
    assert onset == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("cause", ["no folder", "folder is a file", "target is a folder"])
def test_failed_write_leaves_nothing(tmp_path, cause):
    path = tmp_path / "clip.mp4"
    if cause == "no folder":
        path = tmp_path / "nowhere" / "clip.mp4"
    elif cause == "folder is a file":
        (tmp_path / "file").write_text("kept")
        path = tmp_path / "file" / "clip.mp4"
    else:
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MediaError, match="clip.mp4") as error:
        write(path)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the clip before")
    noise = np.random.default_rng(0).random((FRAMES, 128, 128, 3), np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the sound fits, the mp4 does not
    try:
        with pytest.raises(MediaError, match="clip.mp4"):
            media.write_clip(path, noise, click(0.8), fps=FPS, sampling_rate=RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [item.name for item in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"the clip before"


def test_any_video_is_brought_to_size_and_rate(tmp_path):
    path = tmp_path / "wide.mkv"
    source = "testsrc=size=321x180:rate=29.97:duration=2"
    ffmpeg.input(source, f="lavfi").output(str(path), vcodec="mpeg4").run(quiet=True)
    frames = media.read_video(path, fps=FPS, height=32, width=48)
    assert frames.shape[1:] == (32, 48, 3)
    assert len(frames) in (19, 20, 21)
    assert len(media.read_video(path, fps=FPS, height=32, width=48, max_frames=5)) == 5


def test_middle_of_the_picture_is_kept(tmp_path):
    frames = np.zeros((4, 64, 192, 3), np.float32)
    frames[:, :, 64:128] = 1  # white in the middle third
    path = media.write_clip(tmp_path / "c.mp4", frames, np.zeros(1), fps=FPS, sampling_rate=RATE)
    assert media.read_video(path, fps=FPS, height=64, width=64).mean() > 0.9


def test_sound_of_any_rate_and_channels(tmp_path):
    path = tmp_path / "stereo.wav"
    source = "sine=frequency=440:sample_rate=44100:duration=1"
    ffmpeg.input(source, f="lavfi").output(str(path), ac=2).run(quiet=True)
    audio = media.read_audio(path, sampling_rate=RATE)
    assert len(audio) == pytest.approx(RATE, abs=32)
    peak = np.argmax(np.abs(np.fft.rfft(audio))) * RATE / len(audio)
    assert peak == pytest.approx(440, abs=2)
    assert len(media.read_audio(path, sampling_rate=RATE, max_samples=1000)) == 1000


def test_silent_film_and_pictureless_sound(tmp_path):
    film, sound = tmp_path / "film.mp4", tmp_path / "sound.wav"
    ffmpeg.input("testsrc=size=64x64:rate=10:duration=1", f="lavfi").output(str(film)).run(quiet=True)
    media.write_wav(sound, click(0.2), RATE)
    with pytest.raises(MediaError, match="film.mp4"):
        media.read_audio(film, sampling_rate=RATE)
    with pytest.raises(MediaError, match="sound.wav"):
        media.read_video(sound, fps=FPS, height=SIZE, width=SIZE)


@pytest.mark.parametrize("content", [b"This is a letter, not a film.\n", b"", None])
def test_what_is_no_media_is_named(tmp_path, content):
    path = tmp_path / "letter.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (
        lambda: media.read_video(path, fps=FPS, height=SIZE, width=SIZE),
        lambda: media.read_audio(path, sampling_rate=RATE),
        lambda: media.read_image(path, height=SIZE, width=SIZE),
        lambda: media.read_recipe(path),
    ):
        with pytest.raises(MediaError, match="letter.mp4") as error:
            read()
        assert "\n" not in str(error.value)


def test_truncated_mp4_is_an_error_or_shorter(tmp_path, clip):
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip.read_bytes()[:600])  # ends within the index
    with pytest.raises(MediaError, match="cut.mp4"):
        media.read_video(path, fps=FPS, height=SIZE, width=SIZE)


def test_image_is_cut_to_the_middle(tmp_path):
    pixels = np.zeros((40, 120, 4), np.uint8)
    pixels[:, 40:80] = 255
    Image.fromarray(pixels, "RGBA").save(tmp_path / "i.png")
    image = media.read_image(tmp_path / "i.png", height=32, width=32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.float32
    assert image.mean() > 0.9


def test_wav_round_trip(tmp_path):
    media.write_wav(tmp_path / "s.wav", click(0.5), RATE)
    with wave.open(str(tmp_path / "s.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, SAMPLES)
    back = media.read_audio(tmp_path / "s.wav", sampling_rate=RATE)
    np.testing.assert_allclose(back, click(0.5), atol=1e-3)


def test_wav_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(MediaError, match="nowhere/a.wav could not be written"):
        media.write_wav(tmp_path / "nowhere" / "a.wav", click(0.5), RATE)


@pytest.mark.parametrize("part", ["picture", "sound"])
def test_values_that_are_no_numbers_are_refused(tmp_path, part):
    frames, audio = picture(), click(0.5)
    (frames if part == "picture" else audio)[3] = np.nan
    with pytest.raises(MediaError, match="not finite numbers"):
        media.write_clip(tmp_path / "c.mp4", frames, audio, fps=FPS, sampling_rate=RATE)
    assert not list(tmp_path.iterdir())


def test_segments_joined_end_to_end_are_one_stream(tmp_path):
    """A tone without a break, a mark that is seen when it is heard, whatever lengths the pieces have."""
    lengths, marked = [12, 12, 24, 12, 16], [6, 30, 50, 70]
    frames = np.tile(picture(1), (sum(lengths), 1, 1, 1)) * 0.5
    audio = 0.2 * np.sin(np.arange(len(frames) * RATE // FPS) * 2 * np.pi * 440 / RATE).astype(np.float32)
    for mark in marked:
        frames[mark] = 1
        audio[mark * RATE // FPS :][:320] *= 4
    encoder = LiveEncoder(fps=FPS, height=SIZE, width=SIZE, sampling_rate=RATE)
    segments, begin = [], 0
    for length in lengths:
        end = begin + length
        sound = audio[begin * RATE // FPS : end * RATE // FPS]
        segments.append(encoder.segment(frames[begin:end], sound, last=end == len(frames)))
        begin = end
    for number, segment in enumerate(segments):  # any of them can be the first that a player gets
        (tmp_path / f"{number}.ts").write_bytes(segment)
        seen = media.read_video(tmp_path / f"{number}.ts", fps=FPS, height=SIZE, width=SIZE)
        assert len(seen) == lengths[number]
    whole = tmp_path / "whole.ts"
    whole.write_bytes(b"".join(segments))
    seen = media.read_video(whole, fps=FPS, height=SIZE, width=SIZE)
    assert len(seen) == len(frames) and np.flatnonzero(seen.mean((1, 2, 3)) > 0.9).tolist() == marked
    streams = {stream["codec_type"]: float(stream["start_time"]) for stream in media.probe(whole)["streams"]}
    lead = round((streams["video"] - streams["audio"]) * RATE)  # the encoder's, before the picture begins
    heard = media.read_audio(whole, sampling_rate=RATE)[lead:][: len(audio)]
    assert len(heard) == len(audio)
    error = (heard - audio)[:, None].reshape(-1, RATE // FPS)  # a tenth of a second a row, joints among them
    assert np.sqrt(np.square(error).mean(1)).max() < 0.02


def test_segment_with_values_that_are_no_numbers_is_refused():
    encoder = LiveEncoder(fps=FPS, height=SIZE, width=SIZE, sampling_rate=RATE)
    with pytest.raises(MediaError, match="not finite numbers"):
        encoder.segment(picture() * np.nan, click(0.5))
