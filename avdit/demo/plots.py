"""Sound and motion over one time axis, so that synchrony can be seen."""

import numpy as np
from matplotlib.figure import Figure

from avdit.demo.looks import AXIS
from avdit.evaluation.align import sound_peaks
from avdit.generate import Result

STAGE, INK = "#0b1220", "#cbd5e1"  # dark on the light page, too, like the player above


def motion(frames: np.ndarray) -> np.ndarray:
    """Mean change (F - 1,) from frame to frame of ``frames`` (F, H, W, 3)."""
    return np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))


def synchrony_figure(result: Result) -> Figure:
    """Spectrogram above, motion and loudness below, the sound's onsets, as AV-Align counts them, through both."""
    figure = Figure(figsize=(5, 2.4), dpi=200, facecolor=STAGE)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.subplots_adjust(left=AXIS[0], right=AXIS[1], top=0.97, bottom=0.16, hspace=0.08)
    for axes in (top, low):
        axes.set_facecolor(STAGE)
        axes.tick_params(colors=INK, labelsize=8, length=2)
        axes.spines[:].set_color("#475569")
    seconds = len(result.frames) / result.fps

    floor = 1e-5 * np.random.default_rng(0).standard_normal(len(result.audio))  # silence has no logarithm
    sound = {"NFFT": 512, "noverlap": 384, "vmin": -110, "vmax": -30, "cmap": "magma"}
    top.specgram(result.audio + floor, Fs=result.sampling_rate, **sound)
    top.set_yticks([0, 4000, 8000], ["0", "4", "kHz"])
    top.tick_params(axis="x", length=0)

    hop = result.sampling_rate // 50
    blocks = result.audio[: len(result.audio) // hop * hop].reshape(-1, hop)
    loudness = np.sqrt((blocks**2).mean(1))
    for values, times, name, colour in (
        (motion(result.frames), np.arange(1, len(result.frames)) / result.fps, "motion", "#2dd4bf"),
        (loudness, (np.arange(len(loudness)) + 0.5) * hop / result.sampling_rate, "loudness", "#fbbf24"),
    ):
        low.plot(times, values / max(values.max(initial=0), 1e-6), label=name, color=colour, linewidth=1.2)
    for i, time in enumerate(sound_peaks(result.audio, result.sampling_rate)):
        for axes in (top, low):
            label = "onset" if i == 0 else None
            axes.axvline(time, color="white", linestyle=":", linewidth=0.8, alpha=0.8, label=label)

    low.set_xlim(0, seconds)
    low.set_ylim(-0.05, 1.7)  # the legend above the lines
    low.set_yticks([])
    low.set_xlabel("seconds", color=INK, fontsize=8, labelpad=1)
    low.legend(loc="upper right", frameon=False, fontsize=8, ncols=3, labelcolor=INK, borderaxespad=0.1)
    return figure
