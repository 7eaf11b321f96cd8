"""A killed run goes on from its last save; what it saves can be loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from avdit.data import latents
from avdit.data.latents import RandomShards, Shards, write_shard
from avdit.data.scenes import CLASSES, HELD_OUT, PACKS, render_clip
from avdit.geometry import ClipGeometry
from avdit.models.schedule import xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.training import backbone, codecs, data
from avdit.training.batches import ClipBatches, given_parts
from avdit.training.data import TrainingData
from avdit.training.diffusion import Diffusion, masked_error, moving_weight
from avdit.training.trainer import Trainer, TrainerConfig


def line_fit(out, steps, optimiser="adamw", held_out=None, **more):
    """A small regression whose batches depend on the step alone; ``held_out``: the sign of the held-out line."""
    torch.manual_seed(0)
    module = torch.nn.Sequential()
    module.add_module("blocks", torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 1)))

    def loss(model, generator, step, sign=1):
        x = torch.randn(8, 4, generator=generator)
        return {"loss": (model(x) - sign * x.sum(1, keepdim=True)).square().mean()}

    settings = {"warmup_steps": 1, "save_every": 10, "final_rate": 1.0, "learning_rate": 0.02, "weight_decay": 0.0}
    checked = partial(loss, sign=held_out) if held_out else None
    config = TrainerConfig(steps=steps, optimiser=optimiser, **settings, **more)
    return Trainer(module, loss, config, out, held_out=checked)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, optimiser):
    whole = line_fit(tmp_path / "whole", 40, optimiser)
    expected = {name: value.clone() for name, value in whole.run().state_dict().items()}

    part = line_fit(tmp_path / "part", 40, optimiser)
    part.config.steps, kept = 20, part.config.steps
    part.config.final_rate = 1.0
    part.run()
    again = line_fit(tmp_path / "part", kept, optimiser)
    assert again.resume() and again.step == 20
    torch.testing.assert_close(dict(again.run().state_dict()), expected)


def checks(out):
    """Step and held-out error of every measurement in the log."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["held_out"]["loss"]) for row in rows if "held_out" in row]


