"""The table of the paper's claims: each variant trains and is measured as it says, and is not done twice."""

import json

import pytest
import torch

from avdit.data.latents import write_shard
from avdit.data.scenes import ALL_CLASSES, CLASSES
from avdit.generate import load_pipeline
from avdit.geometry import ClipGeometry
from avdit.models.dit import DiT
from benchmarks.claims import VARIANTS, common, configured, folder_of, main, parser, trained

OURS, SCRATCH = list(VARIANTS)[0], list(VARIANTS)[-1]


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    """The benchmark's words for three steps on latents of noise."""
    clip = ClipGeometry()
    count = len(CLASSES)
    latents = {"video": torch.randn(count, clip.frames, *clip.video_latent_shape).half()}
    latents |= {"audio": torch.randn(count, *clip.audio_latent_shape).half(), "label": torch.arange(count)}
    write_shard(tmp_path / "cache" / "latents" / "landscape" / "clips-00000000.safetensors", latents)
    shape = {"input_size": 16, "in_channels": 16, "num_classes": len(ALL_CLASSES), "learn_sigma": False}
    DiT(hidden_size=32, depth=2, num_heads=2, **shape).save_pretrained(tmp_path / "backbone")
    config = {"model": {"temporal_width": 32, "lora_rank": 4, "interaction_rank": 4}, "train": {"batch_size": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folders = {"backbone": tmp_path / "backbone", "codecs": tiny_checkpoint, "latents": tmp_path / "cache"}
    words = [str(tmp_path / "claims"), "--config", str(tmp_path / "config.json")]
    for name, folder in folders.items():
        words += [f"--{name}", str(folder)]
    return [*words, "--steps", "3", "--clips", "1", "--event-clips", "1", "--sampling-steps", "1"]


def cost_of(words, name, out):
    """What training the variant costs."""
    return trained(configured(common(parser().parse_args(words)), name, out), folder_of(out, name))


def test_variants_and_their_table(command, tmp_path, capsys):
    out = tmp_path / "claims"
    assert main([*command, "--variants", SCRATCH]) == 0
    alone = capsys.readouterr().out
    assert alone.count("\n| ") == 1 + 1 + 2 and alone.splitlines()[2].startswith(f"| {SCRATCH} |")
    scratch = json.loads((folder_of(out, SCRATCH) / "result.json").read_text())
    assert (scratch["steps"], scratch["training_clips"]) == (3, 6) and scratch["share"] > 0.9
    assert scratch["peak_gb"] > 0.1 and scratch["clips_per_second"] > 0
    ours = cost_of(command, OURS, out)
    assert scratch["tunable"] > ours["tunable"] > 0
    for name in VARIANTS:  # all count as finished
        folder_of(out, name).mkdir(exist_ok=True)
        (folder_of(out, name) / "result.json").write_text(json.dumps({**scratch, "variant": name}))
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("\n| ") == 1 + len(VARIANTS) + 2 and said.splitlines()[2].startswith(f"| {OURS} |")
    assert "Budget: 3 steps" in said and said == (out / "claims.md").read_text()
    assert [one["variant"] for one in json.loads((out / "claims.json").read_text())] == list(VARIANTS)


def from_pipeline(command, tiny_checkpoint):
    """The command with a trained pipeline in place of backbone and codecs."""
    kept = [word for word in command if word != "--backbone" and not word.endswith("/backbone")]
    at = kept.index("--codecs")
    return [*kept[:at], "--pipeline", str(tiny_checkpoint), *kept[at + 2 :]]


def test_a_trained_model_goes_on_without_a_part(command, tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"batch_size": 2, "learning_rate": 0.0}}))
    out = tmp_path / "claims"
    assert cost_of(from_pipeline(command, tiny_checkpoint), "no interaction", out)["steps"] == 3
    before = load_pipeline(tiny_checkpoint).transformer
    after = load_pipeline(out / "no-interaction" / "pipeline").transformer
    assert (before.config.interaction_every, after.config.interaction_every) == (2, 0)
    kept, was = after.state_dict(), before.state_dict()
    assert {name for name in was if name not in kept} == {
        name for name in was if ".interaction." in name or name.startswith("foley")
    }
    assert all(torch.equal(value, was[name].bfloat16().float()) for name, value in kept.items())  # the rate is 0


def test_a_part_that_no_model_has_is_named(command, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"temporal_size": 0}}))
    words = [*from_pipeline(command, tiny_checkpoint), "--only", OURS]
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "claims: parts: the model has no 'temporal_size'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--variants", "no interaction", SCRATCH], "does not go on from a pipeline: give --backbone and --codecs"),
        (["--only", SCRATCH], "does not go on from a pipeline: give --backbone and --codecs"),
        (["--codecs", "checkpoints"], "--backbone and --codecs go together, and not with --pipeline"),
        (["--pipeline", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_start_ends_with_one_sentence(command, tiny_checkpoint, change, message, tmp_path, capsys):
    assert main([*from_pipeline(command, tiny_checkpoint), *change]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not (tmp_path / "claims").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "0"], "the budget 0 must be more than 0"),
        (["--latents", "nowhere"], "nowhere/latents/landscape does not exist"),
        (["--pack", "dance"], "latents/dance does not exist"),
        (["--clips", "0"], "--clips 0 must be"),
        (["--event-clips", "0"], "--event-clips 0 must be 1 or more"),
    ],
)
def test_wrong_input_ends_with_one_sentence(command, change, message, tmp_path, capsys):
    assert main([*command, *change]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not (tmp_path / "claims").exists()


def test_two_budgets_do_not_mix(command, tmp_path, capsys):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "settings.json").write_text("{}")
    assert main(command) == 2
    assert "holds variants of other settings" in capsys.readouterr().err
