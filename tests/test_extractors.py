"""Feature networks from files in their published interfaces: I3D as TorchScript, AudioCLIP and VGGish as weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn

from avdit.evaluation.audioclip import AudioCLIP, resampled
from avdit.evaluation.extractors import audio_features, video_features
from avdit.evaluation.vggish import VGGish

# As vggish-10086976.pth names and shapes them.
PUBLISHED = {
    "features.0": (64, 1, 3, 3),
    "features.3": (128, 64, 3, 3),
    "features.6": (256, 128, 3, 3),
    "features.8": (256, 256, 3, 3),
    "features.11": (512, 256, 3, 3),
    "features.13": (512, 512, 3, 3),
    "embeddings.0": (4096, 12288),
    "embeddings.2": (4096, 4096),
    "embeddings.4": (128, 4096),
}


class PublishedI3D(nn.Module):
    """The call of i3d_torchscript.pt: three switches, and 400 values before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv3d(3, 400, (2, 7, 7), stride=(2, 32, 32))

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        if rescale:
            x = x / 255 * 2 - 1
        if resize:
            x = nn.functional.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear")
        logits = self.body(x).mean(dim=[2, 3, 4])
        return logits if return_features else logits.softmax(1)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in PUBLISHED.items():
        fan = int(np.prod(shape[1:]))
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.01
    return state


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Log-mel frames (T, 64) as AudioSet's code defines them, written out step by step."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([samples[i : i + 400] * window for i in range(0, len(samples) - 399, 160)])
    magnitude = np.abs(np.fft.rfft(frames, 512))

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges, bins = np.linspace(mel(125), mel(7500), 66), mel(np.linspace(0, 8000, 257))
    bank = np.zeros((257, 64))
    for k in range(64):
        lower, centre, upper = edges[k : k + 3]
        rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
        bank[:, k] = np.maximum(0, np.minimum(rising, falling))
    bank[0] = 0
    return np.log(magnitude @ bank + 0.01)


def test_published_i3d_is_called_as_it_wants_to_be(tmp_path):
    torch.manual_seed(0)
    network = PublishedI3D()
    torch.jit.script(network).save(tmp_path / "i3d_torchscript.pt")
    frames = torch.rand(2, 16, 256, 256, 3)
    features = video_features(tmp_path / "i3d_torchscript.pt").extract(frames)
    assert features.shape == (2, 400)
    # As the published code calls it with 8-bit pictures, its own scaling and resizing on.
    published = network(frames.permute(0, 4, 1, 2, 3) * 255, True, True, True)
    torch.testing.assert_close(features, published, atol=1e-4, rtol=1e-4)


