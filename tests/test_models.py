"""The transformers: equal to the published model, unchanged by fresh adapters, joined once these are trained."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from avdit.geometry import ClipGeometry
from avdit.models.adapters import TimeExchange
from avdit.models.avdit import AVDiT
from avdit.models.convert import (
    diffusers_config,
    dit_from_diffusers,
    dit_from_state,
    from_diffusers,
    load_dit,
    to_diffusers,
)
from avdit.models.dit import DiT
from avdit.models.foley import Foley

GEOMETRY = ClipGeometry(frames=4, height=32, width=32, video_factor=8, video_channels=4, mel_bins=16)


def randomise(module, std=0.1):
    """Draw every trainable-by-name tensor anew, those that start at zero too; fixed positions stay."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def small_dit(**overrides):
    config = {"input_size": 4, "in_channels": 4, "hidden_size": 64, "depth": 4, "num_heads": 2, "num_classes": 3}
    return randomise(DiT(**{**config, **overrides}))


SIZES = {
    "temporal_width": 32,
    "lora_rank": 4,
    "interaction_rank": 4,
    "interaction_pool": 2,
    "exchange_features": 8,
    "anchor_rank": 4,
    "neighbour_rank": 4,
    "temporal_rank": 4,
    "image_rank": 4,
    "foley_width": 8,
}


def joint_model(trained=False, **sizes):
    torch.manual_seed(0)
    model = AVDiT.from_backbone(small_dit(), GEOMETRY, num_classes=3, **{**SIZES, **sizes})
    if trained:
        backbone = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        randomise(model)
        model.backbone.load_state_dict(backbone)
    return model


def inputs(batch=2):
    generator = torch.Generator().manual_seed(2)
    video = torch.randn(batch, GEOMETRY.frames, *GEOMETRY.video_latent_shape, generator=generator)
    audio = torch.randn(batch, *GEOMETRY.audio_latent_shape, generator=generator)
    t_video = torch.randint(0, 1000, (batch, GEOMETRY.frames), generator=generator)
    t_audio = torch.randint(0, 1000, (batch, GEOMETRY.audio_columns), generator=generator)
    return video, audio, t_video, t_audio, torch.arange(batch) % 4


@pytest.mark.parametrize(
    "size", [{}, {"input_size": 16, "hidden_size": 96, "num_heads": 3, "patch_size": 4, "learn_sigma": False}]
)
@torch.no_grad()
def test_equals_diffusers_model(size):
    ours = small_dit(**size, timestep_shift=1)
    theirs = DiTTransformer2DModel(**diffusers_config(ours)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    side = ours.config.input_size
    x, t, y = torch.randn(3, 4, side, side), torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    expected = theirs(x, timestep=t, class_labels=y).sample
    assert expected.abs().mean() > 0.01
    for model in (ours, dit_from_diffusers(theirs)):
        torch.testing.assert_close(model(x, t, y), expected, atol=1e-4, rtol=1e-4)
    # The original spacing of the timestep's frequencies is another model, except at t = 0.
    original = small_dit(**size)
    assert not torch.allclose(original(x, t, y)[1:], expected[1:], atol=1e-2)
    torch.testing.assert_close(original(x, t, y)[:1], expected[:1], atol=1e-4, rtol=1e-4)
    for name, value in from_diffusers(theirs.state_dict()).items():
        torch.testing.assert_close(value, ours.state_dict()[name], atol=0, rtol=0)


def test_published_file_loads(tmp_path):
    ours = small_dit(hidden_size=256, num_heads=4, depth=2)
    state = ours.state_dict()
    save_file(state, tmp_path / "dit.safetensors")
    torch.save({"ema": state, "model": {}}, tmp_path / "dit.pt")
    for name in ("dit.safetensors", "dit.pt"):
        loaded = load_dit(tmp_path / name)
        assert dict(loaded.config)["learn_sigma"] and loaded.config.num_heads == 4
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    theirs = DiTTransformer2DModel(**diffusers_config(ours))
    theirs.load_state_dict(to_diffusers(state))
    theirs.save_pretrained(tmp_path / "theirs")
    assert all(torch.equal(value, state[key]) for key, value in load_dit(tmp_path / "theirs").state_dict().items())


def test_wrong_weights_are_named(tmp_path):
    state = small_dit().state_dict()
    with pytest.raises(ValueError, match="width 64 is of no registered DiT"):
        dit_from_state(state)
    with pytest.raises(ValueError, match=r"'blocks\.2\.mlp\.fc2\.bias' is missing"):
        dit_from_state({k: v for k, v in state.items() if k != "blocks.2.mlp.fc2.bias"}, num_heads=2)
    with pytest.raises(ValueError, match=r"'extra' is unknown"):
        dit_from_state({**state, "extra": torch.zeros(1)}, num_heads=2)
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn\.qkv\.bias' is \(5,\)"):
        dit_from_state({**state, "blocks.1.attn.qkv.bias": torch.zeros(5)}, num_heads=2)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "cut.pt").write_bytes(b"\x80\x02")
    for source in (tmp_path / "cut.safetensors", tmp_path / "cut.pt", tmp_path / "none.pt", tmp_path):
        with pytest.raises(ValueError, match=source.name):
            load_dit(source)


