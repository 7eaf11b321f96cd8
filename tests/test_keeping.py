"""While a backbone learns from other images, what the packs on it make stays nearly as it was."""

import pytest
import torch

from avdit.data.latents import write_shard
from avdit.data.scenes import CLASSES
from avdit.models.dit import DiT
from avdit.pipeline import AVDiTPipeline
from avdit.training import backbone


def made(pipe: AVDiTPipeline) -> torch.Tensor:
    """Finished latents of a thunder clip, picture and sound in one row."""
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    out = pipe("thunder", num_inference_steps=3, generator=draw, output_type="latent")
    return torch.cat([out.frames.flatten(), out.audio.flatten()])


def settings(checkpoint, folder, weight, **keeps):
    """Of a few fast steps on images of one colour each, which the backbone of ``checkpoint`` has never seen."""
    train = {"steps": 40, "batch_size": 8, "learning_rate": 2e-3, "sample_every": 0, "warmup_steps": 1}
    keeps = {"pipeline": str(checkpoint), "packs": ["own"], "weight": weight, "clips": 2, **keeps}
    data = {"codecs": str(checkpoint), "pack": "landscape", "clips": 1, "cache": str(folder)}
    return {**data, "start": str(folder / "start"), "keeps": keeps, "train": train}


@pytest.fixture
def clips(tiny_checkpoint, tmp_path):
    """A folder with latents of one clip a class, and the backbone of the pipeline."""
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.transformer.backbone.save_pretrained(tmp_path / "start")
    draw, clip = torch.Generator().manual_seed(0), pipe.geometry
    video = torch.randn(len(CLASSES), 1, clip.video_channels, 1, 1, generator=draw)
    shard = {"video": 3 * video.expand(-1, clip.frames, -1, *clip.video_latent_shape[1:])}
    shard |= {"audio": torch.randn(len(CLASSES), *clip.audio_latent_shape, generator=draw)}
    shard = {name: value.half() for name, value in shard.items()} | {"label": torch.arange(len(CLASSES))}
    write_shard(tmp_path / "latents" / "landscape" / "clips-00000000.safetensors", shard)
    return tmp_path


def test_kept_packs_make_what_they_made(tiny_checkpoint, clips):
    before, moved = made(AVDiTPipeline.from_pretrained(tiny_checkpoint)), {}
    for weight in (0.0, 100.0):
        backbone.run(settings(tiny_checkpoint, clips, weight), clips / str(weight))
        learned = DiT.from_pretrained(clips / str(weight) / "backbone")
        pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
        assert not torch.equal(learned.blocks[0].attn.qkv.weight, pipe.transformer.backbone.blocks[0].attn.qkv.weight)
        pipe.transformer.backbone.load_state_dict(learned.state_dict())
        moved[weight] = (made(pipe) - before).square().mean().item()
    assert moved[100.0] < 0.3 * moved[0.0]


def test_a_pack_that_cannot_be_kept_is_named(tiny_checkpoint, clips):
    for wrong, message in (
        ({"packs": ["dance"]}, "keeps 'dance', a pack that the pipeline does not have: own"),
        ({"pipeline": None}, "keeps is for one process and names the pipeline of its packs"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone.run(settings(tiny_checkpoint, clips, 1.0, **wrong), clips / "none")
    assert not (clips / "none").exists()
