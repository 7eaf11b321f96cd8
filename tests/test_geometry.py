import pytest

from avdit.geometry import ClipGeometry


def test_small_geometry():
    g = ClipGeometry()
    assert (g.frames, g.samples, g.mel_frames, g.seconds) == (16, 25600, 160, 1.6)
    assert g.video_latent_shape == (16, 16, 16)
    assert g.audio_latent_shape == (8, 40, 16)
    assert (g.tokens_per_frame, g.video_tokens) == (64, 1024)
    assert (g.audio_grid, g.audio_tokens) == ((20, 4), 80)


def test_paper_geometry():
    g = ClipGeometry.xl()
    assert (g.frames, g.samples, g.mel_frames) == (16, 25600, 160)
    assert g.video_latent_shape == (4, 32, 32)
    assert g.audio_latent_shape == (8, 40, 16)
    assert (g.tokens_per_frame, g.video_tokens, g.audio_tokens) == (256, 4096, 160)


def test_columns_end_with_their_frames():
    g = ClipGeometry()
    assert [g.columns_of(k) for k in (0, 4, 8, 16)] == [0, 5, 10, 20]
    assert g.columns_of(1) == 1  # column 0 ends at 80 ms, frame 0 at 100 ms


def test_rebuilds_from_its_own_dictionary():
    fields = {k: v for k, v in ClipGeometry.xl().as_dict().items() if k != "samples"}
    assert ClipGeometry(**fields) == ClipGeometry.xl()


def test_size_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="height = 250 must be a multiple of 32"):
        ClipGeometry(height=250)
