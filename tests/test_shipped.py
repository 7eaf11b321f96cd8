"""What the weights in checkpoints/avdit-xs can do."""

import numpy as np
import pytest
import torch

from avdit.data.scenes import CLASSES, HELD_OUT, render_clip
from avdit.generate import Request, generate
from avdit.models.audio_codec import LogMel

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def held_out():
    """Eight clips of each class whose seeds no training run has seen: (class, frames, audio)."""
    made = []
    for label in range(len(CLASSES)):
        for k in range(8):
            clip = render_clip(label, HELD_OUT + k)
            made.append((label, clip.frames.numpy(), clip.audio.numpy()))
    return made


@pytest.fixture(scope="module")
def generated(shipped_pipeline):
    """One clip of each class, as it came."""
    results = [generate(shipped_pipeline, Request(name, seed=1)) for name in shipped_pipeline.classes]
    return [(label, result.frames, result.audio) for label, result in enumerate(results)]


def picture_features(frames):
    """Colours over an 8 x 8 grid, and how much each place changes."""
    small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(frames).permute(0, 3, 1, 2), 8)
    return torch.cat([small.mean(0).flatten(), 4 * small.std(0).flatten()]).numpy()


def sound_features(audio):
    """Mean, change and spread of the log-mel spectrum in time, with the loudness taken out of the first."""
    mel = LogMel(16000, 160, 64)(torch.from_numpy(audio).float()[None])[0]
    mean = mel.mean(0)
    return torch.cat([mean, 4 * mel.std(0), 4 * mel.diff(dim=0).abs().mean(0)]).numpy()


def right_classes(known, unknown, features):
    """How many of ``unknown`` have a neighbour of their own class nearest among ``known``."""
    table = np.stack([features(part) for _, part in known])
    labels = np.array([label for label, _ in known])
    scale = table.std(0) + 0.1 * table.std()
    nearest = [labels[(((table - features(part)) / scale) ** 2).sum(1).argmin()] for _, part in unknown]
    return sum(guess == label for guess, (label, _) in zip(nearest, unknown, strict=True))


def test_files_keep_to_the_size_budget(shipped_checkpoint):
    sizes = [path.stat().st_size for path in shipped_checkpoint.rglob("*") if path.is_file()]
    assert max(sizes) <= 15 * MEGABYTE and sum(sizes) <= 40 * MEGABYTE
    assert not [p for p in shipped_checkpoint.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert (
        "License" in (shipped_checkpoint / "README.md").read_text()
        or "Licence" in (shipped_checkpoint / "README.md").read_text()
    )


def test_codecs_reconstruct_held_out_clips(shipped_pipeline, held_out):
    video, audio = shipped_pipeline.video_codec, shipped_pipeline.audio_codec
    errors, mel_errors = [], []
    for _, frames, sound in held_out[::8]:
        x = torch.from_numpy(frames[::8]).permute(0, 3, 1, 2).unsqueeze(0) * 2 - 1
        with torch.no_grad():
            errors.append(((video.decode(video.encode(x)) - x) / 2).square().mean())
            mel = audio.mel(torch.from_numpy(sound)[None])
            rebuilt = audio.reconstruct(audio.posterior(mel).mode())
            mel_errors.append((rebuilt - mel).abs().mean() * audio.config.mel_std)
    psnr = -10 * torch.log10(torch.stack(errors))
    assert psnr.mean() > 26.5 and psnr.min() > 20
    assert torch.stack(mel_errors).mean() < 0.4


def test_pictures_are_of_their_class(held_out, generated):
    known, made = ([(label, frames) for label, frames, _ in clips] for clips in (held_out, generated))
    assert right_classes(known, made, picture_features) >= 7  # of 9; one is chance


def test_sounds_are_of_their_class(held_out, generated):
    known, made = ([(label, audio) for label, _, audio in clips] for clips in (held_out, generated))
    assert right_classes(known, made, sound_features) >= 6  # of 9; one is chance
    assert all(1e-3 < np.abs(audio).max() <= 4 for _, audio in made)


def test_frames_hang_together(held_out, generated):
    """From frame to frame a generated clip changes far less than a sequence of unrelated pictures would."""

    def change(frames):
        return np.abs(np.diff(frames, axis=0)).mean()

    for _, frames, _ in generated:
        assert change(frames) < 0.5 * np.mean([np.abs(frames[0] - other[0]).mean() for _, other, _ in held_out])
