"""Log-mel spectrograms."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

FLOOR = 1e-5  # least mel energy that is told apart


class LogMel(nn.Module):
    """Natural-log mel spectrogram as AudioLDM computes it: 1,024-point Hann window, Slaney filters.

    It moves with its model from device to device but stays in 32-bit floats whatever the model's weights are cast to:
    there are no transforms of bfloat16 on a CPU, and quiet sounds would drown in its rounding.
    """

    def __init__(self, sampling_rate: int, hop_length: int, mel_bins: int, n_fft: int = 1024) -> None:
        super().__init__()
        self.hop_length, self.n_fft = hop_length, n_fft
        bank = mel_filter_bank(
            n_fft // 2 + 1, mel_bins, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
        )
        filters = torch.from_numpy(bank.T).float()
        self.register_buffer("filters", filters, persistent=False)
        # Where a model is loaded in half precision, that is the type of what is made without naming one.
        self.register_buffer("window", torch.hann_window(n_fft, dtype=torch.float32), persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(filters), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LogMel":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def spectrum(self, audio: Tensor) -> Tensor:
        """Complex spectrum (B, n_fft / 2 + 1, T) of audio (B, samples); a frame is centred in its hop of samples."""
        pad = (self.n_fft - self.hop_length) // 2
        audio = F.pad(audio.unsqueeze(1), (pad, self.n_fft - self.hop_length - pad), mode="reflect").squeeze(1)
        return torch.stft(audio, self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True)

    def of_magnitude(self, magnitude: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) of a magnitude spectrum (B, n_fft / 2 + 1, T)."""
        return torch.log((self.filters @ magnitude).clamp(min=FLOOR)).transpose(1, 2)

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (B, samples) to (B, samples / hop, mel_bins)."""
        return self.of_magnitude(self.spectrum(audio).abs())

    def magnitude(self, log_mel: Tensor) -> Tensor:
        """Least-squares magnitude spectrum (B, n_fft / 2 + 1, T) of log-mel frames (B, T, mel_bins)."""
        return (self.inverse @ log_mel.exp().transpose(1, 2)).clamp(min=0)
