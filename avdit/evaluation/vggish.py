"""VGGish (Hershey et al. 2017, arXiv 1609.09430), the network of FAD (Kilgour et al. 2019), for its published weights.

The parameters are named as in the PyTorch file ``vggish-10086976.pth`` (release v0.1 of harritaylor/torchvggish, made
from AudioSet's checkpoint).
"""

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

RATE = 16000  # Hz
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms every 10 ms
BINS, LOW, HIGH = 64, 125.0, 7500.0  # mel bins from and to, in Hz
OFFSET = 0.01  # keeps the logarithm finite
EXAMPLE = 96  # spectrogram frames that the network sees at once: 0.96 s
STEP = 50  # frames from one example to the next: FAD's half second


class VGGish(nn.Module):
    """Sounds (B, samples) at 16 kHz in [-1, 1] to embeddings (B, examples, 128), before the last activation."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for after in (64, None, 128, None, 256, 256, None, 512, 512, None):
            if after is None:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
                before = after
        self.features = nn.Sequential(*layers)
        inputs = 512 * (EXAMPLE // 16) * (BINS // 16)
        self.embeddings = nn.Sequential(
            nn.Linear(inputs, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128)
        )
        bank = mel_filter_bank(FFT // 2 + 1, BINS, LOW, HIGH, RATE, mel_scale="htk", triangularize_in_mel_space=True)
        self.register_buffer("filters", torch.from_numpy(bank).float(), persistent=False)  # (FFT / 2 + 1, BINS)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def examples(self, audio: Tensor) -> Tensor:
        """Sounds (B, samples) to log-mel examples (B, examples, 96, 64), half a second apart.

        Raises:
            ValueError: for a sound that is shorter than one example.
        """
        least = (EXAMPLE - 1) * HOP + WINDOW
        if audio.shape[1] < least:
            raise ValueError(f"VGGish hears {least} samples at once: a clip of {audio.shape[1]} is too short")
        frames = audio.unfold(1, WINDOW, HOP) * self.window  # (B, T, WINDOW)
        spectrum = torch.fft.rfft(frames, FFT).abs()
        return torch.log(spectrum @ self.filters + OFFSET).unfold(1, EXAMPLE, STEP).transpose(2, 3)

    def forward(self, audio: Tensor) -> Tensor:
        examples = self.examples(audio)  # (B, n, 96, 64)
        maps = self.features(examples.flatten(0, 1).unsqueeze(1))  # (B n, 512, 6, 4)
        return self.embeddings(maps.permute(0, 2, 3, 1).flatten(1)).unflatten(0, examples.shape[:2])
