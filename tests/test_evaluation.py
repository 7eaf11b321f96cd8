"""The measures: right on clips whose truth is known, and short of it where sound and picture part."""

import json
import subprocess
import sys

import numpy as np
import pytest

from avdit.data.scenes import HELD_OUT, render_clip
from avdit.evaluation.sync import EVENT_CLASSES, picture_onset, sound_onset, sync_scores, within
from avdit.generate import DEFAULT_CHECKPOINT

ROOT = DEFAULT_CHECKPOINT.parent.parent


@pytest.fixture(scope="module")
def rendered():
    clips = [render_clip(name, HELD_OUT + k) for name in EVENT_CLASSES for k in range(4)]
    return [(clip.frames.numpy(), clip.audio.numpy()) for clip in clips], [clip.events[0].time for clip in clips]


def test_rendered_events_are_in_time(rendered):
    clips, _ = rendered
    scores = sync_scores(clips, fps=10, sampling_rate=16000)
    assert scores["within_100ms"] >= 0.9 > 0.6 >= scores["shuffled"]


def test_late_sound_is_out_of_time(rendered):
    clips, _ = rendered
    late = [(frames, np.concatenate([audio[:1600].repeat(2)[:4000], audio[:-4000]])) for frames, audio in clips]
    assert sync_scores(late, fps=10, sampling_rate=16000)["within_100ms"] <= 0.5


def test_onsets_of_a_flash_and_a_click():
    frames, audio = np.zeros((16, 64, 64, 3), np.float32), np.zeros(25600, np.float32)
    frames[7:, 10:40, 10:40] = 1
    audio[11200:11500] = 0.5
    assert picture_onset(frames, 10) == pytest.approx(0.7)
    assert sound_onset(audio, 16000) == pytest.approx(0.7, abs=0.02)
    assert within([0.7, 0.7], [0.78, 0.9]) == 0.5


def test_codec_report_of_the_command(tiny_checkpoint):
    command = [sys.executable, "-m", "avdit", "evaluate", "--part", "codecs", "--clips", "1", "--json"]
    run = subprocess.run(
        [*command, "--checkpoint", str(tiny_checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = json.loads(run.stdout)
    assert said["clips"] == 1 and "sync" not in said
    assert 0 < said["video"]["psnr_db"] < 20 and said["audio"]["mel_l1"] > 0.5  # random weights keep little
    assert min(said["video"]["encode_ms"], said["video"]["decode_ms"], said["audio"]["decode_ms"]) > 0


def test_bench_accounts_for_a_clip(tiny_checkpoint):
    command = [sys.executable, "-m", "avdit", "bench", "--runs", "1", "--steps", "2", "--json"]
    run = subprocess.run(
        [*command, "--checkpoint", str(tiny_checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = json.loads(run.stdout)
    assert said["realtime_factor"] == pytest.approx(1.6 / said["seconds_per_clip"], rel=0.02)
    assert said["first_picture_s"] > said["seconds_per_clip"]
    assert said["stages"]["denoiser"]["floor_ms"] < said["stages"]["denoiser"]["median_ms"]
    assert said["peak_memory_mb"] > 100
