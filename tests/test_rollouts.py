"""Turbo adapters that learn on from the clips that they make: how these go on, and what they are held against."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from avdit.data.scenes import CLASSES, GENRES
from avdit.generate import Request, generate
from avdit.models.schedule import xs_scheduler
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training import rollouts
from avdit.training.rollouts import Rollouts

STEPS, LAG = 4, 1
TRAIN = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "sample_every": 0, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def student(tiny_checkpoint, tmp_path_factory):
    """A folder with a turbo pack of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("student")
    state = AVDiTPipeline.from_pretrained(tiny_checkpoint).transformer.adapter_state_dict()
    state = {name: value + 0.01 for name, value in state.items()}
    Pack(list(CLASSES), state, steps=STEPS, eta=0.5, audio_lag=LAG / STEPS).save(folder)
    return folder


def config(tiny_checkpoint, student, **changes):
    told = {"pipeline": str(tiny_checkpoint), "student": str(student), "cache": str(student / "cache")}
    return {**told, "clips": 1, "train": TRAIN, **changes}


@pytest.mark.parametrize("from_first", [False, True])
def test_clips_on_their_way_are_where_the_pipeline_would_have_them(tiny_pipeline, from_first, monkeypatch):
    """By a model that knows the clip, both see the same noise at the same times, and come to that clip."""
    pipe, scheduler = tiny_pipeline, xs_scheduler()
    scheduler.set_timesteps(STEPS)
    alphas, shape = scheduler.alphas_cumprod, torch.Generator().manual_seed(3)
    real, noise = pipe.prepare_latents(1, shape), [pipe.prepare_latents(1, shape) for _ in range(STEPS + 1)]
    shown: list[list[tuple[torch.Tensor, ...]]] = [[], []]

    def knowing(seen, video, audio, t_video, t_audio):
        seen.append((video.clone(), audio.clone(), t_video, t_audio))
        out = []
        for x, clean, t in zip((video, audio), real, (t_video, t_audio), strict=True):
            alpha = alphas[t[0, -1]]
            out.append((alpha.sqrt() * x - clean) / (1 - alpha).sqrt())
        return out

    clips = Rollouts(pipe.geometry, scheduler.timesteps, LAG, 0.5, alphas, from_first)
    labels = torch.tensor([5])
    clips.begin(torch.tensor([0]), labels, real, noise[0])
    for fresh in noise[1:]:
        made = clips.led_to(*knowing(shown[0], *clips.inputs[:4]))
        torch.testing.assert_close(made[0], real[0], atol=2e-3, rtol=0)
        clips.go_on(made, torch.tensor([7]), real[0], fresh)
    assert clips.places.tolist() == [0] and clips.labels.tolist() == [7]  # a new one has begun
    assert torch.equal(clips.video[:, from_first:], noise[-1][0][:, from_first:])
    if from_first:
        assert all(torch.equal(video[:, 0], real[0][:, 0]) and t[0, 0] == 0 for video, _, t, _ in shown[0])
        return

    drawn = iter(noise)
    monkeypatch.setattr(pipe, "prepare_latents", lambda *_: next(drawn))

    def denoise(video, audio, t_video, t_audio, labels, keep=False):
        return (*knowing(shown[1], video, audio, t_video, t_audio), *([None] if keep else []))

    monkeypatch.setattr(pipe, "denoiser", lambda: denoise)
    stop = {"callback_on_step_end": lambda pipe, i, t, tensors: {}, "output_type": "latent", "eta": 0.5}
    with pytest.raises(StopIteration):  # the picture is done
        pipe("thunder", STEPS, 1.0, joint_guidance_scale=1.0, audio_lag=LAG / STEPS, **stop)
    for ours, theirs in zip(shown[0], shown[1], strict=False):
        assert torch.equal(ours[2], theirs[2]) and torch.equal(ours[3], theirs[3])
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_the_stage_trains_adapters_and_keeps_what_a_pack_says(tiny_checkpoint, student, tmp_path):
    train = {**TRAIN, "sample_every": 2}
    rollouts.run(config(tiny_checkpoint, student, keeping=0.5, train=train), tmp_path / "out")
    begun, pack = Pack.load(student), Pack.load(tmp_path / "out" / "pack")
    assert (pack.classes, pack.steps, pack.eta, pack.audio_lag) == (list(CLASSES), STEPS, 0.5, LAG / STEPS)
    moved = [name for name, value in pack.state.items() if not torch.equal(value, begun.state[name].bfloat16())]
    assert any(".temporal." in name for name in moved)
    assert not any("class_embedder" in name or "foley." in name for name in moved)
    assert list((tmp_path / "out").glob("samples-*.png"))
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.add_pack("own-turbo", pack)
    assert generate(pipe, Request("thunder", sampler="turbo")).frames.shape[0] == pipe.geometry.frames


