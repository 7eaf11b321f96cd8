"""Sound and motion over one time axis, so that synchrony can be seen."""

import numpy as np
from matplotlib.figure import Figure
from scipy.signal import find_peaks, stft

from avdit.generate import Result

HOP_SECONDS = 0.01  # of the onset curve
GAP_SECONDS = 0.08  # two onsets lie at least so far apart
GREY = "#708090"  # can be read on the light page and on the dark one


def motion(frames: np.ndarray) -> np.ndarray:
    """Mean change (F - 1,) from frame to frame of ``frames`` (F, H, W, 3)."""
    return np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))


def onsets(audio: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Times (n,) in seconds at which the spectrum of ``audio`` (samples,) rises at once: peaks of spectral flux."""
    hop = round(HOP_SECONDS * sampling_rate)
    if len(audio) < 4 * hop:
        return np.zeros(0)
    _, times, spectrum = stft(audio, sampling_rate, nperseg=4 * hop, noverlap=3 * hop)
    flux = np.diff(np.log1p(100 * np.abs(spectrum)), axis=1, prepend=0).clip(0).sum(0)
    flux[:2] = 0  # the clip's own start is no event
    height = flux.mean() + 2 * flux.std() + 1e-6
    peaks, _ = find_peaks(flux, height=height, distance=round(GAP_SECONDS / HOP_SECONDS))
    return times[peaks]


def synchrony_figure(result: Result) -> Figure:
    """Spectrogram above, motion and loudness below, the sound's onsets as lines through both."""
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
    for i, time in enumerate(onsets(result.audio, result.sampling_rate)):
        top.axvline(time, color="white", linestyle=":", linewidth=1)
        low.axvline(time, color=GREY, linestyle=":", linewidth=1, label="onset" if i == 0 else None)

    low.set_xlim(0, seconds)
    low.set_ylim(-0.05, 1.5)  # the legend above the lines
    low.set_yticks([])
    low.set_xlabel("seconds", color=GREY)
    low.legend(loc="upper right", frameon=False, fontsize="small", ncols=3, labelcolor=GREY)
    return figure
