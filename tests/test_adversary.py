"""The adversary of few-step adapters: what it learns, and how it moves a student's predictions."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from avdit.geometry import ClipGeometry
from avdit.models.schedule import xs_scheduler
from avdit.training import turbo
from avdit.training.adversary import ClipAdversary, Discriminator
from avdit.training.batches import ClipBatch
from avdit.training.diffusion import Diffusion
from avdit.training.trainer import Trainer, TrainerConfig

GEOMETRY = ClipGeometry()


def adversary(out, batch_size=2, weight=0.5, warmup=0):
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(1, 1), lambda *_: {}, TrainerConfig(batch_size=batch_size, mixed_precision="no"), out)
    return ClipAdversary(trainer, Discriminator(GEOMETRY, 3), xs_scheduler().alphas_cumprod, weight, warmup)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noised(number=2, time=700, given_frames=4):
    """A batch whose first frames and their sound are given, and the clips in it."""
    video = drawn(number, GEOMETRY.frames, *GEOMETRY.video_latent_shape)
    audio = drawn(number, *GEOMETRY.audio_latent_shape, seed=1)
    frames = (torch.arange(GEOMETRY.frames) < given_frames).expand(number, -1)
    columns = (torch.arange(GEOMETRY.audio_columns) < GEOMETRY.columns_of(given_frames)).expand(number, -1)
    rows = columns.repeat_interleave(GEOMETRY.audio_patch[0], 1)
    t_video, t_audio = (torch.full(part.shape, time).masked_fill(part, 0) for part in (frames, columns))
    diffusion = Diffusion(xs_scheduler())
    seen, video_target = diffusion.noised(video, drawn(*video.shape, seed=2), t_video, frames)
    times = t_audio.repeat_interleave(GEOMETRY.audio_patch[0], 1)
    lead = audio.transpose(1, 2)
    heard, audio_target = diffusion.noised(lead, drawn(*lead.shape, seed=3), times, rows)
    batch = ClipBatch(
        video=seen,
        audio=heard.transpose(1, 2),
        video_target=video_target,
        audio_target=audio_target.transpose(1, 2),
        t_video=t_video,
        t_audio=t_audio,
        labels=torch.arange(number) % 3,
        given_video=frames[..., None, None, None],
        given_audio=rows[:, None, :, None],
        weight_video=torch.ones(number, 1, 1, 1, 1),
        share_video=1.0,
        share_audio=1.0,
    )
    return batch, video, audio


def test_pairs_are_the_clips_themselves_and_share_what_was_given(tmp_path):
    batch, video, audio = noised()
    wrong = torch.zeros_like(batch.video), torch.zeros_like(batch.audio)
    (real_video, real_audio), (made_video, made_audio) = adversary(tmp_path).pairs(batch, *wrong)
    torch.testing.assert_close(real_video[:, 4:], video[:, 4:], atol=1e-4, rtol=1e-4)
    rows = GEOMETRY.audio_patch[0] * GEOMETRY.columns_of(4)
    torch.testing.assert_close(real_audio[:, :, rows:], audio[:, :, rows:], atol=1e-4, rtol=1e-4)
    assert torch.equal(made_video[:, :4], real_video[:, :4]) and torch.equal(
        made_audio[:, :, :rows], real_audio[:, :, :rows]
    )
    assert (made_video[:, 4:] - real_video[:, 4:]).std() > 0.5 and (made_audio - real_audio)[:, :, rows:].std() > 0.5


def test_held_poses_are_told_from_the_same_pictures_in_even_motion(tmp_path):
    """The frames of both are alike one by one: only how they follow each other differs."""
    judge, generator = adversary(tmp_path, 4), torch.Generator().manual_seed(0)
    labels, audio = torch.zeros(4, dtype=torch.long), torch.zeros(4, *GEOMETRY.audio_latent_shape)
    told = []
    for step in range(40):
        poses = drawn(4, 3, *GEOMETRY.video_latent_shape, seed=step)
        share = torch.linspace(0, 1.999, GEOMETRY.frames)
        first = share.long()

        def clip(phase, poses=poses, first=first):
            phase = phase.view(1, -1, 1, 1, 1)
            return (1 - phase).sqrt() * poses[:, first] + phase.sqrt() * poses[:, first + 1]

        held, drifting = clip((share % 1).round()), clip(share % 1)
        told.append(judge.learn((held, audio), (drifting, audio), (labels,), generator).item())
    assert sum(told[-5:]) / 5 > 0.7  # of places, many of which look the same; by chance 0.5


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (5, 0.25), (10, 0.5), (99, 0.5)])
def test_its_gradient_is_a_share_of_the_loss_it_joins(tmp_path, step, share):
    batch, *_ = noised()
    judge, found = adversary(tmp_path, weight=0.5, warmup=10), []
    for joined in (False, True):
        video, audio = (torch.zeros_like(x).requires_grad_() for x in (batch.video, batch.audio))
        loss = (video - batch.video_target).square().mean() + (audio - batch.audio_target).square().mean()
        if joined:
            told = judge(batch, video, audio, loss, torch.Generator().manual_seed(0), step)
            assert told["loss"].item() == pytest.approx(loss.item()) and 0 <= told["told"] <= 1
            loss = told["loss"]
        loss.backward()
        found.append((video.grad, audio.grad))
    for plain, joint, given in zip(*found, (batch.given_video, batch.given_audio), strict=True):
        push = joint - plain
        assert (push.norm() / plain.norm()).item() == pytest.approx(share, rel=1e-3, abs=1e-6)
        assert not push[given.expand_as(push)].any()


def test_a_killed_run_goes_on_with_its_adversary(tiny_checkpoint, tmp_path):
    config = {"pipeline": str(tiny_checkpoint), "clips": 1, "cache": str(tmp_path / "cache"), "adversarial_weight": 1.0}
    train = {"batch_size": 2, "learning_rate": 1e-3, "final_rate": 1.0, "sample_every": 0}
    for steps, folder in ((3, "whole"), (2, "parts"), (3, "parts")):
        turbo.run({**config, "train": {**train, "steps": steps}}, tmp_path / folder, resume=True)
    whole, parts = (load_file(tmp_path / folder / "state.safetensors") for folder in ("whole", "parts"))
    assert any(name.startswith("beside.exp_avg.") for name in whole)
    torch.testing.assert_close(parts, whole)
    turbo.run({**config, "adversarial_weight": 0.0, "train": {**train, "steps": 3}}, tmp_path / "without")
    without = load_file(tmp_path / "without" / "state.safetensors")
    assert not any(name.startswith("beside.") for name in without)
    moved = [
        name for name, value in without.items() if name.startswith("weight.") and not torch.equal(value, whole[name])
    ]
    assert any(".temporal." in name for name in moved)
    for wrong in (-0.1, "much"):
        with pytest.raises(ValueError, match=f"adversarial_weight {wrong!r} must be"):
            turbo.run({**config, "adversarial_weight": wrong}, tmp_path / "not")


def test_processes_share_one_adversary(tiny_checkpoint, tmp_path):
    """Two processes with half of the clips each come to the weights that one comes to."""
    told = {"pipeline": str(tiny_checkpoint), "clips": 1, "cache": str(tmp_path / "cache"), "adversarial_weight": 1.0}
    train = {"steps": 2, "learning_rate": 1e-3, "final_rate": 1.0, "sample_every": 0, "mixed_precision": "no"}
    turbo.run({**told, "train": {**train, "batch_size": 4}}, tmp_path / "one")
    config = tmp_path / "two.json"
    config.write_text(json.dumps({**told, "train": {**train, "batch_size": 2}}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "avdit"]
    command = [*launch, "train", "turbo", "--config", str(config), "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True)
    one, two = (load_file(tmp_path / folder / "state.safetensors") for folder in ("one", "two"))
    names = [name for name in one if name.startswith("beside.exp_avg.")]  # AdamW's first steps tell signs alone
    assert names and one.keys() == two.keys()
    first, second = (torch.cat([state[name].flatten() for name in names]) for state in (one, two))
    assert (second - first).norm() < 0.01 * first.norm()
