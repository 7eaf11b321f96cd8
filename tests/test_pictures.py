"""Adapters that learn by how their clips look: states of their own sampling, and an adversary on shown pictures."""

import pytest
import torch
from safetensors.torch import load_file
from test_adversary import GEOMETRY, drawn, noised
from torch import nn

from avdit.models.schedule import xs_scheduler
from avdit.training import adapters
from avdit.training.adapters import own_states
from avdit.training.adversary import Led
from avdit.training.pictures import (
    FEATURE_WIDTHS,
    JUDGED,
    PAIRS,
    FeatureDiscriminator,
    ImageAdversary,
    PictureAdversary,
)
from avdit.training.trainer import Trainer, TrainerConfig

ALPHAS = xs_scheduler().alphas_cumprod
TRAIN = {"steps": 2, "batch_size": 4, "sample_every": 0, "warmup_steps": 1}


def trainer(out, module=None, batch_size=4):
    config = TrainerConfig(batch_size=batch_size, mixed_precision="no")
    return Trainer(module or nn.Linear(1, 1), lambda *_: {}, config, out)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_step_by_true_velocities_stays_on_the_way_to_the_clip(eta):
    batch, video, audio = noised(time=700)
    fresh = drawn(*video.shape, seed=8), drawn(*audio.shape, seed=9)
    after = batch.stepped(ALPHAS, batch.video_target, batch.audio_target, torch.tensor([500, 900]), eta, fresh)
    for made, clip, given in zip(
        after.clips(ALPHAS, after.video_target, after.audio_target),
        (video, audio),
        (batch.given_video, batch.given_audio),
        strict=True,
    ):
        torch.testing.assert_close(*(x.masked_fill(given, 0) for x in (made, clip)), atol=1e-3, rtol=1e-3)
    assert after.t_video[0].tolist() == [0] * 4 + [500] * 12 and after.t_audio[0].unique().tolist() == [0, 500]
    found = (after.video - ALPHAS[500].sqrt() * video)[0, 4:] / (1 - ALPHAS[500]).sqrt()
    assert found.std().item() == pytest.approx(1, abs=0.02)  # as much noise as belongs there
    # What is given stays as it is, and so does a clip that has less noise than where the step leads.
    assert torch.equal(after.video[:, :4], batch.video[:, :4])
    assert torch.equal(after.video[1], batch.video[1]) and torch.equal(after.audio[1], batch.audio[1])


