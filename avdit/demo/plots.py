"""Sound and motion over one time axis, so that synchrony can be seen."""

import numpy as np
from matplotlib.figure import Figure

from avdit.evaluation.align import sound_peaks
from avdit.generate import Result

GREY = "#708090"  # can be read on the light page and on the dark one


def motion(frames: np.ndarray) -> np.ndarray:
    """Mean change (F - 1,) from frame to frame of ``frames`` (F, H, W, 3)."""
    return np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))


def synchrony_figure(result: Result) -> Figure:
    """Spectrogram above, motion and loudness below, the sound's onsets, as AV-Align counts them, through both."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained", facecolor="none")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for axes in (top, low):
        axes.set_facecolor("none")
        axes.tick_params(colors=GREY)
        axes.spines[:].set_color(GREY)
    seconds = len(result.frames) / result.fps

    floor = 1e-5 * np.random.default_rng(0).standard_normal(len(result.audio))  # silence has no logarithm
    top.specgram(result.audio + floor, NFFT=512, Fs=result.sampling_rate, noverlap=384, vmin=-110, vmax=-30)
    top.set_ylabel("Hz", color=GREY)
    top.set_title("Sound, motion and onsets", loc="left", fontsize="medium", color=GREY)

    hop = result.sampling_rate // 50
    blocks = result.audio[: len(result.audio) // hop * hop].reshape(-1, hop)
    loudness = np.sqrt((blocks**2).mean(1))
    for values, times, name in (
        (motion(result.frames), np.arange(1, len(result.frames)) / result.fps, "motion"),
        (loudness, (np.arange(len(loudness)) + 0.5) * hop / result.sampling_rate, "loudness"),
    ):
        low.plot(times, values / max(values.max(initial=0), 1e-6), label=name)
    for i, time in enumerate(sound_peaks(result.audio, result.sampling_rate)):
        top.axvline(time, color="white", linestyle=":", linewidth=1)
        low.axvline(time, color=GREY, linestyle=":", linewidth=1, label="onset" if i == 0 else None)

    low.set_xlim(0, seconds)
    low.set_ylim(-0.05, 1.5)  # the legend above the lines
    low.set_yticks([])
    low.set_xlabel("seconds", color=GREY)
    low.legend(loc="upper right", frameon=False, fontsize="small", ncols=3, labelcolor=GREY)
    return figure