def test_each_clip_is_held_against_its_class_at_its_own_place(tiny_checkpoint, student, tmp_path, monkeypatch):
    seen, told = [], rollouts.RolloutMoments.__call__

    def watched(self, velocities, made, real, loss, generator, step):
        clips = self.rollouts
        seen.append((clips.places.tolist(), clips.labels.tolist(), real, made))
        return told(self, velocities, made, real, loss, generator, step)

    monkeypatch.setattr(rollouts.RolloutMoments, "__call__", watched)
    train = {**TRAIN, "steps": 5}
    rollouts.run(config(tiny_checkpoint, student, keeping=0.0, train=train), tmp_path / "out")
    assert [places for places, *_ in seen] == [[(row + step) % STEPS for row in range(4)] for step in range(5)]
    known = {}
    for (_, labels, real, _), (later, after, *_) in zip(seen, seen[1:], strict=False):
        assert all(a == b for a, b, place in zip(labels, after, later, strict=True) if place)  # until it is done
        for label, clip in zip(labels, real, strict=True):
            assert torch.equal(clip, known.setdefault(label, clip))  # there is one rendered clip of each class
    assert all(made.isfinite().all() and (made - real).abs().mean() > 0.1 for *_, real, made in seen)


def test_without_moments_nothing_pulls(tiny_checkpoint, student, tmp_path):
    """All that is left is what the student was, from which it does not go."""
    still = {"noised_weight": 0, "shown_weight": 0, "keeping": 0.5}
    rollouts.run(config(tiny_checkpoint, student, **still), tmp_path / "out")
    begun, pack = Pack.load(student), Pack.load(tmp_path / "out" / "pack")
    apart = [(value.float() - begun.state[name].bfloat16().float()).abs().max() for name, value in pack.state.items()]
    rollouts.run(config(tiny_checkpoint, student, keeping=0.0), tmp_path / "pulled")
    pulled = Pack.load(tmp_path / "pulled" / "pack").state
    others = [(value.float() - begun.state[name].bfloat16().float()).norm() for name, value in pulled.items()]
    assert torch.stack(others).sum() > 0 and max(apart) < 2e-3


def test_a_killed_run_goes_on(tiny_checkpoint, student, tmp_path):
    for steps, folder in ((4, "whole"), (2, "parts"), (4, "parts")):
        train = {**TRAIN, "final_rate": 1.0, "steps": steps}
        torch.manual_seed(0)
        told = config(tiny_checkpoint, student, keeping=0.25, train=train)
        rollouts.run(told, tmp_path / folder, resume=True)
    whole, parts = (load_file(tmp_path / folder / "state.safetensors") for folder in ("whole", "parts"))
    assert {"beside.rollouts.video", "beside.rollouts.places"} <= whole.keys()
    assert all(f"beside.{kind}.made.square" in whole for kind in ("noised", "shown"))
    torch.testing.assert_close(parts, whole)


def test_what_cannot_be_trained_is_told_in_a_sentence(tiny_checkpoint, student, tmp_path):
    joint = replace(Pack.load(student), steps=None)
    joint.save(tmp_path / "joint")
    replace(joint, classes=list(GENRES), steps=STEPS).save(tmp_path / "other")
    for change, message in (
        ({"student": None}, "name its folder as student"),
        ({"student": str(tmp_path / "joint")}, "joint is no turbo pack"),
        ({"student": str(tmp_path / "other")}, "other has other classes than the pipeline"),
        ({"keeping": 2}, "keeping 2 must be"),
        ({"shown_weight": -1}, "shown_weight -1 must be"),
        ({"train": {**TRAIN, "accumulation": 2}}, "leave accumulation at 1"),
        ({"pipeline": "nowhere"}, "nowhere is not a pipeline folder"),
    ):
        with pytest.raises(ValueError, match=message):
            rollouts.run({**config(tiny_checkpoint, student), **change}, tmp_path / "not")
    assert not (tmp_path / "not").exists()