def test_a_wrong_step_is_to_be_led_back_to_the_clip():
    batch, video, audio = noised(time=500)
    wrong = batch.video_target + 0.3, batch.audio_target
    none = torch.zeros_like(video), torch.zeros_like(audio)
    after = batch.stepped(ALPHAS, *wrong, torch.tensor([300, 300]), 0.0, none)
    right = batch.stepped(ALPHAS, batch.video_target, batch.audio_target, torch.tensor([300, 300]), 0.0, none)
    assert (after.video - right.video)[:, 4:].abs().mean() > 0.03
    made = after.clips(ALPHAS, after.video_target, after.audio_target)[0]
    torch.testing.assert_close(made[:, 4:], video[:, 4:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("time", "share", "moves"), [(500, 1.0, True), (500, 0.0, False), (900, 1.0, False)])
def test_clips_of_little_noise_take_a_step_of_the_models_own(tmp_path, tiny_pipeline, time, share, moves):
    batch, *_ = noised(2, time)
    generator = torch.Generator().manual_seed(0)
    after = own_states(batch, trainer(tmp_path, tiny_pipeline.transformer, 2), ALPHAS, share, 0.5, generator)
    assert (after.t_video < batch.t_video).any(1).tolist() == [moves, moves]
    assert torch.equal(after.video, batch.video) is not moves
    assert torch.equal(after.video[:, :4], batch.video[:, :4]) and torch.equal(after.labels, batch.labels)


def picture_adversary(out, codec, weight=0.5, perceptual=0.5, batch_size=4):
    torch.manual_seed(0)
    return PictureAdversary(trainer(out, batch_size=batch_size), codec, ALPHAS, weight, 0, perceptual)


def test_the_clips_with_the_least_noise_are_shown(tmp_path, tiny_pipeline):
    batch, *_ = noised(6)
    batch.given_video = batch.given_video | (torch.arange(6) >= 4).view(6, 1, 1, 1, 1)  # two are given as a whole
    times = torch.tensor([[900], [300], [800], [100], [0], [0]])
    batch.t_video = batch.t_video.where(batch.given_frames, times)
    clips, frames = picture_adversary(tmp_path, tiny_pipeline.video_codec, batch_size=6).chosen(
        batch, torch.Generator()
    )
    assert sorted(clips.tolist()) == [1] * PAIRS + [2] * PAIRS + [3] * PAIRS and len(clips) == 6 * JUDGED * PAIRS
    assert (frames[:, 1] == frames[:, 0] + 1).all() and frames.max() < GEOMETRY.frames
    for clip in (1, 2, 3):
        assert len(frames[clips == clip, 0].unique()) == PAIRS


def test_a_class_in_the_wrong_clothes_is_known():
    """Pictures of both sides are alike, but for which class they are said to be of."""
    torch.manual_seed(0)
    judge = FeatureDiscriminator(num_classes=2)
    optimiser = torch.optim.AdamW(judge.parameters(), 5e-3, betas=(0.0, 0.99))
    looks = [torch.randn(2, width, 1, 1) for width in FEATURE_WIDTHS]
    for step in range(60):
        labels = torch.randint(2, (8,), generator=torch.Generator().manual_seed(step))
        maps, others = ([look[seen].expand(-1, -1, 8, 8) for look in looks] for seen in (labels, 1 - labels))
        better = torch.stack(
            [(r - m).mean() for r, m in zip(judge(*maps, labels), judge(*others, labels), strict=True)]
        )
        optimiser.zero_grad()
        nn.functional.softplus(-better).mean().backward()
        optimiser.step()
    assert (better > 0.5).all()


@pytest.mark.parametrize(("weight", "perceptual"), [(0.5, 0.0), (0.0, 10.0)])
def test_it_moves_the_picture_alone_and_nothing_that_is_given(tmp_path, tiny_pipeline, weight, perceptual):
    batch, *_ = noised(4, time=300, given_frames=8)
    judge = picture_adversary(tmp_path, tiny_pipeline.video_codec, weight, perceptual)
    found = []
    for joined in (False, True):
        video, audio = (torch.zeros_like(x).requires_grad_() for x in (batch.video, batch.audio))
        loss = (video - batch.video_target).square().mean() + (audio - batch.audio_target).square().mean()
        if joined:
            loss = judge(batch, video, audio, loss, torch.Generator().manual_seed(0), 5)["loss"]
        loss.backward()
        found.append((video.grad, audio.grad))
    (plain, heard), (joint, heard_too) = found
    push = joint - plain
    assert push.norm() > 0.01 * plain.norm() and not push[:, :8].any()
    torch.testing.assert_close(heard_too, heard)
    assert all(parameter.grad is None for parameter in tiny_pipeline.video_codec.parameters())


def test_smeared_images_are_known_by_how_they_are_shown(tmp_path, tiny_pipeline):
    torch.manual_seed(0)
    codec, told = tiny_pipeline.video_codec, []
    judge = ImageAdversary(trainer(tmp_path, batch_size=4), codec, 3, 0.25, 0)
    shape, labels = (4, *tiny_pipeline.geometry.video_latent_shape), torch.tensor([0, 1, 2, 3])
    for step in range(20):
        real = drawn(*shape, seed=step)
        velocity = real.mean((2, 3), keepdim=True).expand(shape).clone().requires_grad_()
        (size,) = torch.autograd.grad(velocity.square().mean(), velocity)
        held = (velocity - velocity.detach()).square().mean()  # asks for nothing
        found = judge(Led(velocity, velocity, real, labels), held, torch.Generator().manual_seed(step), step)
        told.append(found["told"].item())
    found["loss"].backward()
    assert sum(told[-5:]) / 5 > 0.8
    assert (velocity.grad.norm() / size.norm()).item() == pytest.approx(0.25, rel=1e-3)
    assert all(parameter.grad is None for parameter in codec.parameters())


def test_adapters_learn_beside_it_and_a_killed_run_goes_on(tiny_checkpoint, tmp_path):
    config = {"pipeline": str(tiny_checkpoint), "clips": 1, "cache": str(tmp_path / "cache")}
    config |= {"adversarial_weight": 0.5, "own_states": 0.5}
    for steps, folder in ((2, "whole"), (1, "parts"), (2, "parts")):
        adapters.run({**config, "train": {**TRAIN, "final_rate": 1.0, "steps": steps}}, tmp_path / folder, resume=True)
    whole, parts = (load_file(tmp_path / folder / "state.safetensors") for folder in ("whole", "parts"))
    assert any(name.startswith("beside.exp_avg.") for name in whole)
    assert not any("codec" in name for name in whole)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"own_states": 1.5}, "own_states 1.5 must be"),
        ({"adversarial_weight": -1}, "adversarial_weight -1 must be"),
        ({"perceptual": "much"}, "perceptual 'much' must be"),
        ({"adversarial_weight": 0.5, "modalities": ["audio"]}, "for models of both modalities"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(tmp_path, tiny_checkpoint, config, message):
    told = {"pipeline": str(tiny_checkpoint), "clips": 1, "train": TRAIN, **config}
    with pytest.raises(ValueError, match=message):
        adapters.run(told, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
