"""The procedural clips: repeatable, varied, audible, and seen when they are heard."""

import pytest
import torch
import torch.nn.functional as F

from avdit.data.scenes import (
    ALL_CLASSES,
    CLASSES,
    GENRES,
    HELD_OUT,
    JUDGES,
    Clip,
    Dice,
    clip_seed,
    render,
    render_clip,
)
from avdit.data.scenes import SEEDS as SEED_LIMIT
from avdit.data.scenes.genres import STYLES
from avdit.data.scenes.music import GROOVES, play
from avdit.geometry import ClipGeometry

GEOMETRY = ClipGeometry()
SEEDS = (3, 11)
TOLERANCE = 1 / GEOMETRY.fps + 0.02  # seconds: a frame and the measure's own width


@pytest.fixture(scope="module")
def clips() -> dict[tuple[str, int], Clip]:
    """Each class under each of :data:`SEEDS`."""
    return {(label, seed): render_clip(label, seed) for label in ALL_CLASSES for seed in SEEDS}


def sound_onset(clip: Clip, geometry: ClipGeometry, share: float = 0.4) -> float:
    """Seconds of the first rise in the samples' level (30 ms after a moment against 30 ms before) that reaches
    ``share`` of the largest rise: clips may hold two strokes or splashes."""
    window = geometry.sampling_rate // 100
    level = clip.audio[: len(clip.audio) // window * window].view(-1, window).square().mean(1).sqrt()
    padded = F.pad(level, (3, 3), value=level[0].item()).unfold(0, 3, 1).mean(-1)
    rise = padded[3 : 3 + len(level)] - padded[: len(level)]
    first = (rise >= share * rise.max()).nonzero()[0].item()
    return (first + rise[first : first + 8].argmax().item()) * window / geometry.sampling_rate


def picture_onset(clip: Clip, geometry: ClipGeometry, block: int = 16, share: float = 0.5) -> float:
    """Seconds of the first frame with a block of pixels whose brightness changes by ``share`` of the largest change.

    Blocks, because ripples that spread from a splash change more pixels in all than the splash does.
    """
    light = F.avg_pool2d(clip.frames.mean(-1).unsqueeze(1), block).flatten(1)
    change = (light[1:] - light[:-1]).abs().amax(1)
    return ((change >= share * change.max()).nonzero()[0].item() + 1) / geometry.fps


@pytest.mark.parametrize("label", ALL_CLASSES)
def test_a_seed_is_a_clip(label: str, clips: dict[tuple[str, int], Clip]) -> None:
    first, again = clips[label, SEEDS[0]], render_clip(label, SEEDS[0])
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.audio, again.audio)
    assert first.events == again.events
    other = clips[label, SEEDS[1]]
    assert (first.frames - other.frames).abs().mean() > 0.01
    assert not torch.equal(first.audio, other.audio)


@pytest.mark.parametrize("label", ALL_CLASSES)
def test_frames_and_audio_are_in_range(label: str, clips: dict[tuple[str, int], Clip]) -> None:
    for seed in SEEDS:
        clip = clips[label, seed]
        assert clip.frames.shape == (GEOMETRY.frames, GEOMETRY.height, GEOMETRY.width, 3)
        assert clip.audio.shape == (GEOMETRY.samples,)
        assert clip.frames.isfinite().all() and clip.audio.isfinite().all()
        assert clip.frames.min() >= 0 and clip.frames.max() <= 1
        assert clip.audio.square().mean().sqrt() > 0.005, "silent"
        assert clip.audio.abs().max() <= 0.95, "clipped"
        assert (clip.frames[1:] - clip.frames[:-1]).abs().mean() > 1e-4, "a still picture"


@pytest.mark.parametrize("label", ALL_CLASSES)
def test_events_lie_within_the_clip(label: str, clips: dict[tuple[str, int], Clip]) -> None:
    for seed in SEEDS:
        assert all(0 <= event.time <= GEOMETRY.frames / GEOMETRY.fps for event in clips[label, seed].events)