def test_published_size():
    with torch.device("meta"):
        model = DiT.from_name("DiT-XL/2")
    assert sum(p.numel() for p in model.parameters()) == 675_129_632  # with the fixed positions, as published
    with pytest.raises(ValueError, match="DiT-XXL/2"):
        DiT.from_name("DiT-XXL/2")


@torch.no_grad()
def test_fresh_adapters_change_nothing():
    model = joint_model(anchor_rank=0, neighbour_rank=0)
    video, audio, t_video, t_audio, labels = inputs()
    out, sound = model(video, audio, t_video, t_audio, labels)
    image = model.backbone(video.flatten(0, 1), t_video.flatten(), labels.repeat_interleave(GEOMETRY.frames))
    assert out.shape == video.shape and sound.shape == audio.shape and out.abs().mean() > 0.01
    assert torch.equal(out.flatten(0, 1), image[:, : video.shape[2]])


@torch.no_grad()
def test_each_modality_runs_without_the_other():
    model = joint_model(trained=True, image_rank=0, foley_width=0)
    video, audio, t_video, t_audio, labels = inputs()
    out, none = model(video, None, t_video, None, labels)
    none_too, sound = model(None, audio, None, t_audio, labels)
    assert none is None and none_too is None and out.shape == video.shape and sound.shape == audio.shape
    torch.testing.assert_close(model(video, audio, t_video, t_audio, labels, joint=False), (out, sound))
    model.class_embedder.embedding_table.weight.copy_(model.backbone.y_embedder.embedding_table.weight)
    none, sound = model(None, audio, None, t_audio, labels)
    lone = model(video, audio, t_video, t_audio, labels, joint=False, temporal=False)
    image = model.backbone(video.flatten(0, 1), t_video.flatten(), labels.repeat_interleave(GEOMETRY.frames))
    torch.testing.assert_close(lone[1], sound)  # and each frame is the image that the frozen model would make of it
    torch.testing.assert_close(lone[0].flatten(0, 1), image[:, : video.shape[2]])
    for block in model.adapters:  # with the gates closed the other modality makes no difference
        if block.interaction is not None:
            block.interaction.gate_video.zero_()
            block.interaction.gate_audio.zero_()
            block.interaction.exchange = None
    both = model(video, audio, t_video, t_audio, labels)
    torch.testing.assert_close(
        both, (model(video, None, t_video, None, labels)[0], model(None, audio, None, t_audio, labels)[1])
    )


