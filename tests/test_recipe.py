"""The recipe: every stage goes on from the one before, and what comes out is a pipeline of all packs."""

import pytest
import torch
from safetensors.torch import load_file

from avdit.data.scenes import PACKS
from avdit.models.avdit import AVDiT
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training import recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_recipe_makes_a_pipeline_of_all_packs_and_trains_nothing_twice(tmp_path):
    short = {"steps": 1, "batch_size": 1, "sample_every": 0, "warmup_steps": 1}
    config = {"clips": 1, "codecs": {"clips": 1, "parts": ["video"], "crop": 64, "perceptual": 0, "video": short}}
    config |= {name: {"train": short} for name in recipe.DEFAULTS if name not in ("start", "clips", "codecs")}
    config["decoder"] = {"clips": 1, "remade": 1, "sampling_steps": 2, "train": {**short, "batch_size": 4}}
    recipe.run(config, tmp_path)
    pipe = AVDiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.packs == {name: list(classes) for name, classes in PACKS.items()}
    assert pipe.turbo_steps("thunder") == 8 and pipe.turbo_steps("break") == 6
    assert pipe.turbo_of("thunder").audio_lag == 0.125 and pipe.turbo_of("break").audio_lag == 0.333
    assert [
        pack.audio_lag for pack in map(Pack.load, (tmp_path / "landscape-lag" / "pack", tmp_path / "dance" / "pack"))
    ] == [0.167, 0.0]
    made = pipe("thunder", 12, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert pipe.num_timesteps == 14 and made.audio.isfinite().all()
    made = pipe("krump", turbo=True, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert made.frames.isfinite().all()

    # The packs stand on the backbone that the recipe trained, with its codec, whose decoder has learned to show them.
    backbone = load_file(tmp_path / "backbone" / "backbone" / WEIGHTS)
    folders = (str(tmp_path / "pipeline"), recipe.DEFAULTS["start"])
    joint, shipped = (AVDiT.from_pretrained(folder, subfolder="transformer").state_dict() for folder in folders)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(joint[f"backbone.{name}"], backbone[name])
    assert not torch.equal(backbone[name], shipped[f"backbone.{name}"])
    codecs = [load_file(tmp_path / part / "video_codec" / WEIGHTS) for part in ("codecs", "pipeline")]
    changed = {name for name, value in codecs[0].items() if not torch.equal(value, codecs[1][name])}
    assert changed and all(name.startswith("autoencoder.decoder.") for name in changed)

    # What turbo adapters learned from their own clips those for guided steps have, too.
    begun, learned = (Pack.load(tmp_path / f"landscape-{part}" / "pack").state for part in ("turbo-lag", "rollouts"))
    guided = Pack.load(tmp_path / "landscape-lag" / "pack").state
    name = "adapters.0.temporal.up.weight"
    moved = learned[name].float() - begun[name].float()
    assert moved.any() and torch.equal(joint[name], (guided[name].float() + moved).bfloat16().float())

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/log.jsonl")}
    weights = (tmp_path / "dance" / "pack" / "adapters.safetensors").stat().st_mtime_ns
    recipe.run(config, tmp_path, resume=True)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/log.jsonl")}
    assert weights == (tmp_path / "dance" / "pack" / "adapters.safetensors").stat().st_mtime_ns


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbones": {}}, "unknown stage 'backbones' of the recipe"),
        ({"start": "nowhere"}, "start nowhere is not a pipeline folder"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_told_in_a_sentence(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        recipe.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
