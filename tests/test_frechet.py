"""The distances, against independent implementations and on clips whose order is known."""

import numpy as np
import pytest
import scipy.linalg
import torch

from avdit.evaluation.frechet import (
    audio_distance,
    features_of,
    frechet_distance,
    kernel_distance,
    resized,
    video_distances,
)


def sets(n=200, m=150, d=12, shift=0.3):
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((d, d))
    return generator.standard_normal((n, d)) @ mixing, 1.4 * generator.standard_normal((m, d)) + shift


def by_matrix_root(real, fake):
    covariances = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    difference = real.mean(0) - fake.mean(0)
    return difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real)


def by_loops(real, fake):
    def kernel(x, y):
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def among(x):
        pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in real for y in fake]
    return among(real) + among(fake) - 2 * sum(across) / len(across)


def test_frechet_distance_equals_the_matrix_root():
    real, fake = sets()
    assert frechet_distance(real, fake) == pytest.approx(by_matrix_root(real, fake), rel=1e-6)
    assert video_distances(real, fake)["fvd"] == audio_distance(real, fake)["fad"] == frechet_distance(real, fake)


def test_frechet_distance_of_known_distributions():
    # One dimension: (difference of means)^2 + (difference of deviations)^2.
    real, fake = np.array([[-1.0], [1.0]] * 50), np.array([[1.0], [7.0]] * 50)
    scale = np.sqrt(100 / 99)
    assert frechet_distance(real, fake) == pytest.approx(16 + (3 * scale - scale) ** 2)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_fewer_clips_than_values():
    generator = np.random.default_rng(1)
    real, fake = generator.standard_normal((6, 40)), generator.standard_normal((8, 40)) + 1
    covariances = [np.cov(x, rowvar=False) for x in (real, fake)]
    # The eigenvalues of the product are what sqrtm of a singular matrix finds only roughly.
    values = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
    difference = real.mean(0) - fake.mean(0)
    wanted = difference @ difference + sum(map(np.trace, covariances)) - 2 * np.sqrt(values).sum()
    assert frechet_distance(real, fake) == pytest.approx(wanted, rel=1e-4)


def test_kernel_distance_equals_the_sums_written_out():
    real, fake = sets(12, 9, 5)
    assert kernel_distance(real, fake) == pytest.approx(by_loops(real, fake), rel=1e-9)
    assert video_distances(real, fake)["kvd"] == kernel_distance(real, fake)
    same = np.random.default_rng(2).standard_normal((400, 5))
    assert abs(kernel_distance(same[:200], same[200:])) < 0.1 * kernel_distance(same[:200], same[200:] + 1)


def test_more_noise_is_further_away():
    generator = np.random.default_rng(3)
    clips = [generator.random((4, 1, 1, 3)) * np.ones((1, 16, 16, 1)) for _ in range(12)]

    def extractor(frames):
        return torch.cat([frames.mean((2, 3)).flatten(1), frames.std((2, 3)).flatten(1)], 1)

    real = features_of(clips, extractor, batch=5)
    assert real.shape == (12, 24)
    distances = []
    for noise in (0.0, 0.2, 0.6):
        noisy = [clip + noise * generator.standard_normal(clip.shape) for clip in clips]
        distances.append(frechet_distance(real, features_of(noisy, extractor, batch=4)))
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[0] < distances[1] < distances[2]


def test_frames_keep_their_order_when_resized():
    frames = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 16, 16, 3)
    small = resized(frames, 8)
    assert small.shape == (2, 3, 8, 8, 3)
    torch.testing.assert_close(small.mean((2, 3, 4)), torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "real features are .1, 3.: give at least 2 rows"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "features of 3 and 4 values"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "generated features hold values that are not finite"),
    ],
)
def test_features_that_do_not_compare_are_named(real, fake, message):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(real, fake)


def test_every_window_counts():
    sounds = [np.arange(4.0) + 10 * i for i in range(3)]
    rows = features_of(sounds, lambda audio: audio.unfold(1, 2, 2), batch=2)  # two windows of two samples
    np.testing.assert_array_equal(rows, [[0, 1], [2, 3], [10, 11], [12, 13], [20, 21], [22, 23]])


def test_extractor_that_gives_no_vector_a_clip_is_named():
    with pytest.raises(ValueError, match="one vector a clip"):
        features_of([np.zeros(100)] * 3, lambda audio: audio.mean())
    with pytest.raises(ValueError, match="no clip"):
        features_of([], lambda audio: audio)
