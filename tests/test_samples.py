"""Clips for the field's distances: shared out, taken up again, and measured from their folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from avdit.cli import main
from avdit.data.latents import Shards
from avdit.evaluation.distances import ClipSet
from avdit.evaluation.samples import shards_of, write_samples
from avdit.evaluation.tasks import Sampling
from avdit.generate import load_pipeline
from avdit.geometry import ClipGeometry
from avdit.media import write_clip
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline

GEOMETRY = ClipGeometry(frames=8, height=64, width=64)
SAMPLING = Sampling(steps=1, batch=2)
CLIPS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "small"
    torch.manual_seed(0)
    shape = {"input_size": 4, "in_channels": 16, "num_classes": 2, "learn_sigma": False}
    sizes = {"temporal_width": 32, "lora_rank": 4, "interaction_rank": 4}
    model = AVDiT.from_backbone(DiT(hidden_size=32, depth=2, num_heads=2, **shape), GEOMETRY, num_classes=2, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    AVDiTPipeline(model, VideoCodec(), AudioCodec(), xs_scheduler(), classes=["fire", "rain"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(checkpoint) -> Path:
    """What the command makes alone."""
    out = checkpoint.parent / "made"
    command = ["samples", "--checkpoint", str(checkpoint), "--clips", str(CLIPS), "--steps", "1", "--batch", "2"]
    assert main([*command, "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_every_clip_has_a_seed_of_its_own_and_classes_are_even():
    shards = shards_of(2048, 9, 8)
    assert sorted(seed for shard in shards for seed in shard.seeds) == list(range(2048))
    counts = [sum(len(shard.seeds) for shard in shards if shard.label == label) for label in range(9)]
    assert set(counts) == {227, 228} and max(len(shard.seeds) for shard in shards) == 8


def test_clips_are_those_of_their_seeds(checkpoint, made):
    shards = Shards(made)
    assert shards.get("label", torch.arange(CLIPS)).tolist() == [0, 0, 0, 1, 1]
    pipe = load_pipeline(checkpoint)
    alone = pipe("rain", num_inference_steps=1, generator=torch.Generator().manual_seed(4))
    frames, audio = (shards.get(key, torch.tensor([3, 4])).numpy() for key in ("frames", "audio"))
    # The command computes in the precision that the machine is fast in.
    other, own = (np.abs(clip / 255 - alone.frames[0]).mean() for clip in frames)
    assert own < 0.01 and own < other / 3
    other, own = (np.abs(clip - alone.audio[0]).mean() for clip in audio)
    assert own < other / 2  # guidance in a single step makes much of what was rounded


def test_shares_of_two_processes_and_a_stop_make_the_same(checkpoint, made, tmp_path):
    pipe = load_pipeline(checkpoint)
    first = write_samples(pipe, tmp_path, CLIPS, SAMPLING, share=slice(0, None, 2))
    assert first["made"] == 2
    with pytest.raises(ValueError, match="holds 4 of 5 clips: run samples again"):
        ClipSet(tmp_path).source()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("clips-*")}
    assert write_samples(pipe, tmp_path, CLIPS, SAMPLING)["made"] == 1  # only what is missing
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    assert Shards(tmp_path).get("label", torch.arange(CLIPS)).tolist() == [0, 0, 0, 1, 1]
    assert len({path.name for path in tmp_path.iterdir()}) == 4  # three shards and their note
    assert len(ClipSet(tmp_path).source()) == CLIPS
    assert json.loads((tmp_path / "samples.json").read_text())["clips"] == CLIPS


def test_clips_of_other_settings_do_not_mix(checkpoint, made, tmp_path, capsys):
    pipe = load_pipeline(checkpoint)
    with pytest.raises(ValueError, match="clips of other settings: steps is 1, not 2"):
        write_samples(pipe, made, CLIPS, Sampling(steps=2, batch=2))
    (tmp_path / "clips-00000000.safetensors").write_bytes(b"of something else")
    with pytest.raises(ValueError, match="holds something else"):
        write_samples(pipe, tmp_path, CLIPS, SAMPLING)
    command = ["samples", "--checkpoint", str(checkpoint), "--classes", "snow", "--out", str(tmp_path / "new")]
    assert main([*command, "--device", "cpu"]) == 2
    assert "unknown class 'snow'" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def films(made) -> Path:
    """The same clips as mp4 files, and one that is far off."""
    folder = made.parent / "films"
    shards = Shards(made)
    for i in range(CLIPS):
        frames = shards.get("frames", torch.tensor([i]))[0].numpy() / np.float32(255)
        sound = shards.get("audio", torch.tensor([i]))[0].numpy()
        (folder / "fire").mkdir(parents=True, exist_ok=True)
        write_clip(folder / "fire" / f"{i}.mp4", frames, sound, fps=10, sampling_rate=16000)
    return folder


def distances(capsys, *arguments) -> dict:
    assert main(["distances", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_distances_of_a_folder_from_itself_and_from_other_films(checkpoint, made, films, tmp_path, capsys):
    itself = distances(capsys, "--real", made, "--made", made, "--sizes", 32, 64)
    assert itself["fvd"].keys() == {"32", "64"} and itself["clips"] == {"real": CLIPS, "made": CLIPS}
    assert max(*itself["fvd"].values(), itself["fad"]) == pytest.approx(0, abs=1e-3)
    assert itself["sampling"]["steps"] == 1 and itself["protocol"] is False
    near = distances(capsys, "--real", films, "--made", made, "--sizes", 64)
    generator = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / "noise").mkdir(exist_ok=True)
        noise = generator.random((8, 64, 64, 3), np.float32)
        hiss = (generator.standard_normal(GEOMETRY.samples) * 0.3).astype(np.float32)
        write_clip(tmp_path / "noise" / f"{i}.mp4", noise, hiss, fps=10, sampling_rate=16000)
    far = distances(capsys, "--real", tmp_path / "noise", "--made", made, "--sizes", 64)
    for name in ("fvd", "kvd"):
        assert near[name]["64"] < far[name]["64"]
    assert near["fad"] < far["fad"]


def test_table_with_networks_of_the_user(made, films, tmp_path, capsys):
    class Colours(torch.nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            assert clips.shape[3] == 224
            return torch.cat([clips.mean(dim=[2, 3, 4]), clips.std(dim=[2, 3, 4])], 1)

    class Loudness(torch.nn.Module):
        def forward(self, audio: torch.Tensor) -> torch.Tensor:
            return audio.view(len(audio), 4, -1).abs().mean(2)

    for name, network in (("colours.pt", Colours()), ("loudness.pt", Loudness())):
        torch.jit.script(network).save(tmp_path / name)
    (tmp_path / "three.txt").write_text("fire/0\n1.mp4\n2\n")
    options = ["--video-features", tmp_path / "colours.pt", "--audio-features", tmp_path / "loudness.pt"]
    options += ["--real-list", tmp_path / "three.txt", "--clips", 4]
    assert main(["distances", "--real", str(films), "--made", str(made), *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"4 clips of {made} against 3 of {films}") and "2048" in lines[0]
    assert lines[1].split() == ["pixels", "FVD", "KVD"]
    assert [line.split()[0] for line in lines[2:5]] == ["64", "256", "FAD"] and "video: colours.pt" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clips", "1"], "--clips 1 must be"),
        (["--sizes", "4"], "--sizes 4 must be"),
        (["--real", "nowhere"], "nowhere is not a folder"),
        (["--video-features", "i3d.pt"], "feature network i3d.pt does not exist"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
    ],
)
def test_wrong_input_ends_with_one_sentence(made, options, message, capsys):
    assert main(["distances", "--real", str(made), "--made", str(made), *options]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
