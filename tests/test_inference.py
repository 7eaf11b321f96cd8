"""What is prepared for speed computes what the plain model computes."""

import pytest
import torch
import torch.nn.functional as F
from test_models import SIZES, inputs, joint_model

from avdit.data.scenes import CLASSES, HELD_OUT, render_clip
from avdit.models.inference import FoldedAVDiT, can_fold
from avdit.models.preview import Preview


def snr_db(out, reference):
    """Signal to noise of each of ``out``, the reference being the signal."""
    return [
        (10 * torch.log10(r.square().mean() / (o.float() - r).square().mean())).item()
        for o, r in zip(out, reference, strict=True)
    ]


@pytest.mark.parametrize("left_out", [None, *SIZES, "interaction_every"])
@torch.no_grad()
def test_folded_model_equals_the_plain_one(left_out):
    sizes = {"interaction_pool": 1} if left_out == "interaction_pool" else {left_out: 0} if left_out else {}
    if left_out == "interaction_rank":
        sizes = {"interaction_rank": 1}
    if left_out == "anchor_rank":  # which seeing the neighbours is a part of
        sizes["neighbour_rank"] = 0
    model = joint_model(trained=True, **sizes)
    folded = FoldedAVDiT(model, torch.float32)
    video, audio, t_video, t_audio, labels = inputs()
    one = torch.full_like(t_video, 700), torch.full_like(t_audio, 700)
    given = one[0].clone(), one[1].clone()
    given[0][:, :2], given[1][:, :1] = 0, 0  # as where a clip is continued
    blind = False, False, (1,)  # block 1's tokens see themselves alone
    knowing = (one, ()), (one, (False,)), (one, (False, False)), (one, blind)
    cases = ((t_video, t_audio), ()), *knowing, (given, ()), (one, ())
    for times, knows in cases:
        expected = model(video, audio, *times, labels, *knows)
        for ours, theirs in zip(folded(video, audio, *times, labels, *knows), expected, strict=True):
            assert theirs.abs().mean() > 0.01
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    image = video[:, :1], None, t_video[:, :1], None, labels, False, False  # a first frame that is made alone
    torch.testing.assert_close(folded(*image)[0], model(*image)[0], atol=1e-4, rtol=1e-4)
    assert (folded(*image, (1,))[0] - folded(*image)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_what_is_kept_of_a_picture_stands_for_it(folded):
    model = joint_model(trained=True)
    look = FoldedAVDiT(model, torch.float32) if folded else model
    video, audio, t_video, t_audio, labels = inputs()
    expected = look(video, audio, t_video, t_audio, labels)
    *predicted, seen = look(video, audio, t_video, t_audio, labels, keep=True)
    for ours, theirs in zip(predicted, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    picture, sound = look(None, audio, None, t_audio, labels, seen=seen)
    assert picture is None
    torch.testing.assert_close(sound, expected[1], atol=1e-5, rtol=1e-5)
    # It tells the next step's sound of the picture, and a sound beside nothing is another one.
    later = look(None, 0.7 * audio, None, t_audio, labels, seen=seen)[1]
    assert (later - look(video, 0.7 * audio, t_video, t_audio, labels)[1]).abs().mean() < 0.1 * later.abs().mean()
    alone = look(None, audio, None, t_audio, labels, joint=False)[1]
    torch.testing.assert_close(alone, look(video, audio, t_video, t_audio, labels, joint=False)[1])
    assert (alone - sound).abs().mean() > 0.1 * sound.abs().mean()


@torch.no_grad()
def test_folded_model_rounds_no_more_than_the_plain_one():
    model, (video, audio, *rest) = joint_model(trained=True), inputs()
    expected = model(video, audio, *rest)
    folded = FoldedAVDiT(model, torch.bfloat16)(video, audio, *rest)
    model.bfloat16()
    plain = snr_db(model(video.bfloat16(), audio.bfloat16(), *rest), expected)
    assert all(ours > max(30, theirs - 1) for ours, theirs in zip(snr_db(folded, expected), plain, strict=True))


@torch.no_grad()
def test_sampling_follows_every_change_of_the_weights(tiny_pipeline):
    def clip(denoiser=None):
        with pytest.MonkeyPatch.context() as patch:
            if denoiser is not None:
                patch.setattr(tiny_pipeline, "denoiser", lambda: denoiser)
            out = tiny_pipeline("thunder", 2, generator=torch.Generator().manual_seed(0), output_type="latent")
        return torch.cat([out.frames.flatten(), out.audio.flatten()])

    model = tiny_pipeline.transformer
    assert isinstance(tiny_pipeline.denoiser(), FoldedAVDiT) and tiny_pipeline.denoiser() is tiny_pipeline.denoiser()
    before = clip()
    torch.testing.assert_close(before, clip(model), atol=1e-4, rtol=1e-4)
    state = {name: value.clone() for name, value in model.adapter_state_dict().items()}
    model.load_adapter_state_dict({name: value + 0.02 for name, value in state.items()})
    changed = clip()
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(changed, clip(model), atol=1e-4, rtol=1e-4)
    model.load_adapter_state_dict(state)
    assert torch.equal(clip(), before)


def test_only_small_models_on_a_cpu_are_folded(monkeypatch):
    model = joint_model()
    assert can_fold(model) and not can_fold(joint_model().to("meta"))
    monkeypatch.setattr("avdit.models.inference.LARGEST", 1000)
    assert not can_fold(model)


@torch.no_grad()
def test_preview_shows_what_the_decoder_shows(shipped_pipeline):
    codec = shipped_pipeline.video_codec
    taught, held_out = (
        torch.cat([render_clip(name, seed).frames[:1] for name in CLASSES]).permute(0, 3, 1, 2) * 2 - 1
        for seed in (0, HELD_OUT)
    )
    latents = codec.encode(held_out.unsqueeze(0))
    decoded = F.avg_pool2d(codec.decode(latents)[0], 4)
    shown = Preview.fit(codec, taught)(latents[0])
    plain = decoded.mean((2, 3), keepdim=True).expand_as(decoded)  # one colour a picture

    def psnr_db(picture):
        return 10 * torch.log10(4 / (picture - decoded).square().mean())

    assert psnr_db(shown) > 20 and psnr_db(shown) > psnr_db(plain) + 5
