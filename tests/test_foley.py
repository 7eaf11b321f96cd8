"""What tells a clip's sound from its picture learns that alone; nothing sounds otherwise before adapters heed it."""

import pytest
import torch
from torch import Tensor

from avdit.data.latents import write_shard
from avdit.data.scenes import CLASSES
from avdit.geometry import ClipGeometry
from avdit.pipeline import AVDiTPipeline
from avdit.training import foley as stage

CLIPS = 8  # of each class


def flashes(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of clips in which something is seen in one frame of each, ``moments`` (n,), and heard in that moment."""
    clip, draw = ClipGeometry(), torch.Generator().manual_seed(0)
    rows = torch.arange(len(moments))
    video = torch.randn(len(moments), 1, *clip.video_latent_shape, generator=draw).repeat(1, clip.frames, 1, 1, 1)
    video[rows, moments, :, 4:12, 4:12] += 2
    audio = torch.zeros(len(moments), *clip.audio_latent_shape)
    heard = ((moments + 0.5) * audio.shape[2] / clip.frames).long()
    for offset in (-1, 0, 1):
        audio[rows, :, heard + offset] = 2.0
    return video, audio


@pytest.fixture(scope="module")
def one_pack(tiny_checkpoint, tmp_path_factory):
    """A pipeline without such a network, and a configuration to teach it one from clips with a flash each."""
    folder = tmp_path_factory.mktemp("foley")
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.register_modules(transformer=pipe.transformer.with_parts(foley_width=0))
    pipe.save_pretrained(folder / "one")
    moments = torch.randint(1, 15, (CLIPS * len(CLASSES),), generator=torch.Generator().manual_seed(1))
    video, audio = flashes(moments)
    shard = {"video": video.half(), "audio": audio.half(), "label": torch.arange(len(CLASSES)).repeat(CLIPS)}
    write_shard(folder / "latents" / "landscape" / "clips-00000000.safetensors", shard)
    train = {"steps": 120, "batch_size": 32, "warmup_steps": 5, "check_every": 0}
    return AVDiTPipeline.from_pretrained(folder / "one"), {
        "pipeline": str(folder / "one"),
        "clips": 1,
        "cache": str(folder),
        "foley_width": 32,
        "tasks": {"v2a": 1.0},
        "train": train,
    }


def test_it_tells_when_something_is_heard_and_nothing_else_moves(one_pack, tmp_path):
    before, config = one_pack
    assert stage.run(config, tmp_path / "out", dry_run=True)["seconds_per_step"] > 0
    assert not (tmp_path / "out").exists()
    stage.run(config, tmp_path / "out")
    after = AVDiTPipeline.from_pretrained(tmp_path / "out" / "pipeline", torch_dtype=torch.float32)
    moments = torch.tensor([3, 7, 12])
    video, audio = flashes(moments)
    with torch.no_grad():
        told = stage.Listener(after.transformer)(video, torch.zeros(3, 16, dtype=torch.long), moments * 0)
    loudest = told.mean((1, 3)).argmax(1), audio.mean((1, 3)).argmax(1)
    assert (loudest[0] - loudest[1]).abs().max() <= 2  # of 40 steps in 1.6 seconds

    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    assert all(torch.equal(value, old[name].bfloat16().float()) for name, value in new.items() if name in old)
    assert {name.split(".")[0] for name in new.keys() - old.keys()} == {"foley", "foley_embedder"}
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    clips = [
        pipe("thunder", generator=torch.Generator().manual_seed(0), **settings) for pipe in (before.to("cpu"), after)
    ]
    assert torch.allclose(clips[0].audio, clips[1].audio, atol=0.05)


@pytest.mark.parametrize("width", [0, 6, 2.5, True])
def test_a_width_that_cannot_be_is_told_in_a_sentence(one_pack, tmp_path, width):
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        stage.run({**one_pack[1], "foley_width": width}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
