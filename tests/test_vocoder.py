"""Vocoders: how they are configured and trained, and that sounds neither move nor change from call to call."""

import json

import pytest
import torch

from avdit.data.latents import write_shard
from avdit.data.scenes import render_clip
from avdit.models.audio_codec import AudioCodec
from avdit.models.vocoder import GriffinLim, SpectralVocoder
from avdit.training import vocoder

SMALL = {"kind": "spectral", "width": 32, "depth": 1}


@pytest.fixture(scope="module")
def codec() -> AudioCodec:
    torch.manual_seed(0)
    return AudioCodec(vocoder=SMALL).eval()


def test_configuration_chooses_the_vocoder(codec):
    assert isinstance(AudioCodec().synthesiser, GriffinLim)
    assert isinstance(codec.synthesiser, SpectralVocoder)
    with pytest.raises(ValueError, match="unknown vocoder 'hifi'"):
        AudioCodec(vocoder={"kind": "hifi"})


@torch.no_grad()
def test_same_mel_always_sounds_the_same(codec):
    mel = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1)) - 4
    sounds = codec.synthesise(mel)
    assert sounds.shape == (3, 40 * 160) and sounds.std() > 1e-3
    torch.testing.assert_close(codec.synthesise(mel), sounds, atol=0, rtol=0)
    torch.testing.assert_close(codec.synthesise(mel[1:2]), sounds[1:2], atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, SMALL], ids=["griffin-lim", "spectral"])
def test_a_click_stays_where_it_is(kind):
    torch.manual_seed(0)
    codec = AudioCodec(vocoder=kind)
    for place in (3000, 6417, 9080):
        click = 1e-3 * torch.randn(1, 12800, generator=torch.Generator().manual_seed(0))
        click[:, place : place + 16] += 0.8
        energy = codec.synthesise(codec.log_mel(click))[0].square()
        centre = float((energy * torch.arange(12800)).sum() / energy.sum())
        assert abs(centre - place - 8) < 160  # 10 ms


def test_training_lowers_the_loss_and_saves_a_codec_that_sounds(tmp_path):
    torch.manual_seed(0)
    plain = AudioCodec().eval()
    plain.save_pretrained(tmp_path / "codecs" / "audio_codec")
    audio = torch.stack([render_clip(name, 0).audio for name in ("underwater bubbling", "house")])
    write_shard(tmp_path / "clips" / "clips-00000000.safetensors", {"audio": audio, "label": torch.tensor([6, 15])})
    train = {"steps": 60, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 5, "ema_decay": 0.8}
    config = {
        "codecs": str(tmp_path / "codecs"),
        "cache": str(tmp_path),
        "clips": 0,
        "crop": 32,
        "rebuilt": 0.0,
    }  # its VAE has learned nothing
    config |= {"vocoder": {"width": 32, "depth": 1}, "train": {**train, "sample_every": 60}}
    out = tmp_path / "run"

    cost = vocoder.run(config, out, dry_run=True)
    assert cost["parameters"]["trainable"] > 0 and not out.exists()

    vocoder.run(config, out)
    rows = [json.loads(line) for line in (out / "vocoder" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (out / "vocoder" / "samples-000060.png").is_file()
    codec = AudioCodec.from_pretrained(out / "audio_codec").eval()
    for name, value in plain.autoencoder.state_dict().items():  # what was trained on its latents stays right
        torch.testing.assert_close(codec.autoencoder.state_dict()[name], value.bfloat16().float(), atol=0, rtol=0)
    with torch.no_grad():
        mel = codec.log_mel(audio)
        sound = codec.synthesise(mel)
        assert sound.shape == audio.shape
        assert (codec.log_mel(sound) - mel).abs().mean() < 0.4

    again = vocoder.run({**config, "start": str(out)}, tmp_path / "again", dry_run=True)
    assert again["parameters"] == cost["parameters"]
    with pytest.raises(ValueError, match="no spectral vocoder to start from"):
        vocoder.run({**config, "start": str(tmp_path / "codecs")}, tmp_path / "again")
    with pytest.raises(ValueError, match="has no audio_codec"):
        vocoder.run({**config, "codecs": str(tmp_path)}, tmp_path / "again")