def test_only_adapters_learn():
    model = joint_model(trained=True)
    video, sound = model(*inputs(batch=4))
    (video.square().mean() + sound.square().mean()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("backbone.", "foley.")) or ".image_" in name:
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("sizes", [{}, {"interaction_pool": 1, "exchange_features": 0}])
@torch.no_grad()
def test_picture_and_sound_hear_each_other(sizes):
    model, (video, audio, *rest) = joint_model(trained=True, **sizes), inputs()
    out, sound = model(video, audio, *rest)
    assert not torch.allclose(model(video + 1, audio, *rest)[1], sound)
    assert not torch.allclose(model(video, audio + 1, *rest)[0], out)
    fresh = joint_model()
    assert torch.equal(fresh(video, audio + 1, *rest)[0], fresh(video, audio, *rest)[0])


@torch.no_grad()
def test_anchors_are_added_and_left_out():
    without, (video, *rest) = (
        joint_model(trained=True, temporal_width=0, interaction_every=0, anchor_rank=0, neighbour_rank=0),
        inputs(),
    )
    anchored = without.with_parts(anchor_rank=4)
    assert anchored.config.anchor_rank == 4 and anchored.config.lora_rank == without.config.lora_rank
    other = video.clone()
    other[:, 0] += 1
    changed = (anchored(other, *rest)[0] - anchored(video, *rest)[0]).abs().amax((0, 2, 3, 4))
    assert (changed > 1e-3).all()  # every frame sees the first one
    other = video.clone()
    other[:, 2] += 1
    changed = (anchored(other, *rest)[0] - anchored(video, *rest)[0]).abs().amax((0, 2, 3, 4))
    assert changed.nonzero().flatten().tolist() == [2]
    alone = (False, False)  # as single images frames do not see it
    assert torch.equal(anchored(video, *rest, *alone)[0], without(video, *rest, *alone)[0])
    anchored.load_adapter_state_dict(without.adapter_state_dict())  # a pack from before there were anchors
    torch.testing.assert_close(anchored(video, *rest)[0], without(video, *rest)[0])


@torch.no_grad()
def test_frames_see_those_beside_them():
    left_out = {"temporal_width": 0, "interaction_every": 0, "neighbour_rank": 0}
    without, (video, *rest) = joint_model(trained=True, **left_out), inputs()
    model = without.with_parts(neighbour_rank=4)
    anchor, attention, x = model.adapters[0].anchor, model.backbone.blocks[0].attn, torch.randn(7, 4, 64)
    other = x.clone()
    other[3] += 1
    moved = (anchor(attention, other, 7) - anchor(attention, x, 7)).abs().amax((1, 2))
    assert moved.nonzero().flatten().tolist() == [2, 3, 4] and (moved[2:5] > 1e-3).all()
    model.load_adapter_state_dict(without.adapter_state_dict())  # a pack from before they saw each other
    torch.testing.assert_close(model(video, *rest)[0], without(video, *rest)[0])
    with pytest.raises(ValueError, match="neighbour_rank 4 needs an anchor_rank"):
        joint_model(anchor_rank=0)


@torch.no_grad()
def test_temporal_attention_is_told_timestep_and_class():
    without, (video, audio, t_video, t_audio, labels) = joint_model(trained=True, temporal_rank=0), inputs()
    told = without.with_parts(temporal_rank=4)
    assert told.config.temporal_rank == 4 and told.config.lora_rank == without.config.lora_rank
    sample = (video, audio, t_video, t_audio, labels)
    torch.testing.assert_close(told(*sample), without(*sample))  # fresh, it changes nothing
    temporal = told.adapters[0].temporal
    x, c = torch.randn(GEOMETRY.frames, 4, 64), torch.randn(GEOMETRY.frames, 1, 64)
    same = temporal(x, c, GEOMETRY.frames)
    assert torch.equal(temporal(x, c + 1, GEOMETRY.frames), same)
    randomise(temporal.modulation)
    assert not torch.allclose(temporal(x, c, GEOMETRY.frames), same)
    assert not torch.allclose(temporal(x, c + 1, GEOMETRY.frames), temporal(x, c, GEOMETRY.frames))
    told.load_adapter_state_dict(without.adapter_state_dict())  # a pack from before there was such a layer
    torch.testing.assert_close(told(*sample), without(*sample))


