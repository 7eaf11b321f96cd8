"""Sound to latents and back: log-mel spectrogram, its VAE, and a vocoder."""

from typing import Any

from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  diffusers looks for a component's loader here
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers import SpeechT5HifiGan

from avdit.models.codec import LatentCodec
from avdit.models.mel import LogMel
from avdit.models.vocoder import build_vocoder

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


class AudioCodec(LatentCodec):
    """Waveform autoencoder: log-mel (time, frequency) → VAE ×4 → log-mel → vocoder.

    Args:
        vae: Configuration of a diffusers ``AutoencoderKL``; the small one by default.
        unshuffle: Mel cells folded into channels each way before it.
        latent_mean: Mean of the raw latents, one value or one a channel.
        latent_std: Their scale, likewise.
        mel_mean: Taken off the log-mel before the VAE (AudioLDM: 0).
        mel_std: Divides it (AudioLDM: 1).
        vocoder: What :func:`build_vocoder` takes: ours, a published HiFi-GAN's configuration, or None for Griffin-Lim.
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
        self.synthesiser = build_vocoder(vocoder, self.log_mel)

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
        audio = self.synthesiser(log_mel.to(self.dtype) if isinstance(self.synthesiser, SpeechT5HifiGan) else log_mel)
        samples = log_mel.shape[1] * self.config.hop_length  # published vocoders make a few samples more
        return audio.float().reshape(len(log_mel), -1)[:, :samples].clamp(-1, 1)
