"""Sound to latents and back: log-mel spectrogram, its VAE, and a vocoder."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  diffusers looks for a component's loader here
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
from transformers.audio_utils import mel_filter_bank

from avdit.models.codec import LatentCodec

SMALL_VAE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "latent_channels": 8,
    "block_out_channels": (64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


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

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (B, samples) to (B, samples / hop, mel_bins)."""
        pad = (self.n_fft - self.hop_length) // 2
        audio = F.pad(audio.unsqueeze(1), (pad, self.n_fft - self.hop_length - pad), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            audio, self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True
        ).abs()
        return torch.log((self.filters @ spectrum).clamp(min=1e-5)).transpose(1, 2)

    def magnitude(self, log_mel: Tensor) -> Tensor:
        """Least-squares magnitude spectrum (B, n_fft / 2 + 1, T) of log-mel frames (B, T, mel_bins)."""
        return (self.inverse @ log_mel.exp().transpose(1, 2)).clamp(min=0)


class GriffinLim(nn.Module):
    """Vocoder without weights: phases found by fast Griffin-Lim iterations (Perraudin et al. 2013).

    The starting phases are drawn from a fixed seed, so that a spectrogram always sounds the same.
    """

    def __init__(self, log_mel: LogMel, iterations: int = 32, momentum: float = 0.99) -> None:
        super().__init__()
        self.log_mel, self.iterations, self.momentum = log_mel, iterations, momentum

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to audio (B, T x hop)."""
        mel, samples = self.log_mel, log_mel.shape[1] * self.log_mel.hop_length
        # One frame more at each end, so that every sample lies under several windows.
        magnitude = F.pad(mel.magnitude(log_mel.float()), (4, 4), mode="replicate")
        length = (magnitude.shape[-1] - 1) * mel.hop_length
        transform = {"n_fft": mel.n_fft, "hop_length": mel.hop_length, "window": mel.window}
        draw = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(0)).to(magnitude.device)
        phases = torch.polar(torch.ones_like(draw), 2 * torch.pi * draw).expand(magnitude.shape)
        previous = torch.zeros_like(phases)
        for _ in range(self.iterations):
            audio = torch.istft(magnitude * phases, **transform, length=length)
            rebuilt = torch.stft(audio, **transform, return_complex=True)
            phases = rebuilt + self.momentum * (rebuilt - previous)
            phases = phases / phases.abs().clamp(min=1e-12)
            previous = rebuilt
        audio = torch.istft(magnitude * phases, **transform, length=length)
        start = 4 * mel.hop_length - mel.hop_length // 2  # a mel frame is centred half a hop into its samples
        return audio[:, start : start + samples]


class AudioCodec(LatentCodec):
    """Waveform autoencoder: log-mel (time, frequency) → VAE ×4 → log-mel → vocoder.

    Args:
        vae: Configuration of a diffusers ``AutoencoderKL``; the small one by default.
        unshuffle: Mel cells folded into channels each way before it.
        latent_mean: Mean of the raw latents, one value or one a channel.
        latent_std: Their scale, likewise.
        mel_mean: Taken off the log-mel before the VAE (AudioLDM: 0).
        mel_std: Divides it (AudioLDM: 1).
        vocoder: Configuration of a ``SpeechT5HifiGan``, or None for Griffin-Lim.
    """

    @register_to_config
    def __init__(
        self,
        vae: dict[str, Any] | None = None,
        unshuffle: int = 2,
        latent_mean: list[float] | float = 0.0,
        latent_std: list[float] | float = 1.0,
        mel_mean: float = -5.0,
        mel_std: float = 2.5,
        vocoder: dict[str, Any] | None = None,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        mel_bins: int = 64,
    ) -> None:
        super().__init__()
        self.build(vae or SMALL_VAE)
        self.log_mel = LogMel(sampling_rate, hop_length, mel_bins)
        if vocoder is None:
            self.synthesiser: nn.Module = GriffinLim(self.log_mel)
        else:
            self.synthesiser = SpeechT5HifiGan(SpeechT5HifiGanConfig(**vocoder))

    @classmethod
    def from_parts(cls, vae: AutoencoderKL, vocoder: SpeechT5HifiGan) -> "AudioCodec":
        """Wrap AudioLDM's published ``vae`` and ``vocoder`` with the VAE's own scaling factor."""
        voice = {k: v for k, v in vocoder.config.to_diff_dict().items() if k not in ("architectures", "torch_dtype")}
        codec = cls(
            vae=cls.published_config(vae),
            unshuffle=1,
            latent_std=1 / vae.config.scaling_factor,
            mel_mean=0.0,
            mel_std=1.0,
            vocoder=voice,
        )
        codec.use(vae)
        codec.synthesiser = vocoder
        return codec

    def mel(self, audio: Tensor) -> Tensor:
        """The VAE's input (B, 1, T, mel_bins) for audio (B, samples)."""
        return (self.log_mel(audio.float()) - self.config.mel_mean).unsqueeze(1) / self.config.mel_std

    @apply_forward_hook
    def encode(self, audio: Tensor) -> Tensor:
        """Audio (B, samples) in [-1, 1] to normalised latents (B, C, time, frequency)."""
        return self.normalise(self.posterior(self.mel(audio).to(self.dtype)).mode())

    def decode_mel(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, time, frequency) to log-mel (B, T, mel_bins)."""
        mel = self.reconstruct(self.denormalise(latents)).squeeze(1).float()
        return mel * self.config.mel_std + self.config.mel_mean

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, time, frequency) to audio (B, samples) in [-1, 1]."""
        return self.synthesise(self.decode_mel(latents))

    def synthesise(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, T, mel_bins) to audio (B, samples) in [-1, 1]."""
        audio = self.synthesiser(log_mel if isinstance(self.synthesiser, GriffinLim) else log_mel.to(self.dtype))
        samples = log_mel.shape[1] * self.config.hop_length  # published vocoders make a few samples more
        return audio.float().reshape(len(log_mel), -1)[:, :samples].clamp(-1, 1)