@torch.no_grad()
def test_updates_for_images_change_frames_that_know_of_no_others():
    without, (video, audio, t_video, t_audio, labels) = joint_model(trained=True, image_rank=0), inputs()
    sample, alone = (video, audio, t_video, t_audio, labels), {"joint": False, "temporal": False}
    model = without.with_parts(image_rank=4)
    torch.testing.assert_close(model(*sample, **alone), without(*sample, **alone))  # fresh, they change nothing
    randomise(model.image_parts())
    torch.testing.assert_close(model(*sample), without(*sample))
    assert not torch.allclose(model(*sample, **alone)[0], without(*sample, **alone)[0])
    torch.testing.assert_close(model(*sample, **alone)[1], without(*sample, **alone)[1])
    changed = [model(*sample, **alone, blind=blind)[0] for blind in ((), (1,))]
    assert not torch.allclose(changed[1], without(*sample, **alone, blind=(1,))[0])
    assert not torch.allclose(*changed)
    model.load_adapter_state_dict(without.adapter_state_dict())  # a pack that has none
    torch.testing.assert_close(model(*sample, **alone), without(*sample, **alone))


@torch.no_grad()
def test_sound_leans_on_what_foley_tells_of_the_picture():
    without, sample = joint_model(trained=True, foley_width=0), inputs()
    model = without.with_parts(foley_width=8)
    torch.testing.assert_close(model(*sample), without(*sample))  # fresh, it is not heeded
    randomise(model.foley_embedder)
    told, untold = model(*sample), without(*sample)
    assert not torch.allclose(told[1], untold[1])
    torch.testing.assert_close(model(*sample, joint=False), without(*sample, joint=False))
    model.load_adapter_state_dict(without.adapter_state_dict())  # a pack that has none
    torch.testing.assert_close(model(*sample), untold)


