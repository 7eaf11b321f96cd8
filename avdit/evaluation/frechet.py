"""Distances between the features of two sets of clips: Fréchet (FVD of pictures, FAD of sound) and kernel (KVD).

A feature extractor is any function from a batch of clips to one vector a clip, or to one a window of each clip, which
all count alike; so I3D, AudioCLIP, VGGish or a network of our own can stand behind the same formulas:

    extractor(frames (B, F, H, W, 3) in [0, 1]) -> (B, d) or (B, windows, d)        for FVD and KVD
    extractor(audio (B, samples) in [-1, 1]) -> (B, d) or (B, windows, d)           for FAD

Figures of different extractors, sizes or numbers of clips do not compare; a report names all three.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

Extractor = Callable[[torch.Tensor], torch.Tensor]
CLIPS = 2048  # of each set, in the field's protocol


def checked(real: np.ndarray, fake: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Both feature sets as float64.

    Raises:
        ValueError: where they are no finite tables (n, d) of one width with at least ``least`` rows each.
    """
    tables = []
    for name, features in (("real", real), ("generated", fake)):
        table = np.asarray(features, np.float64)
        if table.ndim != 2 or len(table) < least:
            raise ValueError(f"the {name} features are {table.shape}: give at least {least} rows (n, d)")
        if not np.isfinite(table).all():
            raise ValueError(f"the {name} features hold values that are not finite numbers")
        tables.append(table)
    if tables[0].shape[1] != tables[1].shape[1]:
        raise ValueError(f"features of {tables[0].shape[1]} and {tables[1].shape[1]} values do not compare")
    return tables[0], tables[1]


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Fréchet distance between normal distributions fitted to features (n, d) and (m, d) (Heusel et al. 2017).

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)). The last trace is the sum of the singular values of the product of
    the centred features, so no matrix root is taken, and fewer clips than values do no harm.

    Raises:
        ValueError: for features that do not compare.
    """
    real, fake = checked(real, fake)
    means = real.mean(0), fake.mean(0)
    # C = A^T A for A scaled; R of a QR decomposition gives the same C with at most d rows.
    a, b = (
        np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r") for x, mean in zip((real, fake), means, strict=True)
    )
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + np.square(a).sum() + np.square(b).sum() - 2 * cross)


def kernel_distance(real: np.ndarray, fake: np.ndarray, degree: int = 3) -> float:
    """Unbiased squared maximum mean discrepancy under (x·y / d + 1)^degree (Bińkowski et al. 2018); it may be below 0.

    Raises:
        ValueError: for features that do not compare.
    """
    real, fake = checked(real, fake)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** degree

    def among(x: np.ndarray) -> float:
        table = kernel(x, x)
        return (table.sum() - np.trace(table)) / (len(x) * (len(x) - 1))

    return float(among(real) + among(fake) - 2 * kernel(real, fake).mean())


def resized(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Frames (B, F, H, W, 3) at ``size`` x ``size``, antialiased: FVD is told at 64 and at 256 pixels."""
    if tuple(frames.shape[2:4]) == (size, size):
        return frames
    flat = frames.flatten(0, 1).movedim(-1, 1)
    flat = F.interpolate(flat, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return flat.movedim(1, -1).unflatten(0, frames.shape[:2])


def rows_of(features: torch.Tensor, clips: int) -> torch.Tensor:
    """An extractor's vectors of ``clips`` clips as rows (n, d).

    Raises:
        ValueError: where it gave anything but vectors of each clip.
    """
    if features.ndim not in (2, 3) or len(features) != clips:
        shape = tuple(features.shape)
        raise ValueError(f"the extractor gave {shape} for {clips} clips: it must give one vector a clip, or a window")
    return features.flatten(0, -2).float().cpu()


@torch.no_grad()
def features_of(clips: Iterable[np.ndarray], extractor: Extractor, batch: int = 8) -> np.ndarray:
    """Features (n, d) of clips that come one after another, ``batch`` at a time: frames (F, H, W, 3), or samples (n,).

    Raises:
        ValueError: where there is no clip, or the extractor gives anything but vectors of each clip.
    """
    parts, left = [], iter(clips)
    while some := list(islice(left, batch)):
        parts.append(rows_of(extractor(torch.from_numpy(np.stack(some)).float()), len(some)))
    if not parts:
        raise ValueError("there is no clip to take features of")
    return torch.cat(parts).numpy()


def video_distances(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """``fvd`` and ``kvd`` of the pictures' features (n, d) and (m, d)."""
    return {"fvd": frechet_distance(real, fake), "kvd": kernel_distance(real, fake)}


def audio_distance(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """``fad`` of the sounds' features (n, d) and (m, d)."""
    return {"fad": frechet_distance(real, fake)}
