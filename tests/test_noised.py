"""The adversary on noised latents: what it sees, what it asks for, and how far it moves what is judged."""

import pytest
import torch
from test_adversary import drawn
from torch import nn

from avdit.models.schedule import xs_scheduler
from avdit.training.adversary import Led
from avdit.training.noised import LEAST, NoisedAdversary, TokenFeatures
from avdit.training.trainer import Trainer, TrainerConfig

ALPHAS = xs_scheduler().alphas_cumprod


def adversary(out, pipe, weight=0.5):
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(1, 1), lambda *_: {}, TrainerConfig(batch_size=4, mixed_precision="no"), out)
    return NoisedAdversary(trainer, pipe.transformer.backbone, 3, ALPHAS, weight, 0)


def test_what_judges_sees_noise_and_the_whole_picture(tiny_pipeline):
    features = TokenFeatures(tiny_pipeline.transformer.backbone)
    x = drawn(2, *tiny_pipeline.geometry.video_latent_shape)
    maps = features(x, torch.tensor([300, 300]))
    assert len(maps) == len(features.levels) and all(m.shape[0] == 2 and m.shape[2:] == (8, 8) for m in maps)
    assert not torch.equal(maps[0], features(x, torch.tensor([600, 300]))[0])
    changed = x.clone()
    changed[:, :, :2, :2] += 1
    assert (features(changed, torch.tensor([300, 300]))[-1] - maps[-1])[..., -1, -1].abs().max() > 1e-6


@pytest.mark.parametrize(("end", "least", "most"), [(800, LEAST * 800, 800), (400, LEAST * 400, 400), (0, 0, 150)])
def test_frames_are_judged_in_about_the_noise_to_which_a_step_leads(tmp_path, tiny_pipeline, end, least, most):
    judge, seen = adversary(tmp_path, tiny_pipeline), []

    def told(images, noise, levels):
        seen.append(levels)
        return type(judge).seen(judge, images, noise, levels)

    judge.seen = told
    shape, labels = (4, *tiny_pipeline.geometry.video_latent_shape), torch.arange(4) % 3
    for step in range(10):
        velocity = drawn(*shape, seed=step).requires_grad_()
        draw = torch.Generator().manual_seed(step)
        judge(Led(velocity, velocity, drawn(*shape), labels), end, velocity.square().mean(), draw, 1)
    levels = torch.stack(seen)
    assert torch.equal(levels[::2], levels[1::2])  # of both alike
    assert least - 1 <= levels.min() < levels.max() <= most and len(levels.unique()) > 10


def test_its_gradient_is_a_share_of_the_velocities_whatever_the_loss(tmp_path, tiny_pipeline):
    """What holds a student to its beginning is nothing at first, of which no share would lead anywhere."""
    shape = 4, *tiny_pipeline.geometry.video_latent_shape
    velocity = drawn(*shape).requires_grad_()
    (size,) = torch.autograd.grad(velocity.square().mean(), velocity)
    held = (velocity - velocity.detach()).square().mean()
    labels = torch.tensor([0, 1, 2, 0])
    judge = adversary(tmp_path, tiny_pipeline, 0.25)
    told = judge(Led(velocity, velocity, drawn(*shape, seed=1), labels), 600, held, torch.Generator(), 5)
    told["loss"].backward()
    assert (velocity.grad.norm() / size.norm()).item() == pytest.approx(0.25, rel=1e-3)
    assert all(parameter.grad is None for parameter in tiny_pipeline.transformer.backbone.parameters())


def test_smeared_frames_are_known(tmp_path, tiny_pipeline):
    judge, generator = adversary(tmp_path, tiny_pipeline), torch.Generator().manual_seed(0)
    shape, told = (4, *tiny_pipeline.geometry.video_latent_shape), []
    for step in range(30):
        real = drawn(*shape, seed=step)
        velocity = real.mean((2, 3), keepdim=True).expand(shape).clone().requires_grad_()
        loss, labels = velocity.square().mean(), torch.zeros(4, dtype=torch.long)
        told.append(judge(Led(velocity, velocity, real, labels), 0, loss, generator, step)["told"].item())
    assert sum(told[-5:]) / 5 > 0.8