@torch.no_grad()
def test_foley_hears_movement_and_not_what_stands_still():
    torch.manual_seed(0)
    foley = Foley(GEOMETRY, 16, 64)
    video, c = torch.randn(1, GEOMETRY.frames, *GEOMETRY.video_latent_shape), torch.randn(1, GEOMETRY.frames, 64)
    told = foley(video, c)
    assert told.shape == (1, *GEOMETRY.audio_latent_shape)
    torch.testing.assert_close(foley(video + torch.randn_like(video[:, :1]), c), told, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(foley(video.roll(1, 1), c), told, atol=1e-3)


@torch.no_grad()
def test_exchange_keeps_the_moment():
    exchange = randomise(TimeExchange(16, 8, frames=16, columns=20, rows=4))
    video, audio = torch.randn(1, 16, 9, 16), torch.randn(1, 80, 16)
    for_video, for_audio = exchange(video, audio)
    louder, brighter = audio.clone(), video.clone()
    louder[:, 10 * 4 : 11 * 4] += 1  # the column from 0.8 to 0.88 s: the middle of frame 8 and what is next to it
    brighter[:, 8] += 1
    moved = (exchange(video, louder)[0] - for_video).abs().amax((0, 2, 3))
    assert moved.nonzero().flatten().tolist() in ([8], [7, 8], [8, 9]) and moved.argmax() == 8
    moved = (exchange(brighter, audio)[1] - for_audio).abs().amax((0, 2)).view(20, 4).amax(1)
    assert set(moved.nonzero().flatten().tolist()) <= {9, 10, 11} and moved.argmax() == 10


LEFT_OUT = [
    {"temporal_width": 0},
    {"lora_rank": 0},
    {"interaction_every": 0},
    {"exchange_features": 0},
    {"anchor_rank": 0, "neighbour_rank": 0},
    {"neighbour_rank": 0},
    {"temporal_rank": 0},
    {"image_rank": 0},
    {"foley_width": 0},
]


@pytest.mark.parametrize("left_out", LEFT_OUT, ids=str)
def test_parts_can_be_left_out(left_out):
    part, full = joint_model(trained=True, **left_out), joint_model()
    assert part.trainable_share < full.trainable_share
    (part(*inputs())[0].mean() + part(*inputs())[1].mean()).backward()
    assert all(p.grad is not None for p in part.adapter_parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in [*part.backbone.parameters(), *part.image_parts().parameters()])
    assert part.foley is None or not any(p.requires_grad for p in part.foley.parameters())


@torch.no_grad()
def test_timestep_of_one_frame_changes_that_frame_alone():
    model, (video, audio, t_video, t_audio, labels) = joint_model(anchor_rank=0, neighbour_rank=0), inputs()
    randomise(model.audio_final)
    out, sound = model(video, audio, t_video, t_audio, labels)
    later = t_video.clone()
    later[:, 3] = (later[:, 3] + 500) % 1000
    changed, same_sound = model(video, audio, later, t_audio, labels)
    assert torch.equal(changed[:, :3], out[:, :3]) and torch.equal(same_sound, sound)
    assert not torch.allclose(changed[:, 3], out[:, 3])


@torch.no_grad()
@torch.no_grad()
def test_places_of_a_picture_see_each_other_unless_they_are_blind():
    model, (video, _, t_video, _, labels) = joint_model(trained=True), inputs()
    changed = video.clone()
    changed[:, :, :, :2, :2] += 1.0  # the first token of every frame
    for blind, alone in (((), False), ((1, 2), False), (range(4), True)):
        before, after = (
            model(x, None, t_video, None, labels, joint=False, temporal=False, blind=blind)[0] for x in (video, changed)
        )
        moved = (after - before).abs()
        assert moved[..., :2, :2].max() > 1e-3
        assert (moved[..., 2:, :].max() < 1e-6) == alone


def test_save_and_load(tmp_path):
    model, sample = joint_model(trained=True), inputs()
    model.save_pretrained(tmp_path / "joint")
    loaded = AVDiT.from_pretrained(tmp_path / "joint")
    for ours, theirs in zip(loaded(*sample), model(*sample), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    model.backbone.save_pretrained(tmp_path / "dit")
    assert torch.equal(load_dit(tmp_path / "dit").pos_embed, model.backbone.pos_embed)


@torch.no_grad()
def test_loads_and_runs_in_bfloat16(tmp_path):
    joint_model(trained=True).save_pretrained(tmp_path)
    half, (video, audio, *rest) = AVDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), inputs()
    out, sound = half(video.bfloat16(), audio.bfloat16(), *rest)
    assert out.isfinite().all() and sound.isfinite().all()


@torch.no_grad()
def test_packs_swap_on_one_backbone():
    trained, fresh, sample = joint_model(trained=True), joint_model(), inputs()
    pack = {k: v.clone() for k, v in trained.adapter_state_dict().items()}
    assert not any(name.startswith("backbone.") for name in pack)
    fresh.load_adapter_state_dict(pack)
    for ours, theirs in zip(fresh(*sample), trained(*sample), strict=True):
        assert torch.equal(ours, theirs)
    name = sorted(pack)[0]
    with pytest.raises(ValueError, match=name):
        fresh.load_adapter_state_dict({k: v for k, v in pack.items() if k != name})
    with pytest.raises(ValueError, match="stranger"):
        fresh.load_adapter_state_dict({**pack, "stranger": torch.zeros(1)})


def test_parameter_table_counts_everything():
    model = joint_model()
    table = model.parameter_table()
    assert sum(table.values()) == sum(p.numel() for p in model.parameters())
    assert table["backbone"] == sum(p.numel() for p in model.backbone.parameters())
