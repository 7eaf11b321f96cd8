"""AV-Align: flow of a known motion, onsets of known sounds, and clips whose truth is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avdit.evaluation.align import av_align, optical_flow, picture_peaks, sound_peaks


@pytest.fixture(scope="module")
def texture():
    """A smooth random picture (1, 1, 160, 160) in [0, 255]."""
    noise = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(noise, (160, 160), mode="bicubic", align_corners=False).clamp(0, 255)


@pytest.mark.parametrize("shift", [(3, -2), (9, 6), (0, 0)])
def test_flow_of_a_shifted_picture(texture, shift):
    dx, dy = shift
    before, after = texture[..., 16:144, 16:144], texture[..., 16 - dy : 144 - dy, 16 - dx : 144 - dx]
    flow = optical_flow(before, after)[0, :, 24:-24, 24:-24]
    assert flow.mean((1, 2)).tolist() == pytest.approx([dx, dy], abs=0.25)
    assert flow.std((1, 2)).max() < 0.6


def test_motion_peaks_where_a_picture_jumps(texture):
    places = [0, 0, 0, 4, 4, 4, 4, 10, 10, 10]  # it moves at frames 3 and 7
    frames = np.stack([texture[0, 0, 16:112, 16 - dx : 112 - dx].numpy() for dx in places])[..., None] / 255
    assert picture_peaks(frames.repeat(3, -1), fps=10) == pytest.approx([0.3, 0.7])


def test_onsets_of_two_clicks_and_of_silence():
    audio = np.zeros(25600, np.float32)
    for start in (6400, 16000):
        audio[start : start + 800] += np.sin(np.arange(800) * 0.4) * np.exp(-np.arange(800) / 200)
    assert sound_peaks(audio, 16000) == pytest.approx([0.4, 1.0], abs=0.05)
    assert sound_peaks(np.zeros(25600, np.float32), 16000) == []


def test_peaks_that_meet_over_peaks_in_all():
    assert av_align([0.4, 1.0], [0.45, 1.0], fps=10) == 1
    assert av_align([0.4, 1.0], [0.5, 1.0, 1.3], fps=10) == pytest.approx(1 / 4)  # a whole frame apart is too far
    assert av_align([0.4], [], fps=10) == av_align([], [], fps=10) == 0
