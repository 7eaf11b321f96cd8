"""The video decoder for what a model makes: remade clips, and what is learned from them."""

import pytest
import torch

from avdit.data.scenes import render_clip
from avdit.pipeline import AVDiTPipeline
from avdit.training import decoder
from avdit.training.decoder import remade

SHORT = {"steps": 2, "batch_size": 2, "sample_every": 0, "warmup_steps": 1}


def latents(pipe, names, seed=0):
    clips = [render_clip(name, seed) for name in names]
    frames = torch.stack([clip.frames for clip in clips]).movedim(-1, 2) * 2 - 1
    with torch.no_grad():
        video = pipe.video_codec.encode(frames.to(pipe.dtype)).float()
        audio = pipe.audio_codec.encode(torch.stack([clip.audio for clip in clips]).to(pipe.dtype)).float()
    return video, audio


@pytest.mark.parametrize("turbo", [False, True])
def test_a_remade_clip_keeps_its_layout_but_is_the_models(shipped_pipeline, turbo):
    names = ["waterfall burbling", "fire crackling"]
    video, audio = latents(shipped_pipeline, names)
    made = remade(shipped_pipeline, video, audio, names, turbo, 12, 0.7, torch.Generator().manual_seed(0))
    near = (made - video).square().mean((1, 2, 3, 4))
    far = (made - video.flip(0)).square().mean((1, 2, 3, 4))
    assert (near > 0.01).all() and (near < far / 3).all()


def test_of_a_dance_the_first_frame_stays(shipped_pipeline):
    video, audio = latents(shipped_pipeline, ["house"])
    made = remade(shipped_pipeline, video, audio, ["house"], False, 12, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, 0], video[:, 0])
    assert ((made - video).square().mean((2, 3, 4))[0, 1:] > 1e-3).all()


def test_the_decoder_alone_learns(tmp_path, tiny_checkpoint):
    config = {"pipeline": str(tiny_checkpoint), "clips": 1, "remade": 1, "sampling_steps": 2, "train": SHORT}
    decoder.run(config, tmp_path)
    before, after = (AVDiTPipeline.from_pretrained(path) for path in (tiny_checkpoint, tmp_path / "pipeline"))
    old, new = before.video_codec.float().state_dict(), after.video_codec.float().state_dict()
    changed = {name for name, value in old.items() if not torch.equal(new[name], value.to(torch.bfloat16).float())}
    assert changed and all(name.startswith("autoencoder.decoder.") for name in changed)
    assert after.packs == before.packs
    told = decoder.run(config, tmp_path / "dry", dry_run=True)
    decoders = sum(p.numel() for p in before.video_codec.autoencoder.decoder.parameters())
    assert told["parameters"]["trainable"] == decoders
    assert not (tmp_path / "dry").exists()
    # The same clips remade more often are other ones: what lies in the cache is not taken for them.
    decoder.run({**config, "remade": 2, "cache": str(tmp_path)}, tmp_path / "more")
    assert (tmp_path / "more" / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"remade": 0}, "remade"),
        ({"adversarial_weight": -1}, "adversarial_weight"),
        ({"eta": 2}, "eta"),
        ({"train": {"batch_size": 1}}, "batch_size 1 must be 2 or more"),
        ({"train": {"stepps": 1}}, "unknown training setting 'stepps'"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        decoder.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
