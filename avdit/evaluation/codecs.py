"""What the codecs keep of clips that they were not trained on, and what they cost."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from avdit.data.scenes import Clip
from avdit.evaluation.sync import sound_onset
from avdit.pipeline import AVDiTPipeline


def milliseconds(work: Callable[[], object], runs: int = 5) -> float:
    """Median wall time of ``work`` after one run that does not count."""
    work()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return round(1000 * float(np.median(taken)), 1)


@torch.no_grad()
def evaluate_codecs(pipe: AVDiTPipeline, clips: list[Clip]) -> dict[str, dict[str, float]]:
    """Errors and times of both codecs of ``pipe`` over ``clips``.

    Returns:
        ``video``: ``psnr_db`` (mean over clips), ``psnr_db_worst``, ``flicker`` (change from frame to frame of a
        scene that stands still but for noise of one grey level in 255, as a multiple of that noise), ``encode_ms``
        and ``decode_ms`` of a clip. ``audio``: ``mel_l1`` (natural log), ``onset_shift_ms`` (median of the absolute
        shift of the strongest onset through VAE and vocoder), ``decode_ms``.
    """
    video, audio, rate = pipe.video_codec, pipe.audio_codec, pipe.geometry.sampling_rate
    device, dtype = video.device, video.dtype

    def picture(clip: Clip) -> Tensor:
        return clip.frames.permute(0, 3, 1, 2).unsqueeze(0).to(device, dtype) * 2 - 1

    psnr, mel_errors, shifts = [], [], []
    for clip in clips:
        frames = picture(clip)
        error = ((video.decode(video.encode(frames)) - frames) / 2).float().square().mean()
        psnr.append(float(-10 * torch.log10(error)))
        sound = clip.audio[None].to(device, dtype)
        mel = audio.mel(sound)
        raw = audio.posterior(mel).mode()
        mel_errors.append(float((audio.reconstruct(raw) - mel).float().abs().mean() * audio.config.mel_std))
        rebuilt = audio.decode(audio.encode(sound))[0].float().cpu().numpy()
        shifts.append(abs(sound_onset(rebuilt, rate) - sound_onset(clip.audio.cpu().numpy(), rate)))

    still = picture(clips[0])[:, :1].repeat(1, pipe.geometry.frames, 1, 1, 1)
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 2 / 255
    change = [float(x.diff(dim=1).abs().float().mean()) for x in (video.decode(video.encode(still + noise)), noise)]
    frames, sound = picture(clips[0]), clips[0].audio[None].to(device, dtype)
    latents, sound_latents = video.encode(frames), audio.encode(sound)
    return {
        "video": {
            "psnr_db": round(float(np.mean(psnr)), 2),
            "psnr_db_worst": round(min(psnr), 2),
            "flicker": round(change[0] / change[1], 3),
            "encode_ms": milliseconds(lambda: video.encode(frames)),
            "decode_ms": milliseconds(lambda: video.decode(latents)),
        },
        "audio": {
            "mel_l1": round(float(np.mean(mel_errors)), 3),
            "onset_shift_ms": round(1000 * float(np.median(shifts)), 1),
            "decode_ms": milliseconds(lambda: audio.decode(sound_latents)),
        },
    }
