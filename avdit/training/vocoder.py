"""The vocoder of the audio codec, on the sound of the rendered clips.

python -m avdit train vocoder --out runs/codecs                    # this machine
accelerate launch -m avdit train vocoder --out runs/codecs         # as accelerate is configured

With the folder of the codecs as ``--out``, their rendered clips serve again and the audio codec there gets the vocoder.
Its VAE and the statistics of its latents stay as they are, so that what was trained on them stays right.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avdit.data.latents import RandomShards, Shards
from avdit.data.scenes import ALL_CLASSES, PACKS
from avdit.evaluation.codecs import spectral_distance
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.vocoder import LEAST, SpectralVocoder, build_vocoder
from avdit.training.data import rendered_clips
from avdit.training.sheets import image_grid, save_png
from avdit.training.trainer import Trainer, processes, trainer_config

DEFAULTS = {
    "codecs": "runs/codecs",  # folder of the audio_codec that it is for
    "clips": 60,  # rendered clips a class
    "crop": 64,  # mel frames
    "rebuilt": 0.5,  # share of a batch whose mel went through the VAE, as all do that are to be heard
    "vocoder": {"width": 224, "depth": 5},  # see SpectralVocoder
    "train": {"steps": 20000, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 100, "sample_every": 2000},
}


def load_codec(folder: Path) -> AudioCodec:
    """The audio codec in ``folder``.

    Raises:
        ValueError: where there is none.
    """
    if not (folder / "audio_codec" / "config.json").is_file():
        raise ValueError(f"{folder} has no audio_codec: give a folder of trained codecs or of a pipeline")
    return AudioCodec.from_pretrained(folder / "audio_codec").eval()


def with_vocoder(codec: AudioCodec, config: dict) -> SpectralVocoder:
    """Give ``codec`` a new spectral vocoder, or that of the codec in the folder ``config["start"]``.

    Raises:
        ValueError: where the codec there has none.
    """
    settings = {"kind": "spectral", **config["vocoder"]}
    if start := config.get("start"):
        other = load_codec(Path(start))
        if not isinstance(other.synthesiser, SpectralVocoder):
            raise ValueError(f"the audio_codec of {start} has no spectral vocoder to start from")
        settings, codec.synthesiser = other.config.vocoder, other.synthesiser
    else:
        codec.synthesiser = build_vocoder(settings, codec.log_mel)
    codec.register_to_config(vocoder=settings)
    return codec.synthesiser


def spectrum_loss(vocoder: SpectralVocoder, told: tuple[Tensor, Tensor], wanted: Tensor, noise: Tensor) -> dict:
    """How far what the network told lies from the magnitudes ``wanted`` (B, n_fft / 2 + 1, T).

    Its medians by their logarithm and by spectral convergence, its spreads by the likelihood of a Laplace
    distribution, and the log-mel spectrum of the magnitudes with their fluctuation.
    """
    median, spread = told
    error = (median - wanted.clamp(min=LEAST).log()).abs()
    likelihood = (error.detach() / spread + spread.log()).mean()
    size = torch.linalg.vector_norm(wanted, dim=(1, 2)) + 1  # silence has none to be measured by
    convergence = (torch.linalg.vector_norm(median.exp() - wanted, dim=(1, 2)) / size).mean()
    mel = vocoder.log_mel.of_magnitude(vocoder.alive(median, spread.detach(), noise))
    mel_error = (mel - vocoder.log_mel.of_magnitude(wanted)).abs().mean()
    total = error.mean() + 0.5 * convergence + 0.2 * likelihood + 0.2 * mel_error
    terms = {"log": error.mean(), "convergence": convergence, "likelihood": likelihood, "mel": mel_error}
    return {"loss": total, **{name: term.detach() for name, term in terms.items()}}


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Render the clips where they are missing, train the vocoder, save the codec with it in ``out``/audio_codec.

    A dry run says what that would cost and writes nothing.

    Raises:
        ValueError: for a codec or settings that cannot be used.
    """
    config, given = {**DEFAULTS, **config}, config
    for part in ("vocoder", "train"):
        config[part] = {**DEFAULTS[part], **given.get(part, {})}
    settings, geometry, out = trainer_config(config["train"]), ClipGeometry(), Path(out)
    codec = load_codec(Path(config["codecs"])).requires_grad_(False)
    torch.manual_seed(settings.seed)
    vocoder = with_vocoder(codec, config).requires_grad_(True)
    if dry_run:
        shards: Shards | RandomShards = RandomShards(geometry, len(ALL_CLASSES), latents=False)
    else:
        shards = Shards(rendered_clips(Path(config.get("cache", out)), config["clips"], list(PACKS)))
    samples = config["crop"] * geometry.hop_length
    rebuilt = round(config["rebuilt"] * settings.batch_size)

    def mels(audio: Tensor, rebuilt: int) -> Tensor:
        """Log-mel (B, T, mel_bins) of audio (B, samples), the first ``rebuilt`` of it as the VAE gives it back."""
        with torch.no_grad(), trainer.accelerator.autocast():
            mel = codec.mel(audio)
            if rebuilt:
                mel = torch.cat([codec.reconstruct(codec.posterior(mel[:rebuilt]).mode()), mel[rebuilt:]])
        return mel.squeeze(1).float() * codec.config.mel_std + codec.config.mel_mean

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        number = trainer.global_batch
        items = torch.randint(len(shards), (number,), generator=generator)
        starts = torch.randint(geometry.samples - samples + 1, (number,), generator=generator)
        gain = 10 ** (torch.rand(number, 1, generator=generator) * -0.6)  # 0 to -12 dB
        clips = zip(shards.get("audio", trainer.mine(items)), trainer.mine(starts).tolist(), strict=True)
        audio = torch.stack([clip[start : start + samples] for clip, start in clips]) * trainer.mine(gain)
        audio = audio.to(trainer.accelerator.device)
        at = int(torch.randint(noise.shape[-1] - config["crop"] + 1, (), generator=generator))
        told = module(mels(audio, rebuilt))
        wanted = codec.log_mel.spectrum(audio).abs()
        return spectrum_loss(vocoder, told, wanted, noise[:, at : at + config["crop"]])

    def sheet(path: Path) -> None:
        items = torch.linspace(0, len(shards) - 1, 9).long()
        audio = shards.get("audio", items).to(trainer.accelerator.device)
        for name, count in (("true", 0), ("rebuilt", 9)):
            sound = vocoder(mels(audio, count))
            far = sum(map(spectral_distance, audio, sound)) / len(audio)
            trainer.accelerator.print(f"{path.name}: STFT distance {far:.3f} from {name} mels of 9 clips")
        picture = codec.log_mel.spectrum(torch.cat([audio, sound])).abs().clamp(min=1e-3).log() / 12 + 0.6
        save_png(image_grid(picture.flip(1).clamp(0, 1).unsqueeze(1).expand(-1, 3, -1, -1), 9), path)

    trainer = Trainer(vocoder.network, loss, settings, out / "vocoder", sheet)
    codec.to(trainer.accelerator.device, memory_format=torch.channels_last)
    noise = vocoder.noise(16 * config["crop"])
    if dry_run:
        return trainer.dry_run()
    trainer.run(resume)
    if processes().is_main_process:
        codec.to(torch.bfloat16).save_pretrained(out / "audio_codec")
    return None
