"""Folders of mp4 files become clips; odd files are skipped and named."""

import logging
from pathlib import Path

import ffmpeg
import numpy as np
import pytest

from avdit.data.clips import label_of, scan_clips
from avdit.geometry import ClipGeometry
from avdit.media import write_clip

GEOMETRY = ClipGeometry(height=64, width=64)


def film(path: Path, clips: float, click: float | None = None) -> Path:
    """A film of ``clips`` clips; each frame is brighter than the one before, and one click sounds."""
    frames = round(clips * GEOMETRY.frames)
    grey = np.linspace(0.1, 0.9, frames, dtype=np.float32)
    audio = np.zeros(GEOMETRY.samples_of(frames), np.float32)
    if click is not None:
        start = round(click * GEOMETRY.sampling_rate)
        audio[start : start + 320] = 0.8 * np.sin(np.arange(320) * 0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.broadcast_to(grey[:, None, None, None], (frames, 48, 80, 3))
    return write_clip(path, pictures, audio, fps=GEOMETRY.fps, sampling_rate=GEOMETRY.sampling_rate)


def test_labels_of_both_data_sets():
    assert label_of(Path("landscape/train/squishing_water/x_1.mp4")) == "squishing water"
    assert label_of(Path("aist/gMH_sBM_c01_d22_mMH0_ch01.mp4")) == "middle hip-hop"
    assert label_of(Path("aist/gBR_sBM_cAll_d04_mBR0_ch01.mp4")) == "break"
    assert label_of(Path("thunder/gXX_1.mp4")) == "thunder"


def test_film_is_cut_into_clips(tmp_path):
    film(tmp_path / "thunder" / "a.mp4", 2.5, click=2.4)  # 0.8 s into the second clip
    scan = scan_clips(tmp_path, GEOMETRY)
    clips = list(scan)
    assert [label for label, _, _ in clips] == ["thunder", "thunder"]
    assert scan.skipped == []
    for _, frames, audio in clips:
        assert frames.shape == (16, 64, 64, 3)
        assert audio.shape == (GEOMETRY.samples,)
    brightness = np.concatenate([frames.mean((1, 2, 3)) for _, frames, _ in clips])
    np.testing.assert_allclose(brightness, np.linspace(0.1, 0.9, 40)[:32], atol=0.03)  # every frame once, in order
    assert np.abs(clips[0][2]).max() < 0.1
    onset = np.argmax(np.abs(clips[1][2]) > 0.2) / GEOMETRY.sampling_rate
    assert onset == pytest.approx(0.8, abs=0.05)


def test_clips_are_drawn_over_all_files(tmp_path):
    for i in range(2):
        film(tmp_path / "thunder" / f"{i}.mp4", 2 + 0.5 * i)
    (tmp_path / "thunder" / "letter.mp4").write_text("not a film")
    scan = scan_clips(tmp_path, GEOMETRY)
    in_order = [frames.mean() for _, frames, _ in scan]
    drawn = [frames.mean() for _, frames, _ in scan.drawn(0)]
    assert len(drawn) == 4 and sorted(drawn) == sorted(in_order) and drawn != in_order
    assert [path.name for path, _ in scan.skipped] == ["letter.mp4"]


def test_clip_of_exactly_one_length_is_kept(tmp_path):
    film(tmp_path / "raining" / "a.mp4", 1)
    assert len(list(scan_clips(tmp_path, GEOMETRY))) == 1


def test_odd_files_are_skipped_and_told_once(tmp_path, caplog):
    film(tmp_path / "thunder" / "good.mp4", 1)
    film(tmp_path / "thunder" / "short.mp4", 0.5)
    (tmp_path / "thunder" / "letter.mp4").write_text("not a film")
    (tmp_path / "thunder" / "notes.txt").write_text("not looked at")
    silent = ffmpeg.input("testsrc=size=64x64:rate=10:duration=2", f="lavfi")
    silent.output(str(tmp_path / "thunder" / "silent.mp4")).run(quiet=True)
    film(tmp_path / "cooking" / "other.mp4", 1)
    scan = scan_clips(tmp_path, GEOMETRY, classes=["thunder"])
    with caplog.at_level(logging.WARNING, logger="avdit"):
        assert len(list(scan)) == 1
    reasons = {path.name: reason for path, reason in scan.skipped}
    assert set(reasons) == {"short.mp4", "letter.mp4", "silent.mp4", "other.mp4"}
    assert "shorter" in reasons["short.mp4"]
    assert "no sound" in reasons["silent.mp4"]
    assert "cooking" in reasons["other.mp4"]
    assert len(caplog.records) == 1


def test_folder_that_holds_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no mp4"):
        scan_clips(tmp_path, GEOMETRY)
    with pytest.raises(ValueError, match="not a folder"):
        scan_clips(tmp_path / "nowhere", GEOMETRY)
