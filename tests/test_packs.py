"""Several packs of adapters on one backbone: the class chooses, nothing is lost when they take turns."""

import copy
from dataclasses import replace

import pytest
import torch

from avdit.models.avdit import AVDiT
from avdit.packs import PACK_FILE, Pack
from avdit.pipeline import AVDiTPipeline

SETTINGS = {"num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture
def pipe(tiny_checkpoint):
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def other_pack(pipe, classes=("krump", "house")):
    state = copy.deepcopy(pipe.transformer.adapter_state_dict())
    table = "class_embedder.embedding_table.weight"
    state[table] = state[table][: len(classes) + 1]
    generator = torch.Generator().manual_seed(1)
    return Pack(list(classes), {k: torch.randn(v.shape, generator=generator) * 0.05 for k, v in state.items()})


def clip(pipe, label):
    return pipe(label, generator=torch.Generator().manual_seed(0), **SETTINGS)


def quick(pipe, label):
    return pipe(label, turbo=True, generator=torch.Generator().manual_seed(0), output_type="latent")


def test_class_chooses_the_pack(pipe, tmp_path):
    before = clip(pipe, "thunder")
    pipe.add_pack("dance", other_pack(pipe))
    assert list(pipe.packs) == ["own", "dance"] and pipe.classes[-2:] == ["krump", "house"]
    dance = clip(pipe, "house")
    assert not torch.allclose(dance.frames, before.frames, atol=0.01)
    assert torch.equal(clip(pipe, "thunder").frames, before.frames)  # its adapters are back
    assert torch.equal(clip(pipe, 10).audio, dance.audio)
    clip(pipe, "krump")  # saved while another pack than the first is in use
    pipe.save_pretrained(tmp_path)
    again = AVDiTPipeline.from_pretrained(tmp_path)
    assert again.packs == pipe.packs
    assert torch.equal(clip(again, "house").frames, dance.frames)
    assert torch.equal(clip(again, "thunder").frames, before.frames)


def test_a_pack_says_how_its_clips_begin(pipe, tmp_path):
    pipe.add_pack("dance", replace(other_pack(pipe), factorized=True))
    pipe.save_pretrained(tmp_path)
    again = AVDiTPipeline.from_pretrained(tmp_path)
    for label, factorized in (("house", True), ("thunder", False), ("krump", True)):
        made = clip(again, label)
        for flag in (True, False):
            told = again(label, generator=torch.Generator().manual_seed(0), factorized=flag, **SETTINGS)
            assert torch.equal(made.frames, told.frames) == (flag == factorized)


def test_compact_packs_make_nearly_the_same_clips(pipe, tmp_path):
    """Kept as 8-bit differences, turbo adapters take half the room; what they make hardly changes."""
    own = pipe.transformer.adapter_state_dict()
    noise = torch.Generator().manual_seed(2)
    distilled = {name: value + 0.01 * torch.randn(value.shape, generator=noise) for name, value in own.items()}
    turbo = Pack(pipe.classes, distilled, steps=2)

    def saved(name, pack, into):
        into.add_pack("own-turbo", pack)
        into.save_pretrained(tmp_path / name)
        return (tmp_path / name / "packs" / "own-turbo" / PACK_FILE).stat().st_size

    full = replace(turbo, state={k: v.bfloat16() for k, v in distilled.items()})
    sizes = (
        saved("full", full, copy.deepcopy(pipe)),
        saved("compact", replace(turbo, compact=True), copy.deepcopy(pipe)),
    )
    pipe.add_pack("own-turbo", turbo)
    joint, made = clip(pipe, "thunder"), quick(pipe, "thunder")
    assert sizes[1] < 0.65 * sizes[0]
    again = AVDiTPipeline.from_pretrained(tmp_path / "compact")
    restored = quick(again, "thunder")
    far, near = ((other - made.frames).abs().mean() for other in (joint.frames, restored.frames))
    assert 0 < near < 0.1 * far
    again.save_pretrained(tmp_path / "twice")  # it stays compact and loses nothing more
    twice = AVDiTPipeline.from_pretrained(tmp_path / "twice")
    assert torch.allclose(quick(twice, "thunder").frames, restored.frames, atol=1e-4)
    alone = tmp_path / "compact" / "packs" / "own-turbo"
    with pytest.raises(ValueError, match="differences from other adapters, and none were given"):
        Pack.load(alone)
    with pytest.raises(ValueError, match="is in one of them alone"):
        Pack.load(alone, lambda classes: dict(list(own.items())[1:]))


def test_compact_joint_packs_need_no_others(pipe, tmp_path):
    """Adapters for guided steps are kept as 8-bit numbers of their own; what they make hardly changes."""
    dance = other_pack(pipe)
    sizes = {}
    for name, pack in (
        ("full", replace(dance, state={k: v.bfloat16() for k, v in dance.state.items()})),
        ("half", dance),
    ):
        into = copy.deepcopy(pipe)
        into.add_pack("dance", replace(pack, compact=name == "half"))
        into.add_pack("dance-turbo", replace(dance, state={k: 1.01 * v for k, v in dance.state.items()}, steps=2))
        into.save_pretrained(tmp_path / name)
        sizes[name] = (tmp_path / name / "packs" / "dance" / PACK_FILE).stat().st_size
    assert sizes["half"] < 0.65 * sizes["full"]
    pipe.add_pack("dance", dance)
    other, made = clip(pipe, "thunder"), clip(pipe, "house")
    again = AVDiTPipeline.from_pretrained(tmp_path / "half")
    restored = clip(again, "house")
    far, near = ((sample.frames - made.frames).abs().mean() for sample in (other, restored))
    assert 0 < near < 0.03 * far
    again.save_pretrained(tmp_path / "twice")
    twice = AVDiTPipeline.from_pretrained(tmp_path / "twice")
    assert torch.allclose(clip(twice, "house").frames, restored.frames, atol=1e-4)


def test_compact_packs_take_no_room_for_what_did_not_change(pipe, tmp_path):
    own = pipe.transformer.adapter_state_dict()
    name = "audio_final.linear.weight"
    turbo = Pack(pipe.classes, {**own, name: own[name] + 0.01}, steps=2, compact=True)
    turbo.save(tmp_path, own)
    assert (tmp_path / PACK_FILE).stat().st_size < 0.2 * sum(4 * value.numel() for value in own.values())
    again = Pack.load(tmp_path, lambda classes: own).state
    assert {key for key, value in again.items() if not torch.equal(value, own[key])} == {name}
    torch.testing.assert_close(again[name], turbo.state[name], atol=1e-3, rtol=0)


def test_a_pack_brings_parts_that_the_first_one_lacks(pipe, tmp_path):
    """Updates for images and what hears the picture take room in the files of those packs alone that have them."""
    lacks = {"image_rank": 0, "foley_width": 0, "temporal_rank": 0}
    dance, turbo = other_pack(pipe), other_pack(pipe)
    pipe.register_modules(transformer=pipe.transformer.with_parts(**lacks))
    plain = Pack(pipe.classes, pipe.transformer.adapter_state_dict(), steps=2, compact=True)
    before = clip(pipe, "thunder")
    pipe.add_pack("dance", dance)
    pipe.add_pack("dance-turbo", replace(turbo, steps=2, compact=True))
    pipe.add_pack("own-turbo", plain)
    made = clip(pipe, "house"), quick(pipe, "house"), quick(pipe, "thunder")
    assert torch.allclose(clip(pipe, "thunder").frames, before.frames, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    saved = AVDiT.load_config(tmp_path / "transformer")
    assert {name: saved[name] for name in lacks} == lacks
    again = AVDiTPipeline.from_pretrained(tmp_path)
    for label, sample, first in (("house", clip, made[0]), ("house", quick, made[1]), ("thunder", quick, made[2])):
        for part in ("frames", "audio"):
            torch.testing.assert_close(sample(again, label)[part], first[part], atol=1e-3, rtol=1e-3)
    (tmp_path / "packs" / "dance" / PACK_FILE).unlink()  # who wants the first pack alone need not keep the others
    (tmp_path / "packs" / "dance-turbo" / PACK_FILE).unlink()
    alone = AVDiTPipeline.from_pretrained(tmp_path)
    assert torch.allclose(quick(alone, "thunder").frames, made[2].frames, atol=1e-4)


def test_a_pack_hears_the_picture_with_a_network_of_its_own_size(pipe, tmp_path):
    wider = copy.copy(pipe)
    wider.register_modules(transformer=pipe.transformer.with_parts(foley_width=0).with_parts(foley_width=16))
    dance = other_pack(wider)
    before = clip(pipe, "thunder")
    pipe.add_pack("dance", dance)
    house = clip(pipe, "house")
    assert torch.allclose(clip(pipe, "thunder").audio, before.audio, atol=1e-5)
    damaged = {**dance.state, "foley.out.bias": dance.state["foley.out.bias"][1:]}
    with pytest.raises(ValueError, match="does not fit: 'foley.out.bias'"):
        pipe.transformer.load_adapter_state_dict(damaged)
    assert torch.allclose(clip(pipe, "thunder").audio, before.audio, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    again = AVDiTPipeline.from_pretrained(tmp_path)
    assert torch.allclose(clip(again, "house").audio, house.audio, atol=1e-4)
    assert not any(p.requires_grad for p in again.transformer.foley.parameters())


def test_packs_load_whatever_their_folders_are_called(pipe, tmp_path):
    dance = other_pack(pipe)
    pipe.add_pack("dance", dance)
    pipe.add_pack("a-quick-dance", replace(dance, steps=2, compact=True))  # before the pack that it needs, by name
    pipe.save_pretrained(tmp_path)
    again = AVDiTPipeline.from_pretrained(tmp_path)
    assert again.packs == pipe.packs and again.turbo_steps("house") == 2
    assert torch.allclose(quick(again, "house").frames, quick(pipe, "house").frames, atol=1e-4)


def test_packs_that_cannot_be_used(pipe, tmp_path):
    before = clip(pipe, "thunder")
    with pytest.raises(ValueError, match="already"):
        pipe.add_pack("own", other_pack(pipe))
    with pytest.raises(ValueError, match="'thunder' already"):
        pipe.add_pack("dance", other_pack(pipe, ("thunder", "house")))
    unfit = other_pack(pipe)
    unfit.state.pop("audio_final.linear.bias")
    with pytest.raises(ValueError, match=r"'audio_final\.linear\.bias' is missing"):
        pipe.add_pack("dance", unfit)
    assert list(pipe.packs) == ["own"] and torch.equal(clip(pipe, "thunder").frames, before.frames)
    pipe.add_pack("dance", other_pack(pipe))
    with pytest.raises(ValueError, match="several packs, own and dance"):
        pipe(["thunder", "krump"], **SETTINGS)
    other_pack(pipe).save(tmp_path)
    path = tmp_path / PACK_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=PACK_FILE):
        Pack.load(tmp_path)