def test_vggish_takes_every_published_weight(weights, tmp_path):
    torch.save(weights, tmp_path / "vggish-10086976.pth", _use_new_zipfile_serialization=False)  # as it was saved
    found = audio_features(tmp_path / "vggish-10086976.pth")
    audio = torch.randn(2, 25600, generator=torch.Generator().manual_seed(1)) * 0.1
    features = found.extract(audio)
    assert features.shape == (2, 2, 128) and "VGGish" in found.name
    # The same, written out: two examples of 96 frames, half a second apart, channels last before the linear layers.
    mel = np.stack([spectrogram(sound.double().numpy()) for sound in audio])
    examples = []
    for start in (0, 50):
        x = torch.from_numpy(mel[:, start : start + 96]).float().unsqueeze(1)
        for k, pooled in ((0, True), (3, True), (6, False), (8, True), (11, False), (13, True)):
            x = nn.functional.conv2d(x, weights[f"features.{k}.weight"], weights[f"features.{k}.bias"], padding=1)
            x = nn.functional.max_pool2d(x.relu(), 2) if pooled else x.relu()
        x = x.movedim(1, 3).reshape(2, -1)
        for k in (0, 2, 4):
            x = x.relu() if k else x
            x = x @ weights[f"embeddings.{k}.weight"].T + weights[f"embeddings.{k}.bias"]
        examples.append(x)
    torch.testing.assert_close(features, torch.stack(examples, 1), atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module")
def audioclip(tmp_path_factory) -> Path:
    """A file as ``AudioCLIP-Full-Training.pt`` is laid out, of random weights."""
    torch.manual_seed(0)
    network = AudioCLIP()
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.ndim == 1 and value.is_floating_point():
                value.add_(torch.rand_like(value))
    state = {f"audio.{name}": value for name, value in network.state_dict().items()}
    state |= {"audio.window": torch.ones(1654), "audio.fbsp.bias": torch.zeros(0), "visual.proj": torch.zeros(2)}
    path = tmp_path_factory.mktemp("audioclip") / "AudioCLIP-Full-Training.pt"
    torch.save(state, path)
    return path


def test_audioclip_takes_every_published_weight(audioclip):
    state = torch.load(audioclip, weights_only=True)
    stages = [value for name, value in AudioCLIP().named_parameters() if name.startswith("layer")]
    assert sum(value.numel() for value in stages) == 22_970_368  # as in ResNeXt-50 32x4d
    shapes = {name.removeprefix("audio."): tuple(value.shape) for name, value in state.items()}
    assert shapes["fbsp.fc"] == (1025,) and shapes["layer1.0.conv2.weight"] == (128, 4, 3, 3)
    assert shapes["att4.conv_depth.weight"] == (1024, 1, 1, 5) and shapes["fc.weight"] == (1024, 2048)
    found = audio_features(audioclip)
    features = found.extract(torch.randn(2, 25600) * 0.1)
    assert features.shape == (2, 1024) and "FAD x 10,000" in found.name
    assert (features[0] - features[1]).abs().max() > 0


def test_audioclip_hears_a_spectrogram_of_wavelets(audioclip):
    network = AudioCLIP(rate=44100)
    state = torch.load(audioclip, weights_only=True)
    with torch.no_grad():
        network.fbsp.m.copy_(state["audio.fbsp.m"])
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 7000)
    # Written out: the given numbers stand for 16-bit ones, frames are padded at both ends, then one wavelet a row.
    scaled = (samples + 32768) * 2 / 65535 - 1
    frames = 1 + math.ceil((7000 - 1654) / 561)
    missing = (frames - 1) * 561 + 1654 - 7000
    scaled = np.pad(scaled, (missing // 2, missing - missing // 2))
    window = scipy.signal.windows.blackmanharris(1654, sym=False)
    t = np.linspace(-np.pi, np.pi, 2048)
    with torch.no_grad():
        found = network.spectrogram(torch.from_numpy(samples).float()[None])
    assert found.shape == (1, 3, 341, frames)
    for row in (3, 400, 1000):
        order = network.fbsp.m[row].item()
        wavelet = np.sinc(t / order / np.pi).astype(complex) ** order * np.exp(-1j * row * t) / np.sqrt(2048)
        padded = np.pad(scaled[561 * 4 :][:1654] * window, 197)  # the fifth frame
        wanted = 10 * np.log10(np.abs(padded @ wavelet) ** 2)
        assert found[0, row // 341, row % 341, 4].item() == pytest.approx(wanted, abs=0.1)


def test_audioclip_computes_what_the_published_code_does():
    """Its embeddings, computed with the code of AndreyGuzhov/AudioCLIP for these weights and sounds."""
    network, state = AudioCLIP(rate=44100), {}
    learned = (name for name in network.state_dict() if not name.endswith("num_batches_tracked"))
    for i, name in enumerate(sorted(learned)):
        shape = network.state_dict()[name].shape
        wave = torch.sin(torch.arange(shape.numel()) * 0.7 + i).view(shape)
        if len(shape) > 1:
            state[name] = wave / math.prod(shape[1:]) ** 0.5
        elif name == "fbsp.fc":
            state[name] = torch.arange(shape[0]) + 0.2 * wave
        else:
            middle = 1.5 if name == "fbsp.m" else 1.0 if name.endswith(("weight", "var", "fb")) else 0.0
            state[name] = middle + 0.2 * wave
    network.load_state_dict(state, strict=False)
    n = torch.arange(20000, dtype=torch.float64)
    sounds = torch.stack([torch.sin(n * n * 0.0137) * 0.3, torch.sin(n * n * 0.0071) * n / 20000]).float()
    with torch.no_grad():
        found = network.eval()(sounds)[:, [0, 1, 500, 1023]] / 100
    wanted = [[2.152778, -1.076862, -2.383356, -3.171755], [2.183046, -1.175039, -2.517406, -3.306443]]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-3, rtol=1e-3)


def test_sound_is_resampled_in_time():
    seconds = torch.arange(1600) / 16000
    tone = torch.sin(2 * torch.pi * 440 * seconds)[None]
    wanted = torch.sin(2 * torch.pi * 440 * torch.arange(4410) / 44100)[None]
    torch.testing.assert_close(resampled(tone, 16000, 44100), wanted, atol=1e-3, rtol=0)


def test_first_wrong_key_of_audioclip_is_named(audioclip, tmp_path):
    state = torch.load(audioclip, weights_only=True)
    del state["audio.att5.bn.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="does not fit AudioCLIP: 'att5.bn.bias' is missing"):
        audio_features(tmp_path / "cut.pt")


def test_first_wrong_key_of_vggish_is_named(weights, tmp_path):
    torch.save({**weights, "features.0.bias": torch.zeros(3)}, tmp_path / "vggish.pth")
    with pytest.raises(ValueError, match="does not fit VGGish: 'features.0.bias' is .3,., not .64,."):
        audio_features(tmp_path / "vggish.pth")


def test_files_that_are_no_networks(tmp_path):
    (tmp_path / "notes.pth").write_text("no weights")
    with pytest.raises(ValueError, match="neither a TorchScript archive nor weights alone"):
        audio_features(tmp_path / "notes.pth")
    with pytest.raises(ValueError, match="not a TorchScript archive"):
        video_features(tmp_path / "notes.pth")
    with pytest.raises(ValueError, match="does not exist"):
        audio_features(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="15600 samples at once: a clip of 8000 is too short"):
        VGGish().examples(torch.zeros(1, 8000))
