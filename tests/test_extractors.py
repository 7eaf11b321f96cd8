"""Feature networks from files in their published interfaces: I3D as TorchScript, VGGish as weights."""

import numpy as np
import pytest
import torch
from torch import nn

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
    small = nn.functional.interpolate(
        frames.flatten(0, 1).movedim(-1, 1), (224, 224), mode="bilinear", antialias=True, align_corners=False
    )
    pixels = small.unflatten(0, (2, 16)).movedim(1, 2) * 255
    torch.testing.assert_close(features, network(pixels, True, False, True), atol=1e-3, rtol=1e-3)


def test_vggish_takes_every_published_weight(weights, tmp_path):
    torch.save(weights, tmp_path / "vggish-10086976.pth", _use_new_zipfile_serialization=False)  # as it was saved
    found = audio_features(tmp_path / "vggish-10086976.pth")
    audio = torch.randn(2, 25600, generator=torch.Generator().manual_seed(1)) * 0.1
    features = found.extract(audio)
    assert features.shape == (2, 128) and "VGGish" in found.name
    # The same, written out: two examples of 96 frames, half a second apart, channels last before the linear layers.
    mel = np.stack([spectrogram(sound.double().numpy()) for sound in audio])
    means = []
    for start in (0, 50):
        x = torch.from_numpy(mel[:, start : start + 96]).float().unsqueeze(1)
        for k, pooled in ((0, True), (3, True), (6, False), (8, True), (11, False), (13, True)):
            x = nn.functional.conv2d(x, weights[f"features.{k}.weight"], weights[f"features.{k}.bias"], padding=1)
            x = nn.functional.max_pool2d(x.relu(), 2) if pooled else x.relu()
        x = x.movedim(1, 3).reshape(2, -1)
        for k in (0, 2, 4):
            x = x.relu() if k else x
            x = x @ weights[f"embeddings.{k}.weight"].T + weights[f"embeddings.{k}.bias"]
        means.append(x)
    torch.testing.assert_close(features, torch.stack(means).mean(0), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings.4.bias": None}, "'embeddings.4.bias' is missing"),
        ({"stranger": torch.zeros(1)}, "'stranger' is unknown"),
        ({"features.0.bias": torch.zeros(3)}, "'features.0.bias' is .3,., not .64,."),
    ],
)
def test_first_wrong_key_of_vggish_is_named(weights, tmp_path, change, message):
    changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "vggish.pth")
    with pytest.raises(ValueError, match=message):
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
