"""The comparison of latent channels: every variant trains and is measured, and is not done twice."""

import json

import pytest

from avdit.data.latents import render_shards
from benchmarks.codec_channels import main


def test_channels_and_their_table(tiny_checkpoint, tmp_path, capsys):
    render_shards(tmp_path / "cache" / "clips" / "landscape", 1)
    out = tmp_path / "channels"
    words = [str(out), "--cache", str(tmp_path / "cache"), "--checkpoint", str(tiny_checkpoint)]
    words += ["--codec-minutes", "0.02", "--backbone-minutes", "0.02", "--pictures", "2"]
    assert main([*words, "--channels", "16", "20"]) == 0
    said = capsys.readouterr().out
    assert [row.split()[1] for row in said.splitlines()[2:]] == ["16", "20"] and said == (
        out / "channels.md"
    ).read_text()
    for channels in (16, 20):
        config = json.loads((out / f"{channels}-channels" / "video_codec" / "config.json").read_text())
        assert config["vae"]["latent_channels"] == channels
        found = json.loads((out / f"{channels}-channels" / "result.json").read_text())
        assert 3 < found["psnr_db"] < 40 and found["picture_distance"] > found["picture_distance_codec"] > 0
    (out / "16-channels" / "video_codec" / "config.json").unlink()  # what is finished needs it no more
    assert main([*words, "--channels", "20", "16"]) == 0
    assert [row.split()[1] for row in capsys.readouterr().out.splitlines()[2:]] == ["20", "16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--codec-minutes", "0"], "minutes must be more than 0"),
        (["--cache", "nowhere"], "nowhere/clips/landscape holds no rendered clips"),
    ],
)
def test_wrong_input_ends_with_one_sentence(change, message, tmp_path, capsys):
    words = [str(tmp_path / "out"), "--cache", str(tmp_path), "--codec-minutes", "1", "--backbone-minutes", "1"]
    assert main([*words, *change]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not (tmp_path / "out").exists()