@pytest.mark.parametrize("label", ["explosion", "thunder", "splashing water"])
@pytest.mark.parametrize("seed", [*SEEDS, 0, 20, 57, HELD_OUT + 1])
def test_sound_starts_with_the_picture(label: str, seed: int) -> None:
    clip = render_clip(label, seed)
    seen, heard = picture_onset(clip, GEOMETRY), sound_onset(clip, GEOMETRY)
    assert abs(seen - heard) <= TOLERANCE, f"seen at {seen:.2f} s, heard at {heard:.2f} s"
    # The measure notices sound that comes late.
    late = Clip(clip.frames, torch.roll(clip.audio, GEOMETRY.sampling_rate * 3 // 10))
    late.audio[: GEOMETRY.sampling_rate * 3 // 10] = clip.audio[:100].repeat(48)
    assert abs(seen - sound_onset(late, GEOMETRY)) > TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_an_explosion_is_the_biggest_change_of_its_clip(seed: int, clips: dict[tuple[str, int], Clip]) -> None:
    clip = clips["explosion", seed]
    change = (clip.frames[1:] - clip.frames[:-1]).abs().mean((1, 2, 3))
    assert abs((change.argmax().item() + 1) / GEOMETRY.fps - clip.events[0].time) <= 1 / GEOMETRY.fps


@pytest.mark.parametrize("seed", SEEDS)
def test_crackles_are_heard_when_their_sparks_fly(seed: int, clips: dict[tuple[str, int], Clip]) -> None:
    clip = clips["fire crackling", seed]
    loudest = clip.audio.abs().argmax().item() / GEOMETRY.sampling_rate
    assert min(abs(loudest - event.time) for event in clip.events if event.kind == "crackle") < 0.05


@pytest.mark.parametrize("genre", [genre for genre in GENRES if STYLES[genre].sharpness > 0.3])
def test_dancers_reach_a_pose_on_the_beat(genre: str) -> None:
    """Around a beat's frame the figure moves less than on the way to it."""
    still, moving = [], []
    for seed in range(4):
        clip = render_clip(genre, seed)
        change = (clip.frames[1:] - clip.frames[:-1]).abs().mean((1, 2, 3))
        for event in clip.events:
            frame = event.time * GEOMETRY.fps
            if 2 <= frame < GEOMETRY.frames - 2:
                still.append(change[round(frame)].item())  # from the pose on
                moving.append(change[round(frame) - 1].item())  # into it
    assert len(still) > 4 and sum(moving) > sum(still)


def test_a_still_tells_the_genre_by_dress_and_place() -> None:
    """One frame at 16 x 16 pixels is nearest to another seed's of its own genre, in colour."""

    def stills(seeds: range) -> torch.Tensor:
        frames = torch.stack([render_clip(genre, seed).frames[8] for seed in seeds for genre in GENRES])
        return torch.nn.functional.adaptive_avg_pool2d(frames.movedim(-1, 1), 16).flatten(1)

    nearest = torch.cdist(stills(range(200, 204)), stills(range(100, 110))).argmin(1) % len(GENRES)
    told = nearest == torch.arange(len(GENRES)).repeat(4)
    assert told.float().mean() >= 0.9


@pytest.mark.parametrize("genre", GENRES)
def test_the_music_keeps_its_beat(genre: str) -> None:
    """The sound rises on the eighths of the genre's tempo more than between them."""
    audio, beats, beat = play(Dice(5), GEOMETRY, genre)
    assert 60 / GROOVES[genre].tempo[1] <= beat <= 60 / GROOVES[genre].tempo[0]
    window = GEOMETRY.sampling_rate // 100
    spectrum = torch.stft(audio, 4 * window, window, window=torch.hann_window(4 * window), return_complex=True)
    level = torch.log1p(100 * spectrum.abs())
    rise = (level[:, 1:] - level[:, :-1]).clamp(min=0).sum(0)
    eighths = ((torch.arange(len(rise)) + 1) / 100 - beats[0]) / beat * 2
    near = (eighths - eighths.round()).abs() * beat / 2 < 0.03
    assert rise[near].sum() / rise.sum() > 1.5 * near.float().mean()


def test_batches_hold_the_same_clips(clips: dict[tuple[str, int], Clip]) -> None:
    frames, audio, events = render(["explosion", 1], [SEEDS[0], SEEDS[1]], return_events=True)
    for i, key in enumerate([("explosion", SEEDS[0]), (CLASSES[1], SEEDS[1])]):
        assert torch.equal(frames[i], clips[key].frames)
        assert torch.equal(audio[i], clips[key].audio)
        assert events[i] == clips[key].events


@pytest.mark.parametrize("label", ["bagpipes", -1, len(ALL_CLASSES)])
def test_an_unknown_class_is_an_error(label: str | int) -> None:
    with pytest.raises(ValueError, match="unknown class"):
        render_clip(label, 0)


def test_training_judging_and_held_out_clips_are_drawn_differently() -> None:
    ranges = (0, JUDGES, HELD_OUT, SEED_LIMIT - 1)
    draws = {tuple(Dice(clip_seed(0, seed)).rand(4).tolist()) for seed in ranges}
    assert len(draws) == len(ranges)
    with pytest.raises(ValueError, match=f"seed {SEED_LIMIT} must be below"):
        render_clip("thunder", SEED_LIMIT)


def test_a_negative_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed -1"):
        render_clip("thunder", -1)


def test_held_out_clips_are_never_trained_on() -> None:
    labels = range(len(ALL_CLASSES))
    last_trained = max(clip_seed(label, HELD_OUT - 1) for label in labels)
    first_held_out = min(clip_seed(label, HELD_OUT) for label in labels)
    assert last_trained < first_held_out
    streams = {clip_seed(label, seed) for label in labels for seed in range(50)}
    assert len(streams) == 50 * len(ALL_CLASSES)
