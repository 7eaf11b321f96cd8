"""Sound and motion over one time axis, so that synchrony can be seen."""

import numpy as np
from matplotlib.figure import Figure

from avdit.generate import Result


def synchrony_figure(result: Result) -> Figure:
    """Spectrogram above, motion (mean change between frames) and loudness below."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    seconds = len(result.frames) / result.fps
    top.specgram(result.audio + 1e-9 * np.arange(len(result.audio)), NFFT=512, Fs=result.sampling_rate, noverlap=384)
    top.set_ylabel("Hz")
    motion = np.abs(np.diff(result.frames, axis=0)).mean((1, 2, 3))
    hop = result.sampling_rate // 50
    blocks = result.audio[: len(result.audio) // hop * hop].reshape(-1, hop)
    loudness = np.sqrt((blocks**2).mean(1))
    for values, times, name in (
        (motion, np.arange(1, len(result.frames)) / result.fps, "motion"),
        (loudness, (np.arange(len(loudness)) + 0.5) / 50, "loudness"),
    ):
        low.plot(times, values / max(values.max(), 1e-6), label=name)
    low.set_xlim(0, seconds)
    low.set_yticks([])
    low.set_xlabel("seconds")
    low.legend(loc="upper right", frameon=False, fontsize="small")
    return figure
