"""The codecs' interface: own small ones, and published layouts saved to disk with random weights."""

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from avdit.data.scenes import HELD_OUT, render_clip
from avdit.models.audio_codec import AudioCodec
from avdit.models.codec import Upsample
from avdit.models.features import ImageFeatures, feature_distance
from avdit.models.video_codec import VideoCodec

TINY = {"block_out_channels": (32,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
TINY |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def clip():
    return render_clip("explosion", HELD_OUT)


def test_own_codecs_have_the_geometry_of_the_small_model():
    video, audio = VideoCodec().eval(), AudioCodec().eval()
    with torch.no_grad():
        latents = video.encode(torch.zeros(1, 2, 3, 256, 256))
        assert latents.shape == (1, 2, 16, 16, 16)
        assert video.decode(latents).shape == (1, 2, 3, 256, 256)
        latents = audio.encode(torch.zeros(1, 25600))
        assert latents.shape == (1, 8, 40, 16)
        assert audio.decode(latents).shape == (1, 25600)


@torch.no_grad()
def test_doubling_is_that_of_diffusers():
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(VideoCodec().autoencoder.config).eval()
    latents = torch.randn(2, 16, 6, 4)
    expected = theirs.decode(latents).sample
    codec = VideoCodec().eval()
    codec.autoencoder.load_state_dict(theirs.state_dict())  # under the same names
    torch.testing.assert_close(codec.autoencoder.decode(latents).sample, expected, atol=1e-5, rtol=1e-4)
    assert sum(isinstance(module, Upsample) for module in codec.modules()) == 2


def test_statistics_normalise_and_survive_saving(tmp_path):
    codec = VideoCodec().eval()
    codec.set_statistics(torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16))
    codec.save_pretrained(tmp_path)
    loaded = VideoCodec.from_pretrained(tmp_path)
    frames = torch.rand(1, 1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        raw = codec.posterior(frames[0]).mode()
        latents = loaded.encode(frames)[0]
        torch.testing.assert_close(
            latents,
            (raw - torch.linspace(-1, 1, 16).view(-1, 1, 1)) / torch.linspace(0.5, 2, 16).view(-1, 1, 1),
            atol=1e-5,
            rtol=1e-5,
        )
        torch.testing.assert_close(loaded.denormalise(latents), raw, atol=1e-5, rtol=1e-5)


def test_stable_diffusion_vae_layout_loads(tmp_path):
    AutoencoderKL(latent_channels=4, scaling_factor=0.18215, **TINY).save_pretrained(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    codec = VideoCodec.from_vae(vae).eval()
    frames = torch.rand(1, 2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = codec.encode(frames)
        assert latents.shape == (1, 2, 4, 8, 8)
        expected = vae.encode(frames[0]).latent_dist.mode() * 0.18215
        torch.testing.assert_close(latents[0], expected, atol=1e-5, rtol=1e-4)
        codec.save_pretrained(tmp_path / "codec")
        again = VideoCodec.from_pretrained(tmp_path / "codec")
        torch.testing.assert_close(again.decode(latents), codec.decode(latents))


def test_audioldm_vae_and_vocoder_layouts_load(tmp_path):
    blocks = {"block_out_channels": (32,) * 3, "down_block_types": ("DownEncoderBlock2D",) * 3}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1}
    AutoencoderKL(in_channels=1, out_channels=1, latent_channels=8, scaling_factor=0.9, **blocks).save_pretrained(
        tmp_path / "vae"
    )
    voice = SpeechT5HifiGanConfig(
        model_in_dim=64,
        upsample_initial_channel=32,
        upsample_rates=[5, 4, 2, 2, 2],
        normalize_before=False,
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    SpeechT5HifiGan(voice).save_pretrained(tmp_path / "vocoder")
    codec = AudioCodec.from_parts(
        AutoencoderKL.from_pretrained(tmp_path, subfolder="vae"),
        SpeechT5HifiGan.from_pretrained(tmp_path, subfolder="vocoder"),
    ).eval()
    with torch.no_grad():
        latents = codec.encode(torch.randn(2, 25600) * 0.1)
        assert latents.shape == (2, 8, 40, 16)
        sound = codec.decode(latents)
        assert sound.shape == (2, 25600)
        codec.save_pretrained(tmp_path / "codec")
        torch.testing.assert_close(AudioCodec.from_pretrained(tmp_path / "codec").decode(latents), sound)


def test_vocoder_keeps_onsets_and_spectrum(clip):
    codec = AudioCodec()
    mel = codec.log_mel(clip.audio[None])
    sound = codec.synthesiser(mel)
    assert sound.shape == (1, 25600)
    assert (codec.log_mel(sound) - mel).abs().mean() < 0.8

    def loudest_rise(audio):
        energy = audio.square().unfold(-1, 320, 160).mean(-1)
        return (energy[..., 2:] - energy[..., :-2]).argmax().item() / 100

    assert abs(loudest_rise(sound[0]) - loudest_rise(clip.audio)) <= 0.03


def test_feature_distance_minds_lost_detail_more_than_a_shift_of_colour(clip):
    frames = clip.frames[::4].permute(0, 3, 1, 2) * 2 - 1
    features = ImageFeatures()
    blurred = torch.nn.functional.avg_pool2d(frames, 7, 1, 3, count_include_pad=False)
    error = (blurred - frames).abs().mean()
    with torch.no_grad():
        wanted = features(frames)
        same, soft, shifted = (feature_distance(features(x), wanted).mean() for x in (frames, blurred, frames + error))
    assert same == 0 and soft > 2 * shifted > 0
