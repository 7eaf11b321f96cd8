"""Whether generated clips are copies of training clips: the distance to the nearest of them, beside that of clips
which cannot be copies (held-out ones) and of clips which are (training clips through the codecs)."""

import numpy as np

from avdit.evaluation.measure import Measured


def nearest(clips: np.ndarray, labels: list[str], training: np.ndarray, training_labels: list[str]) -> np.ndarray:
    """Root mean square difference (n,) of each thumbnail (n, d) to the nearest training thumbnail of its class."""
    of = np.array(training_labels)
    return np.array(
        [np.sqrt(np.square(training[of == name] - row).mean(1)).min() for row, name in zip(clips, labels, strict=True)]
    )


def copy_scores(made: Measured, held_out: Measured, copies: Measured, training: Measured, kind: str) -> dict:
    """The nearest-neighbour check of one modality.

    Distances are told as multiples of the held-out clips' median in the same class, for nights differ less than
    fires. A clip counts as a copy where it lies nearer than half way from the true copies to the held-out clip that
    happens to come closest.

    Returns:
        ``share`` of copies among ``made``; ``held_out_share`` and ``true_copy_share``, what the limit says of clips
        whose truth is known; the median distances ``median`` and ``true_copy_median``; the smallest ones ``closest``
        and ``held_out_closest``; ``limit``.
    """

    def distances(clips: Measured) -> np.ndarray:
        table, known = (np.stack(x.thumbnails if kind == "video" else x.sound_thumbnails) for x in (clips, training))
        return nearest(table, clips.labels, known, training.labels)

    others, of = distances(held_out), np.array(held_out.labels)
    scale = {name: np.median(others[of == name]) for name in held_out.labels}

    def relative(found: np.ndarray, clips: Measured) -> np.ndarray:
        return found / np.array([scale[name] for name in clips.labels])

    ours, true = (relative(distances(clips), clips) for clips in (made, copies))
    others = relative(others, held_out)
    limit = (np.median(true) + max(others.min(), np.median(true))) / 2
    return {
        "share": float((ours < limit).mean()),
        "held_out_share": float((others < limit).mean()),
        "true_copy_share": float((true < limit).mean()),
        "median": round(float(np.median(ours)), 4),
        "true_copy_median": round(float(np.median(true)), 4),
        "closest": round(float(ours.min()), 4),
        "held_out_closest": round(float(others.min()), 4),
        "limit": round(float(limit), 4),
    }
