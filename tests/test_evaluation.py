"""The measures: right on clips whose truth is known, and short of it where sound and picture part."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avdit.cli import main
from avdit.data.scenes import CLASSES, GENRES, HELD_OUT, JUDGES, PACKS, render_clip
from avdit.evaluation.codecs import joint_step, spectral_distance
from avdit.evaluation.copies import copy_scores
from avdit.evaluation.judge import Judges, PictureJudge, SoundJudge, judges_of, load_beats
from avdit.evaluation.measure import Measured, picture_thumbnail
from avdit.evaluation.report import ALL_JUDGES
from avdit.evaluation.scores import loudness_scores
from avdit.evaluation.sync import EVENT_CLASSES, Onsets, loudness, picture_onset, sound_onset, sync_scores, within
from avdit.evaluation.tasks import Sampling, streamed
from avdit.generate import DEFAULT_CHECKPOINT
from avdit.geometry import ClipGeometry
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline

ROOT = DEFAULT_CHECKPOINT.parent.parent
FIGURES = {"class_accuracy", "sync", "fvd", "kvd", "fad", "copies"}


@pytest.fixture(scope="module")
def small(tiny_pipeline, tmp_path_factory):
    """A pipeline folder with random weights and few classes: whatever is made of every class takes half."""
    folder = tmp_path_factory.mktemp("small")
    parts = {name: getattr(tiny_pipeline, name) for name in ("transformer", "video_codec", "audio_codec", "scheduler")}
    pipe = AVDiTPipeline(**parts, classes=["thunder", "raining", "splashing water", "wind noise"])
    pipe.save_pretrained(folder)
    Pack(["break", "house"], pipe.transformer.adapter_state_dict()).save(folder / "packs" / "dance")
    return folder


@pytest.fixture(scope="module")
def rendered():
    clips = [render_clip(name, HELD_OUT + k) for name in EVENT_CLASSES for k in range(4)]
    return [(clip.frames.numpy(), clip.audio.numpy()) for clip in clips]


@pytest.fixture(scope="module")
def danced():
    clips = [render_clip(name, HELD_OUT + k) for name in GENRES for k in range(2)]
    return [(clip.frames.numpy(), clip.audio.numpy()) for clip in clips]


def scores(clips, timing=None):
    timing = timing or Onsets(ClipGeometry())
    return sync_scores(timing, [timing.seen(f) for f, _ in clips], [timing.heard(a) for _, a in clips])


def evaluate(capsys, checkpoint, *options):
    """The report of the command, as JSON."""
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_rendered_events_are_in_time(rendered):
    assert scores(rendered)["within_100ms"] >= 0.9 > 0.6 >= scores(rendered)["shuffled"]


def test_late_sound_is_out_of_time(rendered):
    late = [(frames, np.concatenate([audio[:1600].repeat(2)[:4000], audio[:-4000]])) for frames, audio in rendered]
    assert scores(late)["within_100ms"] <= 0.5


def test_onsets_of_a_flash_and_a_click():
    frames, audio = np.zeros((16, 64, 64, 3), np.float32), np.zeros(25600, np.float32)
    frames[7:, 10:40, 10:40] = 1
    audio[11200:11500] = 0.5
    assert picture_onset(frames, 10) == pytest.approx(0.7)
    assert sound_onset(audio, 16000) == pytest.approx(0.7, abs=0.02)
    assert within(Onsets(ClipGeometry()), [0.7, 0.7], [0.78, 0.9]) == 0.5


def test_an_event_in_what_a_window_is_given_is_not_its_own():
    """The end of a bright flash lies in the four frames from the window before, a fainter one and its click after."""
    timing = Onsets(ClipGeometry())
    frames, audio = np.zeros((16, 64, 64, 3), np.float32), np.zeros(25600, np.float32)
    frames[:2, 10:40, 10:40], frames[9:, 10:40, 10:40] = 1, 0.4
    audio[1600:4000], audio[14400:14700] = 0.8, 0.3
    for given, when in ((0, (0.2, 0.1)), (4, (0.9, 0.9))):
        assert timing.seen(frames, given) == pytest.approx(when[0])
        assert timing.heard(audio, given) == pytest.approx(when[1], abs=0.02)


def test_beats_of_rendered_dances_are_in_time(danced):
    beats = load_beats(ALL_JUDGES / "dance", ClipGeometry())
    own = scores(danced, beats)
    assert own["within_100ms"] >= 0.9 and own["shuffled"] <= 0.5  # of a beat of about 0.6 s, 0.2 s are within
    late = [(frames, np.concatenate([np.zeros(3200, np.float32), audio[:-3200]])) for frames, audio in danced]
    assert scores(late, beats)["within_100ms"] <= 0.2


@pytest.mark.parametrize("pack", PACKS)
def test_shipped_judges_know_held_out_renders(pack):
    folder = ALL_JUDGES / pack
    assert judges_of(ALL_JUDGES, list(PACKS[pack])) == folder
    judges = Judges.load(folder)
    assert judges.classes == list(PACKS[pack])
    right = {"picture": 0, "sound": 0}
    for name in PACKS[pack]:
        for seed in (HELD_OUT + 70, HELD_OUT + 71):
            clip = render_clip(name, seed)
            right["picture"] += judges.named(judges.picture, judges.statistics(clip.frames[None]), judges.classes) == [
                name
            ]
            right["sound"] += judges.named(judges.sound, judges.sound.mel(clip.audio[None]), judges.classes) == [name]
    assert min(right.values()) >= 17  # of 18 or 20
    assert judges.picture.config.accuracy >= 0.98 and judges.sound.config.accuracy >= 0.98
    assert max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 500_000


def test_judges_are_trained_on_seeds_of_their_own(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"clips": 2, "test_clips": 1, "picture": {"steps": 3}, "sound": {"steps": 3}})
    )
    assert main(["train", "judges", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]) == 0
    judges = Judges.load(tmp_path / "out")
    assert judges.picture.mean.abs().max() > 0  # the statistics of what they learned from
    clip = render_clip(0, JUDGES)
    assert judges.picture(judges.statistics(clip.frames[None])).shape == (1, len(CLASSES))
    assert 1_000_000 < JUDGES < HELD_OUT


def test_judges_of_dance_learn_the_beat_too(tmp_path):
    parts = ("picture", "sound", "picture_beat", "sound_beat")
    settings = {"pack": "dance", "clips": 1, "test_clips": 1, **{part: {"steps": 2} for part in parts}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert main(["train", "judges", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]) == 0
    assert Judges.load(tmp_path / "out").classes == list(GENRES)
    beats = load_beats(tmp_path / "out", ClipGeometry())
    assert beats.seen(render_clip("house", JUDGES).frames.numpy()).shape == (16, 2)
    assert 0 <= beats.sound.config.accuracy <= 1


def test_whole_report_with_its_floors_and_ceilings(small, capsys):
    said = evaluate(capsys, small, "--clips", "1", "--steps", "1", "--training-clips", "1")
    assert said.keys() >= FIGURES | {"clips", "settings", "video", "audio"}
    assert said["settings"]["held_out_from"] == HELD_OUT and said["settings"]["steps"] == 1
    accuracy = said["class_accuracy"]
    assert accuracy["judge_video"] >= 0.8 and accuracy["judge_audio"] >= 0.8  # renders; the model's weights are random
    assert accuracy["video"] <= 0.67 and accuracy["clips"] == len(accuracy["by_class"]) == 4
    for name in ("fvd", "kvd", "fad"):
        assert said[name].keys() >= {"value", "codec_floor", "ceiling", "features", "clips", "factor"}
        assert np.isfinite([said[name][key] for key in ("value", "codec_floor", "ceiling")]).all()
    assert said["fvd"]["size"] == 128 and said["fvd"]["fps"] == 10
    assert said["sync"]["samples"] == 2
    assert all(0 <= said["sync"][key] <= 1 for key in ("within_100ms", "shuffled"))
    # As published, several onsets may count for one peak of the picture, so that noise can come out above 1.
    assert all(0 <= said["sync"][key] < 2 for key in ("av_align", "av_align_shuffled"))
    assert said["copies"]["training_clips"] == 4 and said["copies"]["video"]["median"] > 0
    assert said["video"]["psnr_db"] < 20 and said["audio"]["mel_l1"] > 0.5  # random weights keep little


def test_table_for_a_reader(small, capsys):
    options = ["--part", "sync", "--clips", "1", "--steps", "1", "--task", "image"]
    assert main(["evaluate", "--checkpoint", str(small), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 clips of each class of own; image, 1 steps of ddim")
    assert lines[1].split()[:2] == ["model", "codec"] and lines[2].startswith("within 100 ms")


def test_another_pack_is_judged_by_its_own_judges(small, capsys):
    said = evaluate(capsys, small, "--pack", "dance", "--clips", "1", "--steps", "1")
    assert said["pack"] == "dance" and list(said["class_accuracy"]["by_class"]) == ["break", "house"]
    assert said["class_accuracy"]["judge_video"] == said["class_accuracy"]["judge_audio"] == 1
    assert said["sync"]["timing"] == "phase of the beat" and said["sync"]["samples"] == 2
    assert said["copies"]["training_clips"] == 2 * said["copies"]["clips"] * 8


def test_what_is_given_is_not_scored(small, capsys):
    said = evaluate(capsys, small, "--clips", "1", "--steps", "1", "--task", "v2a", "--part", "quality")
    assert said["class_accuracy"]["video"] is None and said["fvd"]["value"] is None and said["kvd"]["value"] is None
    assert said["fad"]["value"] > 0 and said["fvd"]["codec_floor"] > 0
    said = evaluate(capsys, small, "--clips", "1", "--steps", "1", "--task", "a2v", "--part", "quality")
    assert said["class_accuracy"]["audio"] is None and said["fad"]["value"] is None
    assert said["fvd"]["value"] > said["fvd"]["codec_floor"] > 0


def test_sounds_for_a_picture_are_held_against_its_own():
    """The picture's own sound follows itself whatever its level; another clip's of its class does not."""
    sounds = [render_clip("squishing water", HELD_OUT + seed).audio.numpy() for seed in range(4)]
    own = Measured(labels=["squishing water"] * 4, loudness=[loudness(x, 16_000) for x in sounds])
    quieter = replace(own, loudness=[loudness(0.5 * x, 16_000) for x in sounds])
    said = loudness_scores(quieter, own)
    assert said["value"] > 0.95 and said["shuffled"] < 0.8 and said["by_class"] == {"squishing water": said["value"]}
    still = replace(own, loudness=[np.zeros_like(x) for x in own.loudness])
    assert loudness_scores(still, own)["value"] == 0


def test_last_window_of_a_continuation_beside_the_first(small, capsys):
    options = ("--clips", "1", "--steps", "1", "--task", "continuation", "--windows", "2", "--part", "sync")
    said = evaluate(capsys, small, *options)
    assert said["settings"]["windows"] == 2
    assert said["sync"]["samples"] == said["first_window"]["sync"]["samples"] == 2
    assert said["sync"]["codec_floor"] == said["first_window"]["sync"]["codec_floor"]
    change = said["sync"]["av_align"] - said["first_window"]["sync"]["av_align"]
    assert said["drift"]["AV-Align (difference)"] == pytest.approx(change, abs=1e-3)


def test_a_long_stream_gives_its_first_and_its_last_window(monkeypatch):
    geometry = ClipGeometry()

    def counted(_pipe, settings, _generator, count, turn):
        """Parts as a stream yields them, whose frames and samples hold their number."""
        for part in range(count):
            assert settings()["class_labels"] == "thunder"
            start, length = 12 * part, 16 if part == count - 1 else 12
            yield np.arange(start, start + length), np.arange(1600 * start, 1600 * (start + length))

    monkeypatch.setattr("avdit.evaluation.tasks.windows", counted)
    pipe, sampling = SimpleNamespace(geometry=geometry), Sampling("continuation", windows=7)
    sample = streamed(pipe, sampling, "thunder", 0, contextlib.nullcontext())
    assert sample.first[0].tolist() == list(range(16)) and sample.first[1][[0, -1]].tolist() == [0, 25599]
    assert sample.frames.tolist() == list(range(72, 88)) and sample.audio[[0, -1]].tolist() == [115200, 140799]


def test_feature_networks_of_the_user(small, tmp_path, capsys):
    class Colours(torch.nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return torch.cat([clips.mean(dim=[2, 3, 4]), clips.std(dim=[2, 3, 4])], 1)

    class Loudness(torch.nn.Module):
        def forward(self, audio: torch.Tensor) -> torch.Tensor:
            return audio.view(len(audio), 4, -1, 2).abs().mean(2)  # (B, windows, d)

    for name, network in (("colours.pt", Colours()), ("loudness.pt", Loudness())):
        torch.jit.script(network).save(tmp_path / name)
    files = ("--video-features", str(tmp_path / "colours.pt"), "--audio-features", str(tmp_path / "loudness.pt"))
    said = evaluate(capsys, small, "--clips", "1", "--steps", "1", "--part", "quality", *files)
    assert (said["fvd"]["features"], said["fvd"]["dimensions"], said["fvd"]["size"]) == ("colours.pt", 6, 224)
    assert (said["fad"]["features"], said["fad"]["dimensions"]) == ("loudness.pt", 2)


def test_spectral_distance_of_a_sound_and_of_another():
    sound = render_clip("raining", HELD_OUT).audio
    assert spectral_distance(sound, sound) == 0
    assert spectral_distance(sound, 0.9 * sound) < 0.3 < 1 < spectral_distance(sound, render_clip("break", 0).audio)


def test_step_and_dip_at_the_joint_of_two_windows():
    geometry, calls = ClipGeometry(), []

    def turned(sound):
        calls.append(sound)
        return sound * (-1) ** len(calls)  # each window against the phase of the one before

    kept, against = joint_step(geometry, lambda sound: sound), joint_step(geometry, turned)
    assert kept["joint_step"] == pytest.approx(1, abs=0.1) and abs(kept["joint_dip_db"]) < 1
    assert against["joint_dip_db"] > 6


def test_copies_are_told_from_clips_that_are_none():
    def measured(seeds, noise=0.0):
        out = Measured()
        for seed in seeds:
            frames = render_clip("thunder", seed).frames.numpy()
            out.labels.append("thunder")
            out.thumbnails.append(picture_thumbnail(frames) + noise)
        return out

    training, held_out = measured(range(4)), measured(range(HELD_OUT, HELD_OUT + 3))
    true = measured(range(2), noise=0.004)
    found = copy_scores(measured([1, HELD_OUT + 9], noise=0.006), held_out, true, training, "video")
    assert found["share"] == 0.5 and found["held_out_share"] == 0 and found["true_copy_share"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clips", "0"], "--clips 0 must be"),
        (["--pack", "opera"], "unknown pack 'opera': choose one of own, dance"),
        (["--task", "music"], "unknown task 'music': choose one of joint"),
        (["--steps", "0"], "steps 0 must be"),
        (["--guidance", "99"], "guidance 99.0 must be"),
        (["--sampler", "euler"], "unknown sampler 'euler'"),
        (["--windows", "1"], "--windows 1 must be"),
        (["--judges", "nowhere"], "nowhere has no picture_judge: make it with"),
        (["--video-features", "i3d.pt"], "feature network i3d.pt does not exist"),
    ],
)
def test_wrong_input_ends_with_one_sentence(small, options, message, capsys):
    assert main(["evaluate", "--checkpoint", str(small), "--json", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


def test_judges_that_do_not_know_a_class(small, tmp_path, capsys):
    for kind, folder in ((PictureJudge, "picture_judge"), (SoundJudge, "sound_judge")):
        kind(["thunder", "ballet"]).save_pretrained(tmp_path / folder)
    assert main(["evaluate", "--checkpoint", str(small), "--judges", str(tmp_path)]) == 2
    assert "judges do not know the class 'raining'" in capsys.readouterr().err
    (Path(tmp_path) / "sound_judge" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert main(["evaluate", "--checkpoint", str(small), "--judges", str(tmp_path)]) == 2
    assert "sound_judge cannot be loaded" in capsys.readouterr().err


def test_bench_accounts_for_a_clip(tiny_checkpoint):
    command = [sys.executable, "-m", "avdit", "bench", "--runs", "1", "--steps", "2", "--class", "raining", "--json"]
    run = subprocess.run(
        [*command, "--checkpoint", str(tiny_checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = json.loads(run.stdout)
    assert said["realtime_factor"] == pytest.approx(1.6 / said["seconds_per_clip"], rel=0.02)
    assert said["first_picture_s"] > said["seconds_per_clip"]
    assert said["denoiser"] == "folded" and said["machine"]["processor"] and said["copy_gb_s"] > 0
    stages = said["stages"]
    for name in ("denoiser", "denoiser_without_guidance", "video_decode", "mel_decode"):
        assert stages[name]["counted"]["gflop"] > 0 and 0 < stages[name]["share_of_floor"]
        assert stages[name]["share_of_floor"] == pytest.approx(
            stages[name]["floor_ms"] / stages[name]["median_ms"], abs=0.02
        )
    both, one = (stages[name]["counted"]["gflop"] for name in ("denoiser", "denoiser_without_guidance"))
    # Without the other modality and the other frames there is less to do, and no foley, which is much of so small a
    # model; oneDNN's layers are counted.
    assert 1.2 * one < both < 2 * one
    assert {"noise", "vocoder", "mux", "clip", "sound_for_a_picture"} < stages.keys()
    assert said["peak_memory_mb"] > 100


def test_bench_takes_the_pack_of_its_class(shipped_pipeline, monkeypatch, capsys):
    monkeypatch.setattr("avdit.cli.load_pipeline", lambda *_: shipped_pipeline)
    assert main(["bench", "--class", "krump", "--runs", "1", "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["turbo"]["steps"] == 6 and shipped_pipeline.factorized
    assert main(["bench", "--class", "polka"]) == 2
    assert "unknown class 'polka'" in capsys.readouterr().err
