"""Whether sound and picture of an event fall together, measured from samples and pixels alone."""

import numpy as np
import torch
import torch.nn.functional as F

EVENT_CLASSES = ("explosion", "splashing water", "thunder")  # whose clips hold events that are seen and heard
TOLERANCE = 0.1  # seconds: one frame


def sound_onset(audio: np.ndarray, sampling_rate: int, share: float = 0.4) -> float:
    """Seconds of the first rise of ``audio`` (samples,) that reaches ``share`` of its largest rise.

    The level of 30 ms after a moment is compared with that of 30 ms before it.
    """
    window = sampling_rate // 100
    blocks = torch.from_numpy(np.ascontiguousarray(audio, np.float32))[: len(audio) // window * window]
    level = blocks.view(-1, window).square().mean(1).sqrt()
    padded = F.pad(level[None], (3, 3), mode="replicate")[0].unfold(0, 3, 1).mean(-1)
    rise = padded[3 : 3 + len(level)] - padded[: len(level)]
    first = int((rise >= share * rise.max()).nonzero()[0])
    return (first + int(rise[first : first + 8].argmax())) * window / sampling_rate


def picture_onset(frames: np.ndarray, fps: int, block: int = 16, share: float = 0.5) -> float:
    """Seconds of the first of ``frames`` (F, H, W, 3) in which a block changes by ``share`` of the largest change.

    Blocks of ``block`` pixels, because ripples that spread from a splash change more pixels in all than the splash.
    """
    light = F.avg_pool2d(torch.from_numpy(np.ascontiguousarray(frames, np.float32)).mean(-1).unsqueeze(1), block)
    change = light.flatten(1).diff(dim=0).abs().amax(1)
    return (int((change >= share * change.max()).nonzero()[0]) + 1) / fps


def within(seen: list[float], heard: list[float], tolerance: float = TOLERANCE) -> float:
    """Share of events that are heard within ``tolerance`` seconds of being seen."""
    return float(np.mean(np.abs(np.array(seen) - np.array(heard)) <= tolerance + 1e-6))


def sync_scores(seen: list[float], heard: list[float]) -> dict[str, float]:
    """Scores of clips by their onsets: with their own sound, and as a ceiling with the sound of the clip before.

    Raises:
        ValueError: for fewer than two clips, which cannot be shuffled.
    """
    if len(seen) < 2:
        raise ValueError("synchrony is measured on two clips or more")
    return {"within_100ms": within(seen, heard), "shuffled": within(seen, heard[-1:] + heard[:-1])}
