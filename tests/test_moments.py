"""Moments of features: what they ask of pictures is that these be like others in the mean and as various."""

import torch
from accelerate import Accelerator

from avdit.training.moments import Moments, averaged


def pictures(number, seed, mean=0.0, spread=1.0):
    """Features of pictures of one group, (number, 4)."""
    return mean + spread * torch.randn(number, 4, generator=torch.Generator().manual_seed(seed))


def test_every_group_is_led_to_its_own_mean_and_spread():
    moments, wanted = Moments(Accelerator(cpu=True), averaged, 2), torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    shift, scale = torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    groups = torch.arange(16) % 2
    optimiser = torch.optim.Adam([shift, scale], 0.02)
    for step in range(300):
        real = pictures(16, 1000 + step) * wanted[groups, 1:] + wanted[groups, :1]
        loss = moments.wrong(pictures(16, step) * scale[groups] + shift[groups], real, groups)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = torch.cat([shift, scale.abs()], 1).detach()
    torch.testing.assert_close(found, wanted, atol=0.25, rtol=0)
    assert moments.apart() < 0.3


def test_what_is_already_alike_is_left_alone():
    moments = Moments(Accelerator(cpu=True), averaged, 1)
    groups = torch.zeros(64, dtype=torch.long)
    for step in range(40):
        moments.wrong(pictures(64, step), pictures(64, 100 + step), groups)
    made = pictures(64, 500).requires_grad_()
    (alike,) = torch.autograd.grad(moments.wrong(made, pictures(64, 600), groups), made)
    other = Moments(Accelerator(cpu=True), averaged, 1)
    for step in range(40):
        other.wrong(pictures(64, step, mean=1), pictures(64, 100 + step), groups)
    made = (pictures(64, 500) + 1).requires_grad_()
    (apart,) = torch.autograd.grad(other.wrong(made, pictures(64, 600), groups), made)
    assert alike.norm() < 0.3 * apart.norm()
    assert moments.apart() < 0.15 < 0.8 < other.apart()


def test_features_tell_brightness_and_texture_whatever_the_place():
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(3, 5, 8, 8, generator=generator)
    told = averaged([m, m[:, :, ::2, ::2]])
    assert told.shape == (3, 40)
    torch.testing.assert_close(averaged([m.roll(3, 3)]), averaged([m]))
    brighter, rougher = averaged([m + 1]) - averaged([m]), averaged([2 * m]) - averaged([m])
    for part in (0, 2, 3):  # means of all places, and of the highest and lowest
        torch.testing.assert_close(brighter.view(3, 4, 5)[:, part], torch.ones(3, 5))
    torch.testing.assert_close(brighter[:, 5:10], torch.zeros(3, 5), atol=1e-4, rtol=0)
    assert (rougher[:, 5:10] - torch.tensor(2.0).log()).abs().max() < 1e-3
    assert averaged([torch.zeros(1, 2, 4, 4)]).isfinite().all()  # of one colour


def test_what_is_small_is_told_by_where_a_feature_is_highest():
    """A spark in a frame that is dark otherwise, and one twice as bright."""
    dark = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    spark = torch.zeros_like(dark)
    spark[..., 3:5, 7:11] = 8.0
    mean, deviation, highest, lowest = (averaged([dark + spark]) - averaged([dark]))[0].tolist()
    assert highest > 4 > 1 > mean and lowest == 0 and deviation < 1


def test_what_was_seen_is_kept():
    accelerator, groups = Accelerator(cpu=True), torch.tensor([0, 1, 1, 2])
    whole, first = Moments(accelerator, averaged, 3), Moments(accelerator, averaged, 3)
    for step in range(4):
        whole.wrong(pictures(4, step), pictures(4, 50 + step), groups)
    for step in range(2):
        first.wrong(pictures(4, step), pictures(4, 50 + step), groups)
    again = Moments(accelerator, averaged, 3)
    again.load_state_dict(first.state_dict())
    for step in range(2, 4):
        again.wrong(pictures(4, step), pictures(4, 50 + step), groups)
    torch.testing.assert_close(again.state_dict(), whole.state_dict())
