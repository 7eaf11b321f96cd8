"""What ``python -m avdit evaluate`` measures, on held-out seeds."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from avdit.data.scenes import HELD_OUT, render_clip
from avdit.evaluation.codecs import evaluate_codecs
from avdit.evaluation.copies import copy_scores
from avdit.evaluation.extractors import audio_features, video_features
from avdit.evaluation.judge import Judges, judges_of, load_beats
from avdit.evaluation.measure import Instruments, Measured, event_classes, look, measure
from avdit.evaluation.scores import CEILING, alignment_scores, class_scores, distance_scores, drift, loudness_scores
from avdit.evaluation.sync import Onsets
from avdit.evaluation.tasks import GIVEN, TASKS, Sample, Sampling, made, rendered, through_codecs
from avdit.generate import DEFAULT_CHECKPOINT, whole
from avdit.machine import fast_precision
from avdit.pipeline import AVDiTPipeline

PARTS = ("codecs", "quality", "sync", "copies")
ALL_JUDGES = DEFAULT_CHECKPOINT.parent / "judges"  # a folder of judges for every pack
DEFAULT_JUDGES = ALL_JUDGES / "landscape"


@dataclass(frozen=True)
class Settings:
    """What is measured, over how many clips of every class, and with what."""

    clips: int = 4
    pack: str | None = None  # whose classes; the pipeline's first where it is left out
    parts: tuple[str, ...] = PARTS
    sampling: Sampling = Sampling()
    training_clips: int = 16  # of every class, among which copies are looked for
    judges: Path | None = None  # others than those of ALL_JUDGES that know the classes
    video_features: Path | None = None  # TorchScript archives in place of our own features
    audio_features: Path | None = None

    def classes(self, packs: dict[str, list[str]]) -> list[str]:
        """The classes that are measured, of the pipeline's ``packs``, once all settings are found right.

        Raises:
            ValueError: with one sentence that names the value and what would be right.
        """
        if self.pack is not None and self.pack not in packs:
            raise ValueError(f"unknown pack {self.pack!r}: choose one of {', '.join(packs)}")
        classes, sampling = packs[self.pack or next(iter(packs))], self.sampling
        whole(self.clips, "--clips", 1, 100_000)
        whole(self.training_clips, "--training-clips", 1, 1_000_000)
        whole(sampling.windows, "--windows", 2, 1000)
        whole(sampling.batch, "--batch", 1, 1024)
        if sampling.task not in TASKS:
            raise ValueError(f"unknown task {sampling.task!r}: choose one of {', '.join(TASKS)}")
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
        sampling.request(classes[0]).validate(classes)
        return classes


def evaluate(pipe: AVDiTPipeline, settings: Settings) -> dict[str, Any]:
    """Measure a pipeline.

    Three sets of clips, ``settings.clips`` of every class each, are looked at in the same way: held-out renders (the
    reference), other held-out renders through the codecs (the floor), and what the model makes. A task that is given
    something is given that of the floor's clips.

    Returns:
        ``clips``, ``settings``, and what ``settings.parts`` ask for: ``video`` and ``audio`` of the codecs,
        ``class_accuracy``, ``fvd``, ``kvd``, ``fad``, ``sync``, with it ``loudness`` where a picture is given, and
        ``copies``. Of a continuation these are the last window's, and ``first_window`` holds the first one's.

    Raises:
        ValueError: for settings, judges or feature networks that cannot be used, before anything is made.
    """
    classes, clips = settings.classes(pipe.packs), settings.clips
    sampling = settings.sampling.resolved(pipe, classes[0])
    settings = replace(settings, sampling=sampling)
    quality, sync, copies = ("quality" in settings.parts, "sync" in settings.parts, "copies" in settings.parts)
    tools = Instruments(pipe.geometry, classes, pipe.device, thumbnails=copies)
    known = settings.judges or judges_of(ALL_JUDGES, classes)
    if sync:
        tools.timing = (load_beats(known, pipe.geometry) if known else None) or Onsets(pipe.geometry)
    if quality:
        if known is None:
            raise ValueError(f"no judges know the classes {', '.join(classes)}: name their folder with --judges")
        tools.judges = Judges.load(known, pipe.device)
        tools.judges.check(classes)
        if settings.video_features is not None:
            tools.video = video_features(settings.video_features, pipe.device)
        if settings.audio_features is not None:
            tools.audio = audio_features(settings.audio_features, pipe.device)
    precision = fast_precision(pipe.device)
    pack = settings.pack or next(iter(pipe.packs))
    report: dict[str, Any] = {"clips": clips, "pack": pack, "settings": told(settings, precision, pipe.device)}
    reference, others = (range(HELD_OUT + start, HELD_OUT + start + clips) for start in (0, clips))
    if "codecs" in settings.parts:
        report |= evaluate_codecs(pipe, [render_clip(name, seed) for name in classes for seed in reference], precision)
    if not (quality or sync or copies):
        return report

    # Synchrony alone needs the event classes' clips and no others.
    asked = classes if quality or copies else event_classes(classes)
    if clips * len(event_classes(classes)) < 2:
        raise ValueError(f"--clips {clips} is too few for one class: distances and shuffling need 2 clips or more")
    total = clips * len(asked)
    real = measure(rendered(asked, reference, pipe), tools, "held-out clips", total) if quality else Measured()
    rebuilt = (through_codecs(pipe, sample, precision) for sample in rendered(asked, others, pipe))
    codec = measure(rebuilt, tools, "through the codecs", total)
    ours, first = Measured(), Measured()
    clips_made = made(pipe, sampling, asked, clips, others.start, precision)
    for sample in tqdm(clips_made, "generated", total, mininterval=10, ncols=100):
        look(sample, tools, ours)
        if sample.first is not None:
            look(Sample(sample.label, *sample.first), tools, first)
    given = GIVEN.get(sampling.task)

    def figures(clips: Measured) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if quality:
            found["class_accuracy"] = class_scores(clips, real, codec, classes, given)
            found |= distance_scores(clips, real, codec, tools, given)
        if sync:
            found["sync"] = alignment_scores(clips, codec, tools)
            if given == "video":
                found["loudness"] = loudness_scores(clips, codec)
        return found

    report |= figures(ours)
    if first.labels:
        report["first_window"] = figures(first)
        report["drift"] = drift(report["first_window"], report)
    if copies:
        report["copies"] = check_copies(pipe, settings, tools, ours, codec, given, precision)
    return report


def check_copies(
    pipe: AVDiTPipeline,
    settings: Settings,
    tools: Instruments,
    ours: Measured,
    codec: Measured,
    given: str | None,
    precision: torch.autocast,
) -> dict[str, Any]:
    """The nearest-neighbour check against training clips, which are rendered again from their seeds."""
    tools = Instruments(tools.geometry, tools.classes, tools.device, thumbnails=True)
    classes, count, known = tools.classes, settings.training_clips, min(settings.clips, settings.training_clips)
    training = measure(rendered(classes, range(count), pipe), tools, "training clips", count * len(classes))
    rebuilt = (through_codecs(pipe, sample, precision) for sample in rendered(classes, range(known), pipe))
    true = measure(rebuilt, tools, "training clips through the codecs", known * len(classes))
    scores = {
        kind: None if kind == given else copy_scores(ours, codec, true, training, kind) for kind in ("video", "audio")
    }
    return scores | {"training_clips": len(training.labels), "clips": len(ours.labels)}


def told(settings: Settings, precision: torch.autocast, device: torch.device) -> dict[str, Any]:
    """The settings as the report states them."""
    with precision:
        fast = torch.is_autocast_enabled(device.type)
    sampling = asdict(settings.sampling)
    windows = sampling.pop("windows")
    return {
        **sampling,
        **({"windows": windows} if settings.sampling.task == "continuation" else {}),
        "first_seed": 0,
        "held_out_from": HELD_OUT,
        "reference": "rendered held-out clips",
        "codec_floor": "other held-out clips through the codecs",
        "ceiling": CEILING,
        "threads": torch.get_num_threads(),
        "precision": "bfloat16" if fast else "float32",
    }


def table(report: dict[str, Any]) -> str:
    """The report for a reader: a line a figure, with its floor and its ceiling beside it."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows: list[tuple[str, ...]] = []

    def add(name: str, value: Any, floor: Any = None, ceiling: Any = None, note: str = "") -> None:
        rows.append((name, cell(value), cell(floor), cell(ceiling), note))

    def figures(found: dict[str, Any], prefix: str = "") -> None:
        if scores := found.get("class_accuracy"):
            for kind in ("video", "audio"):
                note = f"{scores['clips']} clips; judge on renders {cell(scores[f'judge_{kind}'])}"
                floor = scores[f"codec_floor_{kind}"]
                add(f"{prefix}class accuracy, {kind}", scores[kind], floor, scores["chance"], note)
        for name in ("fvd", "kvd", "fad"):
            if scores := found.get(name):
                note = f"{scores['clips']} clips; {scores['features']}"
                add(prefix + name.upper(), scores["value"], scores["codec_floor"], scores["ceiling"], note)
        if scores := found.get("sync"):
            note = f"{scores['samples']} clips of {', '.join(scores['by_class'])}; {scores['timing']}"
            add(f"{prefix}within 100 ms", scores["within_100ms"], scores["codec_floor"], scores["shuffled"], note)
            floor = scores["av_align_codec_floor"]
            add(f"{prefix}AV-Align", scores["av_align"], floor, scores["av_align_shuffled"], note)
        if scores := found.get("loudness"):
            note = f"{scores['clips']} clips; correlation over time with the picture's own sound"
            add(f"{prefix}loudness", scores["value"], scores["codec_floor"], scores["shuffled"], note)

    figures(report)
    figures(report.get("first_window", {}), "first window: ")
    for name, change in report.get("drift", {}).items():
        add(f"drift of {name}", change)
    for kind in ("video", "audio"):
        if scores := report.get("copies", {}).get(kind):
            note = f"nearest of {report['copies']['training_clips']} training clips"
            add(f"copies, {kind}", scores["share"], scores["held_out_share"], scores["true_copy_share"], note)
    settings = report["settings"]
    how = f"{settings['task']}, {settings['steps']} steps of {settings['sampler']}, guidance {settings['guidance']:g}"
    how += f", of each other {settings['joint_guidance']:g}"
    if settings["task"] == "continuation":
        how += f", window {settings['windows']}"
    lines = [f"{report['clips']} clips of each class of {report['pack']}; {how}"]
    if rows:
        rows.insert(0, ("", "model", "codec floor", "ceiling", ""))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in (1, 2, 3)), row[4]]
            lines.append("  ".join(cells).rstrip())
    for part, name in (("video", "video codec"), ("audio", "audio codec")):
        if part in report:
            lines.append(f"{name}: " + ", ".join(f"{key} {cell(value)}" for key, value in report[part].items()))
    return "\n".join(lines)
