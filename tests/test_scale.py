"""Many processes, accumulated parts, recomputed blocks and half precision train the same model; a dry run is honest."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avdit.cli import main
from avdit.data.latents import Shards
from avdit.generate import DEFAULT_CHECKPOINT
from avdit.geometry import ClipGeometry
from avdit.media import write_clip
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT
from avdit.models.dit import DiT
from avdit.models.schedule import xl_scheduler, xs_scheduler
from avdit.models.video_codec import VideoCodec
from avdit.pipeline import AVDiTPipeline
from avdit.training import adapters, backbone, codecs
from avdit.training.diffusion import Diffusion
from avdit.training.trainer import Trainer, TrainerConfig, optimisers

ROOT = DEFAULT_CHECKPOINT.parent.parent
GEOMETRY = ClipGeometry(frames=8, height=64, width=64)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """``films`` of two classes, and ``pipeline``, a small random one that predicts the noise."""
    root = tmp_path_factory.mktemp("scale")
    generator = np.random.default_rng(0)
    for label in ("fire", "rain"):
        (root / "films" / label).mkdir(parents=True)
        for i in range(3):
            frames = generator.random((8, 1, 1, 3), np.float32) * np.ones((1, 64, 64, 1), np.float32)
            sound = generator.standard_normal(GEOMETRY.samples).astype(np.float32) * 0.1
            write_clip(root / "films" / label / f"{i}.mp4", frames, sound, fps=10, sampling_rate=16000)
    torch.manual_seed(0)
    shape = {"input_size": 4, "in_channels": 16, "num_classes": 5, "learn_sigma": False}
    model = AVDiT.from_backbone(
        DiT(hidden_size=32, depth=2, num_heads=2, **shape),
        GEOMETRY,
        num_classes=2,
        temporal_width=32,
        lora_rank=4,
        interaction_rank=4,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = AVDiTPipeline(model, VideoCodec(), AudioCodec(), xl_scheduler(), classes=["fire", "rain"])
    pipe.save_pretrained(root / "pipeline")
    return root


def configuration(place: Path, **train) -> dict:
    data = {"folder": str(place / "films"), "files_per_shard": 1}
    # AdamW: Muon makes every direction of a gradient, rounding's too, as large as the others.
    train = {"steps": 4, "learning_rate": 1e-3, "warmup_steps": 1, "sample_every": 0, "optimiser": "adamw", **train}
    return {"pipeline": str(place / "pipeline"), "data": data, "cache": str(place / "cache"), "train": train}


def trained(out: Path) -> dict[str, torch.Tensor]:
    state = load_file(out / "state.safetensors")
    return {name: value for name, value in state.items() if name.startswith(("weight.", "ema."))}


def assert_same(place: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """All that is learned is the same, but for what rounding makes of it.

    Adam turns the sign of a gradient that is next to nothing into a whole step; so a few weights may differ by steps.
    """
    start = load_file(place / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    apart = sum((found[name] - value).square().sum() for name, value in expected.items())
    moved = sum((value - start[name.split(".", 1)[1]]).square().sum() for name, value in expected.items())
    assert moved > 0 and (apart / moved).sqrt() < 0.03


def in_two_processes(config: Path, out: Path, *options: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "avdit"]
    command = [*launch, "train", "adapters", "--config", str(config), "--out", str(out), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def alone(place) -> dict[str, torch.Tensor]:
    """What one process learns with a batch of four."""
    adapters.run(configuration(place, batch_size=4), place / "alone")
    return trained(place / "alone")


def test_one_process_learns_from_the_folder(place, alone):
    assert len(Shards(place / "cache" / "latents")) == 6
    before = load_file(place / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = [n for n, v in before.items() if f"weight.{n}" in alone and not torch.equal(v, alone[f"weight.{n}"])]
    assert len(moved) == sum(name.startswith("weight.") for name in alone)
    pipe = AVDiTPipeline.from_pretrained(place / "alone" / "pipeline")
    assert pipe.classes == ["fire", "rain"] and pipe.scheduler.config.prediction_type == "epsilon"
    pack = load_file(place / "alone" / "pack" / "adapters.safetensors")
    pipe.transformer.load_adapter_state_dict(pack)  # all of it, and nothing else
    assert not any(name.startswith("backbone.") for name in pack)


def test_two_processes_learn_the_same(place, alone):
    config = place / "two.json"
    settings = {**configuration(place, batch_size=2), "cache": str(place / "cache-of-two")}
    config.write_text(json.dumps(settings))
    in_two_processes(config, place / "two")
    one, two = Shards(place / "cache" / "latents"), Shards(place / "cache-of-two" / "latents")
    assert torch.equal(one.get("video", torch.arange(6)), two.get("video", torch.arange(6)))
    assert_same(place, trained(place / "two"), alone)
    shutil.rmtree(place / "two" / "pipeline")
    in_two_processes(config, place / "two", "--resume")
    assert_same(place, trained(place / "two"), alone)
    assert (place / "two" / "pipeline" / "model_index.json").is_file()


def test_accumulated_parts_learn_the_same(place, alone, tmp_path):
    adapters.run(configuration(place, batch_size=1, accumulation=4), tmp_path)
    assert_same(place, trained(tmp_path), alone)


@pytest.mark.parametrize("blocks", ["gradient_checkpointing", "compile"])
def test_recomputed_and_compiled_blocks_learn_the_same(place, alone, tmp_path, blocks):
    adapters.run(configuration(place, batch_size=4, **{blocks: True}), tmp_path)
    assert_same(place, trained(tmp_path), alone)


def test_class_table_can_stay_as_it_is(place, alone, tmp_path):
    adapters.run({**configuration(place, batch_size=4), "class_table": False}, tmp_path)
    table = "class_embedder.embedding_table.weight"
    assert alone.keys() - trained(tmp_path).keys() == {f"weight.{table}", f"ema.{table}"}
    before = load_file(place / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")[table]
    assert torch.equal(load_file(tmp_path / "pack" / "adapters.safetensors")[table], before.bfloat16().float())


def test_muon_turns_the_matrices_of_blocks_and_adapters(place):
    model = AVDiT.from_pretrained(place / "pipeline" / "transformer")
    named = dict(model.named_parameters())
    _, muon = optimisers(named, TrainerConfig(optimiser="muon"))
    turned = {name for name, p in named.items() if any(p is q for q in muon.param_groups[0]["params"])}
    assert {"backbone.blocks.0.mlp.fc1.weight", "adapters.1.temporal.qkv.weight"} < turned
    others = {
        "adapters.0.temporal.positions",
        "class_embedder.embedding_table.weight",
        "backbone.t_embedder.mlp.0.weight",
    }
    assert others < named.keys() - turned


def test_stopped_run_goes_on_as_if_it_had_not_stopped(place, alone, tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(configuration(place, batch_size=4, save_every=2)))
    command = ["train", "adapters", "--config", str(config), "--out", str(tmp_path / "out")]
    step = Trainer.train_step

    def stopped(trainer: Trainer) -> dict[str, torch.Tensor]:
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert not (tmp_path / "out" / "pipeline").exists()
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0
    torch.testing.assert_close(trained(tmp_path / "out"), alone, atol=0, rtol=0)
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


def test_held_out_files_tell_when_to_stop(place, tmp_path):
    (tmp_path / "test.txt").write_text("fire/2\nrain/2\n")
    settings = configuration(place, batch_size=4, check_every=2, patience=1)
    settings |= {"cache": str(tmp_path / "cache"), "data": settings["data"] | {"test": str(tmp_path / "test.txt")}}
    adapters.run(settings, tmp_path / "out")
    assert len(Shards(tmp_path / "cache" / "latents")) == 4
    assert len(Shards(tmp_path / "cache" / "held-out" / "latents")) == 2

    def checks(out: Path) -> dict[int, dict[str, float]]:
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return {row["step"]: row["held_out"] for row in rows if "held_out" in row}

    told = checks(tmp_path / "out")
    assert list(told) == [0, 2, 4]
    for scores in told.values():  # each rounded to five places
        assert scores["loss"] == pytest.approx(scores["video"] + scores["audio"], abs=2e-5)
    assert told[4]["loss"] < told[0]["loss"]
    settings["train"]["batch_size"] = 2
    (tmp_path / "two.json").write_text(json.dumps(settings))
    in_two_processes(tmp_path / "two.json", tmp_path / "two")
    assert list(two := checks(tmp_path / "two")) == [0, 2, 4]
    assert [two[step]["loss"] for step in two] == pytest.approx([told[step]["loss"] for step in told], rel=1e-3)


def test_another_seed_learns_something_else(place, alone, tmp_path):
    adapters.run(configuration(place, batch_size=4, seed=1), tmp_path)
    name = next(name for name in alone if name.endswith("temporal.up.weight"))
    assert not torch.allclose(trained(tmp_path)[name], alone[name], atol=2e-4)


def test_blocks_keep_nothing_when_they_are_recomputed():
    def kept(checkpointing: bool) -> int:
        torch.manual_seed(0)
        model = DiT(input_size=8, hidden_size=64, depth=4, num_heads=2, num_classes=2, learn_sigma=False)
        if checkpointing:
            model.enable_gradient_checkpointing()
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).sum()
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def test_half_precision_and_dry_run_on_the_command_line(place, tmp_path):
    config = tmp_path / "config.json"
    train = {"batch_size": 2, "accumulation": 2, "mixed_precision": "bf16", "steps": 7200}
    config.write_text(json.dumps(configuration(place, **train)))
    command = [sys.executable, "-m", "avdit", "train", "adapters", "--config", str(config), "--dry-run", "--json"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert said["precision"] == "bf16" and said["batch"] == {"process": 2, "accumulation": 2, "global": 4}
    assert said["data"]["files_by_class"] == {"fire": 3, "rain": 3} and said["data"]["encode_seconds_per_clip"] > 0
    model = AVDiT.from_pretrained(place / "pipeline" / "transformer")
    tunable = sum(p.numel() for p in model.adapter_parameters())
    assert said["parameters"]["trainable"] == tunable
    assert said["counted_gb"]["optimiser"] == pytest.approx(8 * tunable / 1e9, abs=1e-3)
    assert said["hours"] == pytest.approx(2 * said["seconds_per_step"], abs=0.01) and said["peak_gb"] > 0.1
    assert 0 < said["share_of_peak"] < 1
    # Forward and, through what is frozen, back: no fewer than four operations for a parameter of a block and a token.
    blocks = sum(p.numel() for p in model.backbone.blocks.parameters() if p.ndim == 2)
    modulation = sum(p.numel() for n, p in model.backbone.blocks.named_parameters() if "adaLN" in n and p.ndim == 2)
    tokens = 4 * (model.clip.video_tokens + model.clip.audio_tokens)
    assert 1 < said["gflop_per_step"] * 1e9 / (4 * tokens * (blocks - modulation)) < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"folder": "nowhere"}}, "nowhere is not a folder"),
        ({"data": {"folder": "films", "train": "none.txt"}}, "none.txt is not a list"),
        ({"pipeline": "nowhere"}, "nowhere is not a pipeline folder"),
        ({"train": {"accumulation": 0}}, "accumulation 0 must be a whole number of 1 or more"),
        ({"train": {"mixed_precision": "int4"}}, "mixed_precision 'int4' must be"),
        ({"train": {"check_every": 2}}, "name some in data's test"),
        ({"modalities": ["smell"]}, "must be video, audio or both"),
        ({"data": {"folder": "films", "classes": ["snow"]}}, "is of class 'snow'"),
        ({"data": {"folder": "films", "classes": "fire"}}, "classes 'fire' must be a list"),
        ({"pipeline": "", "geometry": {"depth": 3}}, "unknown geometry setting 'depth'"),
    ],
)
def test_wrong_settings_are_one_line(place, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(place)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**configuration(place), **changes}))
    assert main(["train", "adapters", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_noise_or_velocity_is_predicted_as_the_schedule_says():
    clean, noise, t = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([100, 900])
    given = torch.zeros(2, dtype=torch.bool)
    noised, target = Diffusion(xl_scheduler()).noised(clean, noise, t, given)
    assert torch.equal(target, noise)
    torch.testing.assert_close(noised, xl_scheduler().add_noise(clean, noise, t), atol=1e-5, rtol=1e-5)
    assert not torch.equal(Diffusion(xs_scheduler()).noised(clean, noise, t, given)[1], noise)


def test_module_that_keeps_its_activations_says_so(tmp_path):
    config = TrainerConfig(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="Linear cannot compute its blocks again"):
        Trainer(torch.nn.Linear(2, 2), lambda *_: {}, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_training_of_a_process_has_its_own_precision(tmp_path):
    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            computed.append(out.dtype)
            return out

    def loss(module: torch.nn.Module, *_) -> dict[str, torch.Tensor]:
        return {"loss": module(torch.ones(1, 2)).sum()}

    computed: list[torch.dtype] = []
    for precision in ("no", "bf16", ""):
        Trainer(Layer(2, 2), loss, TrainerConfig(mixed_precision=precision), tmp_path).train_step()
    assert computed == [torch.float32, torch.bfloat16, torch.float32]


def test_backbone_learns_from_the_frames_of_a_folder(place, tmp_path):
    config = {
        "data": {"folder": str(place / "films"), "classes": ["rain"]},
        "codecs": str(place / "pipeline"),
        "geometry": {"frames": 8, "height": 64, "width": 64},
        "model": {"hidden_size": 32, "depth": 2, "num_heads": 2},
        "train": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "sample_every": 0},
    }
    told = backbone.run(config, tmp_path / "out", dry_run=True)
    assert told["data"]["files_by_class"] == {"rain": 3} and not (tmp_path / "out").exists()
    backbone.run(config, tmp_path / "out")
    assert DiT.from_pretrained(tmp_path / "out" / "backbone").config.num_classes == 1
    assert len(Shards(tmp_path / "out" / "latents")) == 3


def test_dry_run_of_the_codecs_tells_both(tmp_path):
    parts = {part: {"batch_size": 1, "steps": 10} for part in ("video", "audio")}
    told = codecs.run(parts, tmp_path / "out", dry_run=True)
    assert set(told) == {"video", "audio"} and not (tmp_path / "out").exists()
    assert told["video"]["parameters"]["trainable"] == sum(p.numel() for p in VideoCodec().parameters())
