"""Several packs of adapters on one backbone: the class chooses, nothing is lost when they take turns."""

import copy
from dataclasses import replace

import pytest
import torch

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