def test_training_ends_when_the_held_out_error_stops_falling(tmp_path):
    falls = line_fit(tmp_path / "falls", 60, held_out=1, check_every=10, patience=2)
    falls.run()
    steps, errors = zip(*checks(tmp_path / "falls"), strict=True)
    assert falls.step == 60 and steps == tuple(range(0, 61, 10)) and errors[-1] < 0.1 * errors[0]
    unchecked = line_fit(tmp_path / "unchecked", 60)
    torch.testing.assert_close(unchecked.run().state_dict(), falls.raw.state_dict(), atol=0, rtol=0)

    drawn = []
    for checked in ({}, {"held_out": 1, "check_every": 10}):  # another seed is checked by the same draws, and kept
        other = line_fit(tmp_path / f"other{len(checked)}", 20, seed=3, **checked)
        drawn.append(other.run().state_dict())
    torch.testing.assert_close(*drawn, atol=0, rtol=0)
    assert checks(tmp_path / "other2")[0] == (0, errors[0]) and checks(tmp_path / "other2")[1][1] != errors[1]

    rises = line_fit(tmp_path / "rises", 60, held_out=-1, check_every=10, patience=2)
    rises.run()
    (_, start), (_, first), (end, last) = checks(tmp_path / "rises")
    assert rises.step == end == 20 and start < first < last

    part = line_fit(tmp_path / "part", 15, held_out=-1, check_every=10, patience=2)
    part.run()  # checked at 0, 10 and, as it ends, at 15
    ended = line_fit(tmp_path / "part", 15, held_out=-1, check_every=10, patience=2)
    ended.resume()
    ended.run()  # nothing is left to do, nor to measure
    assert [step for step, _ in checks(tmp_path / "part")] == [0, 10, 15]
    again = line_fit(tmp_path / "part", 60, held_out=-1, check_every=10, patience=3)
    assert again.resume() and again.since == 2
    again.run()
    assert again.step == 20  # a third measurement in a row
    for wrong, message in (
        ({"check_every": 10}, "this stage measures no error"),
        ({"patience": 2}, "give check_every, too"),
        ({"check_every": -1}, "check_every -1 must be a whole number of 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            line_fit(tmp_path, 1, **wrong)


def test_rendered_clips_that_training_is_checked_on_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHECK_CLIPS", 1)
    train = {"steps": 1, "batch_size": 2, "sample_every": 0, "check_every": 1}
    sizes = {"hidden_size": 32, "depth": 1, "num_heads": 1}
    settings = {"codecs": "checkpoints/avdit-xs", "clips": 1, "pack": "landscape", "model": sizes, "train": train}
    backbone.run(settings, tmp_path)
    assert [step for step, _ in checks(tmp_path)] == [0, 1]
    (path,) = (tmp_path / "held-out" / "latents" / "landscape").iterdir()
    seed = int(path.stem.removeprefix("clips-"))
    assert seed >= HELD_OUT
    with safe_open(path, "pt") as file:
        pictures, labels = file.get_tensor("video"), file.get_tensor("label")
    assert torch.equal(labels, torch.arange(9))
    codec = VideoCodec.from_pretrained("checkpoints/avdit-xs/video_codec").eval()
    with torch.no_grad():
        frames = (render_clip("thunder", seed).frames * 255).round() / 127.5 - 1
        torch.testing.assert_close(pictures[5].float(), codec.encode(frames.movedim(-1, 1)[None])[0], atol=2e-2, rtol=0)
    assert len(Shards(tmp_path / "held-out" / "latents")) == len(Shards(tmp_path / "latents")) == 9


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_both_optimisers_fit_the_line(tmp_path, optimiser):
    trainer = line_fit(tmp_path, 300, optimiser)
    first = trainer.train_step()["loss"]
    for _ in range(299):
        last = trainer.train_step()["loss"]
    assert last < 0.02 * first
    with pytest.raises(ValueError, match="optimiser 'sgd' must be"):
        TrainerConfig(optimiser="sgd")


def test_what_moves_counts_for_more():
    clips = torch.zeros(2, 16, 3, 8, 8)
    clips[0, ::2, :, 2:4, 2:4] = 1.0  # something small moves before a wall; in the second clip nothing does
    weight = moving_weight(clips, 3.0)
    assert weight[0, 0, 2, 2] == pytest.approx(9 * weight[0, 0, 0, 0].item())
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(weight[1], torch.ones(1, 8, 8))
    torch.testing.assert_close(moving_weight(clips, 1.0), torch.ones(2, 1, 8, 8))
    noised = torch.tensor([True, False]).view(2, 1, 1, 1, 1) * weight.unsqueeze(1)
    errors = []
    for place in (0, 2):
        wrong = clips.clone()
        wrong[:, :, :, place, place] += 1.0
        errors.append(masked_error(wrong, clips, noised, clips[0].numel()).item())
    assert errors[1] == pytest.approx(9 * errors[0])


def test_decoder_alone_learns_and_the_latents_stay(tmp_path):
    shipped = Path("checkpoints/avdit-xs/video_codec")
    settings = {"clips": 1, "parts": ["video"], "trains": "decoder", "video_from": str(shipped), "perceptual": 0}
    codecs.run({**settings, "video": {"steps": 3, "batch_size": 1, "sample_every": 0}}, tmp_path)
    before, after = VideoCodec.from_pretrained(shipped), VideoCodec.from_pretrained(tmp_path / "video_codec")
    frames = render_clip("explosion", 0).frames[None, :2].movedim(-1, 2) * 2 - 1
    with torch.no_grad():
        latents = before.encode(frames)
        assert torch.equal(after.encode(frames), latents)
        assert not torch.allclose(after.decode(latents), before.decode(latents))
    with pytest.raises(ValueError, match="give video_from"):
        codecs.run({"parts": ["video"], "trains": "decoder"}, tmp_path)


def test_no_two_steps_draw_the_same_noise(tmp_path):
    trainer, seen = line_fit(tmp_path, 1), set()
    for trainer.step in range(600):
        seen.update(torch.rand(1, generator=generator).item() for generator in trainer.generators())
    assert len(seen) > 0.999 * 600 * trainer.global_batch


def test_given_parts_carry_no_loss():
    generator = torch.Generator().manual_seed(0)
    diffusion = Diffusion(xs_scheduler())
    clean, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    t = torch.full((2, 3), 700)
    given = torch.tensor([[True, False, False], [False, False, True]])
    noised, target = diffusion.noised(clean, noise, t, given)
    assert torch.equal(noised[given], clean[given])
    assert not torch.allclose(noised[~given], clean[~given])
    wrong_on_given = target + given.unsqueeze(-1) * 100
    assert masked_error(wrong_on_given, target, ~given.unsqueeze(-1)) == 0
    frames, columns = given_parts({"image": 1.0}, 4, ClipGeometry(), generator)
    assert frames[:, 0].all() and not frames[:, 1:].any() and not columns.any()
    # A factorized pack makes the first frame of a picture for a sound before the rest, so it trains with that given.
    for factorized in (False, True):
        frames, columns = given_parts({"a2v": 1.0}, 4, ClipGeometry(), generator, factorized)
        assert columns.all() and (frames[:, 0] == factorized).all() and not frames[:, 1:].any()


class OnesShards(RandomShards):
    def get(self, key, items, part=None):
        return torch.ones_like(super().get(key, items, part))


def test_continuations_are_told_how_noisy_their_past_is(tmp_path):
    geometry, diffusion = ClipGeometry(), Diffusion(xs_scheduler())
    ones = TrainingData(OnesShards(geometry, 9), None, None, geometry, list(CLASSES), {})
    batches = ClipBatches(
        ones, geometry, diffusion, line_fit(tmp_path, 1), {"continuation": 1.0}, 0.1, diffusion.timesteps, 0.5
    )
    for most in (0.0, 0.2):
        batches.context_noise = most
        batch = batches.draw(torch.Generator().manual_seed(0))
        for row, given in enumerate(batch.given_frames):
            (context,) = batch.t_video[row, given].unique().tolist()
            assert context <= 1000 * most and (batch.t_audio[row][batch.given_columns[row]] == context).all()
            assert (batch.t_video[row, ~given] == batch.t_video[row, -1]).all()
            kept = 1.0 if context == 0 else diffusion.alphas[context].sqrt().item()
            assert batch.video[row, given].mean().item() == pytest.approx(kept, abs=0.05)
    assert len(batch.t_video[:, 0].unique()) > 4  # each clip has its own
    wrong = (
        ({"context_noise": 1.5}, "context_noise 1.5 must"),
        ({"context_contrast": -0.1}, "context_contrast -0.1 must"),
        ({"context_anchor": 2}, "context_anchor 2 must"),
        ({"moving": 0.5}, "moving_weight 0.5"),
        ({"steady": -1}, "steady_weight -1 must"),
    )
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(batches, **change)


def test_continuations_may_follow_a_past_of_another_contrast(tmp_path):
    """What comes is the clip itself, whatever contrast its past is shown with: drift is to be undone."""
    geometry, diffusion = ClipGeometry(), Diffusion(xs_scheduler())
    data = TrainingData(RandomShards(geometry, 9), None, None, geometry, list(CLASSES), {})
    trainer, tasks = line_fit(tmp_path, 1), {"continuation": 1.0}
    plain = ClipBatches(data, geometry, diffusion, trainer, tasks, 0.1, diffusion.timesteps, 0.5)
    changed = replace(plain, context_contrast=0.5)
    drawn = []
    for batches in (plain, changed):
        torch.manual_seed(0)  # of the latents
        drawn.append(batches.draw(torch.Generator().manual_seed(0)))
    before, after = drawn
    gains = []
    for row, given in enumerate(before.given_frames):
        assert torch.equal(before.video[row, ~given], after.video[row, ~given])
        assert torch.equal(before.video_target[row, ~given], after.video_target[row, ~given])
        past = [batch.video[row, given] for batch in (before, after)]
        gains.append((past[1].std() / past[0].std()).item())
        torch.testing.assert_close(past[0].mean((0, 2, 3)), past[1].mean((0, 2, 3)), atol=0.05, rtol=0)
    assert 0.6 < min(gains) < 0.95 and 1.05 < max(gains) < 1.66
    assert torch.equal(before.audio, after.audio)


class NumberedShards(RandomShards):
    """Clips whose frames are filled with their number."""

    def get(self, key, items, part=None):
        value = super().get(key, items, part)
        return torch.arange(value.shape[1]).view(1, -1, 1, 1, 1).expand_as(value) if key == "video" else value


def test_continuations_may_look_back_to_a_frame_from_elsewhere(tmp_path):
    """As in a stream: their first frame is another of the clip's; all that follows is as it was."""
    geometry, diffusion = ClipGeometry(), Diffusion(xs_scheduler())
    data = TrainingData(NumberedShards(geometry, 9), None, None, geometry, list(CLASSES), {})
    tasks = {"continuation": 1.0, "image": 1.0}
    batches = ClipBatches(data, geometry, diffusion, line_fit(tmp_path, 1), tasks, 0.1, diffusion.timesteps, 0.5)
    for share in (0.0, 1.0):
        batch = replace(batches, context_anchor=share).draw(torch.Generator().manual_seed(0))
        continued = batch.given_frames[:, 1]
        assert continued.any() and not continued.all()
        for frames, given in zip(batch.video[continued], batch.given_frames[continued], strict=True):
            for number in range(1, int(given.sum())):
                assert (frames[number] == number).all()
        first = batch.video[:, 0]
        assert (first == first[:, :1, :1, :1]).all()
        shown = first[:, 0, 0, 0]
        assert (shown[~continued] == 0).all()  # whoever gives a picture gives the first one
        if share:
            assert len(shown[continued].unique()) > 2 and (shown[continued] < geometry.frames).all()
        else:
            assert (shown == 0).all()


def test_what_flickers_can_count_for_more_than_what_is_wrong_throughout(tmp_path):
    geometry, diffusion = ClipGeometry(), Diffusion(xs_scheduler())
    data = TrainingData(RandomShards(geometry, 9), None, None, geometry, list(CLASSES), {})
    tasks = {"joint": 1.0, "image": 1.0}
    plain = ClipBatches(data, geometry, diffusion, line_fit(tmp_path, 1), tasks, 0.1, diffusion.timesteps, 0.5)
    batches = [replace(plain, steady=steady).draw(torch.Generator().manual_seed(0)) for steady in (0.0, 1.0)]
    whole = batches[1].given_frames.any(1).logical_not()
    assert whole.any() and not whole.all()
    batches = [batch.rows(whole) for batch in batches]
    target = batches[0].video_target
    throughout = torch.full_like(target, 0.1)
    flickers = throughout * torch.tensor([1, -1]).repeat(geometry.frames // 2).view(1, -1, 1, 1, 1)
    before, after = [
        [batch.video_error(target + wrong, target).item() for wrong in (throughout, flickers)] for batch in batches
    ]
    assert before[0] == pytest.approx(before[1]) and after[0] == pytest.approx(before[0])
    assert after[1] == pytest.approx(before[1] * (1 + 4 * (geometry.frames - 1) / geometry.frames), rel=1e-3)


def test_clips_of_a_class_can_be_drawn_more_often(tmp_path):
    geometry = ClipGeometry()
    for start, label in ((0, 10), (1, 12), (2, 12)):  # two of them of the third class
        shapes = {
            "video": (1, geometry.frames, *geometry.video_latent_shape),
            "audio": (1, *geometry.audio_latent_shape),
        }
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        write_shard(tmp_path / f"clips-{start:08d}.safetensors", {**tensors, "label": torch.tensor([label])})
    data = TrainingData(Shards(tmp_path), None, None, geometry, list(PACKS["dance"]), {}, first_label=9)
    often = data.repeated({data.classes[3]: 3})
    drawn = often.labels(torch.arange(len(often.shards)), torch.zeros(len(often.shards), dtype=torch.bool))
    assert sorted(drawn.tolist()) == [1, *[3] * 6]
    assert often.shards.get("video", torch.tensor([6])).shape[1:] == shapes["video"][1:]
    assert len(data.shards) == 3 and len(data.repeated({}).shards) == 3
    for wrong in ({"explosion": 2}, {data.classes[0]: 0}, {data.classes[0]: 1.5}):
        with pytest.raises(ValueError, match="class_repeats of"):
            data.repeated(wrong)


def test_shards_give_the_same_from_memory_as_from_their_files(tmp_path):
    for k, count in enumerate((3, 2)):
        tensors = {"video": torch.randn(count, 4, 2).half(), "label": torch.arange(count) + 10 * k}
        write_shard(tmp_path / f"clips-{k:08d}.safetensors", tensors)
    mapped = Shards(tmp_path)
    items, frames = torch.tensor([4, 0, 3, 3]), torch.tensor([3, 0, 1, 2])
    for one, two in (
        (mapped, mapped.resident("cpu")),
        (mapped.picked(torch.tensor([4, 4, 1, 0, 2])), mapped.resident("cpu").picked(torch.tensor([4, 4, 1, 0, 2]))),
        (mapped.picked(torch.tensor([2, 4, 4, 0, 1])), mapped.picked(torch.tensor([2, 4, 4, 0, 1])).resident("cpu")),
    ):
        assert len(one) == len(two) == 5
        assert torch.equal(one.get("label", items), two.get("label", items))
        assert torch.equal(one.get("video", items), two.get("video", items))
        assert torch.equal(one.get("video", items, frames), two.get("video", items, frames))


def test_many_clips_are_rendered_by_several_processes_as_by_one(tmp_path, monkeypatch):
    latents.render_shards(tmp_path / "one", 1, 7)
    monkeypatch.setattr(latents, "POOLED", 1)
    monkeypatch.setattr(latents, "usable_cores", lambda: 2)
    latents.render_shards(tmp_path / "two", 1, 7)
    one, two = Shards(tmp_path / "one"), Shards(tmp_path / "two")
    items = torch.arange(9)
    assert torch.equal(one.get("label", items), items)
    assert torch.equal(two.get("label", items), items)
    # The processes work on one thread each, which sums in another order.
    torch.testing.assert_close(two.get("audio", items), one.get("audio", items), atol=1e-4, rtol=0)
    assert (two.get("frames", items).int() - one.get("frames", items).int()).abs().max() <= 1


def test_velocity_agrees_with_the_scheduler():
    scheduler = xs_scheduler()
    clean, noise = torch.randn(2, 4), torch.randn(2, 4)
    t = torch.tensor([100, 900])
    noised, velocity = Diffusion(scheduler).noised(clean, noise, t, torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(noised, scheduler.add_noise(clean, noise, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, t), atol=1e-5, rtol=1e-5)


def test_kill_and_resume_on_the_command_line(tmp_path):
    settings = {"clips": 1, "parts": ["audio"], "audio": {"steps": 400, "batch_size": 1, "save_every": 2}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "avdit",
        "train",
        "codecs",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "run"),
    ]
    state = tmp_path / "run" / "audio" / "state.safetensors"

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with safe_open(state, "pt") as file:
        reached = int(file.metadata()["step"])
    assert 0 < reached < 400

    settings["audio"]["steps"] = reached + 4
    config.write_text(json.dumps(settings))
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with safe_open(state, "pt") as file:
        assert int(file.metadata()["step"]) == reached + 4
    assert (tmp_path / "run" / "audio_codec" / "config.json").exists()
