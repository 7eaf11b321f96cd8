"""What the codecs keep of clips that they were not trained on, and what they cost."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from avdit.benchmark import measure
from avdit.data.scenes import Clip
from avdit.evaluation.sync import sound_onset
from avdit.geometry import ClipGeometry
from avdit.models.features import ImageFeatures, feature_distance
from avdit.models.vocoder import GriffinLim
from avdit.pipeline import AVDiTPipeline
from avdit.streaming import FADE_SECONDS, OVERLAP, continued

RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))  # FFT, hop and window of the spectral distance
GLIDE = (300.0, 900.0)  # Hz, of the sine that rises through two windows
BLOCK = 40  # samples over which a level is told
RUNS = 5  # of what is timed


def spectral_distance(sound: Tensor, other: Tensor) -> float:
    """Multi-resolution STFT loss of ``other`` (samples,) against ``sound``: spectral convergence + log magnitude.

    The mean over three resolutions (Yamamoto et al. 2020, arXiv 1910.11480, whose settings these are).
    """
    total = 0.0
    for n_fft, hop, window in RESOLUTIONS:
        shape = {"hop_length": hop, "win_length": window, "window": torch.hann_window(window), "return_complex": True}
        a, b = (torch.stft(x.float().cpu(), n_fft, **shape).abs().clamp(min=1e-4) for x in (sound, other))
        total += float(torch.linalg.norm(a - b) / torch.linalg.norm(a) + (a.log() - b.log()).abs().mean())
    return total / len(RESOLUTIONS)


def joint_step(clip: ClipGeometry, codec: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What is heard where two windows of a stream meet, measured on a sine that glides through both.

    Args:
        codec: Sound (1, samples) to the same through the codec.

    Returns:
        ``joint_step``: the largest change from sample to sample at the joint, as a multiple of the largest in the
        tenth of a second after it; 1 is no step. ``joint_dip_db``: how far the level over 2.5 ms falls at the joint.
    """
    rate, fade = clip.sampling_rate, round(FADE_SECONDS * clip.sampling_rate)
    overlap = clip.samples_of(OVERLAP)
    second = clip.samples - overlap  # where the second window begins
    length = second + clip.samples
    hertz = torch.linspace(*GLIDE, length)
    sine = 0.4 * torch.sin(2 * math.pi * torch.cumsum(hertz, 0) / rate)
    first, then = (codec(part[None])[0].float().cpu().numpy() for part in (sine[: clip.samples], sine[second:]))
    frames = np.zeros((OVERLAP, 1, 1, 3), np.float32)
    _, joined = continued((frames, first[second:]), (frames, then), fade)
    change, at = np.abs(np.diff(joined)), slice(overlap - fade, overlap)
    after = np.abs(np.diff(then))[overlap : overlap + rate // 10]  # of nearly the same pitch
    level = np.sqrt(np.square(joined[: len(joined) // BLOCK * BLOCK]).reshape(-1, BLOCK).mean(1) + 1e-12)
    faded = level[at.start // BLOCK : at.stop // BLOCK]
    around = np.median(level[at.start // BLOCK - 40 : at.stop // BLOCK + 40])
    return {
        "joint_step": round(float(change[at].max() / after.max()), 3),
        "joint_dip_db": round(float(20 * np.log10(around / faded.min())), 2),
    }


@torch.no_grad()
def evaluate_codecs(
    pipe: AVDiTPipeline, clips: list[Clip], precision: torch.autocast
) -> dict[str, dict[str, float | str]]:
    """Errors and times of both codecs of ``pipe`` over ``clips``, computed in ``precision``.

    Returns:
        ``video``: ``psnr_db`` (mean over clips), ``psnr_db_worst``, ``feature_distance`` (of EfficientNet-Lite0's
        ImageNet features, over every fourth frame), ``flicker`` (change from frame to frame of a scene that stands
        still but for noise of one grey level in 255, as a multiple of that noise), ``encode_ms`` and ``decode_ms`` of
        a clip. ``audio``: ``mel_l1`` (natural log), ``onset_shift_ms`` (median of the absolute shift of the strongest
        onset through VAE and vocoder), ``stft_vocoder`` and ``stft`` (distance of sounds from the vocoder, which is
        named, of their true spectrogram, and from VAE and vocoder), ``stft_griffin_lim`` (as ``stft_vocoder``, with
        Griffin-Lim in the vocoder's place), :func:`joint_step`, and ``decode_ms``.
    """
    video, audio, rate = pipe.video_codec, pipe.audio_codec, pipe.geometry.sampling_rate
    device, dtype = video.device, video.dtype
    network, plain = ImageFeatures().to(device), GriffinLim(audio.log_mel)

    def picture(clip: Clip) -> Tensor:
        return clip.frames.permute(0, 3, 1, 2).unsqueeze(0).to(device, dtype) * 2 - 1

    def features(frames: Tensor) -> list[Tensor]:
        return network(frames[0, ::4].float().contiguous(memory_format=torch.channels_last))

    def rebuilt(sound: Tensor) -> Tensor:
        with precision:
            return audio.decode(audio.encode(sound.to(device))).float().cpu()

    psnr, seen, mel_errors, shifts, vocoded, unaided, heard = [], [], [], [], [], [], []
    for clip in clips:
        frames, sound = picture(clip), clip.audio[None].to(device)
        with precision:
            frames_out = video.decode(video.encode(frames))
            mel = audio.mel(sound)
            mel_out = audio.reconstruct(audio.posterior(mel).mode())
            log_mel = mel.squeeze(1).float() * audio.config.mel_std + audio.config.mel_mean
            from_mel, by_griffin_lim = audio.synthesise(log_mel), plain(log_mel)
        frames_out = frames_out.float()
        psnr.append(float(-10 * torch.log10(((frames_out - frames.float()) / 2).square().mean())))
        seen.append(float(feature_distance(features(frames), features(frames_out)).mean()))
        mel_errors.append(float((mel_out - mel).float().abs().mean() * audio.config.mel_std))
        sound_out = rebuilt(clip.audio[None])[0]
        shifts.append(abs(sound_onset(sound_out.numpy(), rate) - sound_onset(clip.audio.cpu().numpy(), rate)))
        vocoded.append(spectral_distance(clip.audio, from_mel[0].float().cpu()))
        unaided.append(spectral_distance(clip.audio, by_griffin_lim[0].float().cpu()))
        heard.append(spectral_distance(clip.audio, sound_out))

    still = picture(clips[0])[:, :1].repeat(1, pipe.geometry.frames, 1, 1, 1)
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 2 / 255
    frames, sound = picture(clips[0]), clips[0].audio[None].to(device)
    with precision:
        change = [float(x.diff(dim=1).abs().float().mean()) for x in (video.decode(video.encode(still + noise)), noise)]
        latents, sound_latents = video.encode(frames), audio.encode(sound)
        times = {
            "encode": measure(lambda: video.encode(frames), RUNS),
            "decode": measure(lambda: video.decode(latents), RUNS),
            "sound": measure(lambda: audio.decode(sound_latents), RUNS),
        }
    return {
        "video": {
            "psnr_db": round(float(np.mean(psnr)), 2),
            "psnr_db_worst": round(min(psnr), 2),
            "feature_distance": round(float(np.mean(seen)), 4),
            "flicker": round(change[0] / change[1], 3),
            "encode_ms": times["encode"]["median_ms"],
            "decode_ms": times["decode"]["median_ms"],
        },
        "audio": {
            "vocoder": type(audio.synthesiser).__name__,
            "mel_l1": round(float(np.mean(mel_errors)), 3),
            "onset_shift_ms": round(1000 * float(np.median(shifts)), 1),
            "stft_vocoder": round(float(np.mean(vocoded)), 3),
            "stft_griffin_lim": round(float(np.mean(unaided)), 3),
            "stft": round(float(np.mean(heard)), 3),
            **joint_step(pipe.geometry, rebuilt),
            "decode_ms": times["sound"]["median_ms"],
        },
    }
