"""Figures from measured sets of clips: each of the model's beside its codec floor and its ceiling."""

from typing import Any

import numpy as np

from avdit.evaluation.align import av_align
from avdit.evaluation.frechet import frechet_distance, kernel_distance
from avdit.evaluation.measure import Instruments, Measured, event_classes
from avdit.evaluation.sync import rises_alike, sync_scores, within

CEILING = "held-out clips of every second class against those of the others: a model that makes the wrong classes"
DISTANCES = {
    "fvd": ("video", frechet_distance),
    "kvd": ("video", kernel_distance),
    "fad": ("audio", frechet_distance),
}


def class_scores(made: Measured, real: Measured, codec: Measured, classes: list[str], given: str | None) -> dict:
    """Share of clips that the judges name as their class; ``judge_…`` is their own accuracy on held-out renders."""
    scores: dict[str, Any] = {}
    for kind in ("video", "audio"):
        scores[kind] = None if kind == given else round(made.accuracy(kind), 4)
        scores[f"judge_{kind}"] = round(real.accuracy(kind), 4)
        scores[f"codec_floor_{kind}"] = round(codec.accuracy(kind), 4)
    scores |= {"chance": round(1 / len(classes), 4), "clips": len(made.labels), "by_class": {}}
    for name in classes:
        rows = [i for i, label in enumerate(made.labels) if label == name]
        scores["by_class"][name] = {
            kind: None if kind == given else round(float(np.mean([named[i] == name for i in rows])), 4)
            for kind, named in (("video", made.seen_as), ("audio", made.heard_as))
        }
    return scores


def distance_scores(
    made: Measured, real: Measured, codec: Measured, tools: Instruments, given: str | None
) -> dict[str, dict[str, Any]]:
    """``fvd``, ``kvd`` and ``fad`` against rendered held-out clips.

    The floor is that of *other* held-out clips through the codecs, so that it holds the error of the sample as the
    value does. There is no ceiling where there is one class, and no value for what the task was given.
    """
    clip, scores = tools.geometry, {}
    parted = set(tools.classes[::2]), set(tools.classes[1::2])
    for name, (kind, distance) in DISTANCES.items():
        features = getattr(tools, kind)
        if features is None:
            default = tools.judges.statistics if kind == "video" else tools.judges.sound
            source, settings = default.name, {"size": default.size} if kind == "video" else {}
        else:
            source, settings = features.name, features.settings
        rate = {"fps": clip.fps, "frames": clip.frames} if kind == "video" else {"sampling_rate": clip.sampling_rate}
        sets = [real.features(kind, part) for part in parted if part]
        wrong = distance(*sets) if len(sets) == 2 and min(map(len, sets)) > 1 else None
        value = None if kind == given else distance(real.features(kind), made.features(kind))
        scores[name] = {
            "value": value,
            "codec_floor": distance(real.features(kind), codec.features(kind)),
            "ceiling": wrong,
            "features": source,
            "dimensions": int(real.features(kind).shape[1]),
            "clips": len(made.labels),
            "reference_clips": len(real.labels),
            **settings,
            **rate,
            "factor": 1,  # some published tables multiply theirs by 100 or 1,000
        }
    return scores


def aligned(clips: Measured, fps: int, shift: int = 0) -> float:
    """Mean AV-Align of the event clips, each with the sound of the one ``shift`` places before it."""
    sounds = clips.onsets[-shift:] + clips.onsets[:-shift] if shift else clips.onsets
    return float(np.mean([av_align(heard, seen, fps) for heard, seen in zip(sounds, clips.motion, strict=True)]))


def alignment_scores(made: Measured, codec: Measured, tools: Instruments) -> dict[str, Any]:
    """Synchrony of the event clips; the ceilings have their sounds exchanged for those of other clips.

    Raises:
        ValueError: for fewer than two clips, which cannot be shuffled.
    """
    fps, classes, timing = tools.geometry.fps, event_classes(tools.classes), tools.timing
    by_class = {}
    for name in classes:
        rows = [i for i, label in enumerate(made.events) if label == name]
        by_class[name] = within(timing, [made.seen[i] for i in rows], [made.heard[i] for i in rows])
    return {
        **sync_scores(timing, made.seen, made.heard),
        "codec_floor": within(timing, codec.seen, codec.heard),
        "timing": timing.name,
        "av_align": round(aligned(made, fps), 4),
        "av_align_shuffled": round(aligned(made, fps, 1), 4),
        "av_align_codec_floor": round(aligned(codec, fps), 4),
        "by_class": by_class,
        "samples": len(made.seen),
    }


def loudness_scores(made: Measured, codec: Measured) -> dict[str, Any]:
    """How the loudness of sounds that were made for pictures follows that of the pictures' own: mean correlation.

    Any class can be asked, also those in which many small things are heard. The ceiling has the sounds exchanged for
    those of other clips of their class; the own ones are as the codec keeps them, so that the floor is 1.
    """
    rows = {name: [i for i, label in enumerate(made.labels) if label == name] for name in dict.fromkeys(made.labels)}

    def mean(some: list[int], shift: int) -> float:
        others = some[shift:] + some[:shift]
        pairs = zip(some, others, strict=True)
        return round(float(np.mean([rises_alike(made.loudness[i], codec.loudness[k]) for i, k in pairs])), 4)

    whole = {shift: float(np.mean([mean(some, shift) for some in rows.values()])) for shift in (0, 1)}
    return {
        "value": round(whole[0], 4),
        "codec_floor": 1.0,
        "shuffled": round(whole[1], 4) if min(map(len, rows.values())) > 1 else None,
        "by_class": {name: mean(some, 0) for name, some in rows.items()},
        "clips": len(made.labels),
    }


def drift(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
    """What a stream's last window has lost against its first: differences of shares, ratios of distances."""
    changes = {}
    if "class_accuracy" in first:
        for kind in ("video", "audio"):
            change = last["class_accuracy"][kind] - first["class_accuracy"][kind]
            changes[f"class accuracy, {kind} (difference)"] = round(change, 4)
        for name in ("fvd", "fad"):  # the kernel's distance may be 0 or below: it has no ratio
            changes[f"{name.upper()} (ratio)"] = round(last[name]["value"] / first[name]["value"], 4)
    if "sync" in first:
        for key, text in (("within_100ms", "within 100 ms"), ("av_align", "AV-Align")):
            changes[f"{text} (difference)"] = round(last["sync"][key] - first["sync"][key], 4)
    return changes
