"""The paper's scale, on small random models saved in exactly the published layouts."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from avdit.cli import main
from avdit.generate import load_pipeline
from avdit.geometry import ClipGeometry
from avdit.models import published
from avdit.models.avdit import AVDiT
from avdit.models.convert import load_dit
from avdit.models.dit import DiT
from avdit.pipeline import AVDiTPipeline
from avdit.xl import LARGEST_SHARE, PARTS, XL_ADAPTERS
from benchmarks.xl import main as benchmark
from benchmarks.xl import published_vae

SMALL = ["--temporal-width", "32", "--lora-rank", "2", "--interaction-rank", "2"]
CONV, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(folder: Path, name: str = WEIGHTS, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a saved model."""
    state = {**load_file(folder / name), **changes}
    save_file({k: v for k, v in state.items() if v is not None}, folder / name, metadata={"format": "pt"})


def vae(blocks: int, channels: int, latents: int, scaling: float) -> AutoencoderKL:
    shape = {"in_channels": channels, "out_channels": channels, "latent_channels": latents, "scaling_factor": scaling}
    shape |= {"down_block_types": (CONV,) * blocks, "up_block_types": (UP,) * blocks, "layers_per_block": 1}
    return AutoencoderKL(**shape, block_out_channels=(8,) * blocks, norm_num_groups=4)


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> Path:
    """Folders ``dit``, ``sd`` and ``audioldm`` as their hub repositories are laid out."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    shape = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "num_embeds_ada_norm": 10}
    dit = DiTTransformer2DModel(**shape, in_channels=4, out_channels=8, sample_size=32, patch_size=2)
    state = dit.state_dict()
    for name in state:  # every block has a copy of one embedder
        first = name.replace(name.split(".")[1], "0", 1) if ".norm1.emb." in name else name
        state[name] = state[first]
    dit.load_state_dict(state)
    dit.save_pretrained(root / "dit" / "transformer")
    # The published configuration is older than the class: it names what the transformer was cut from.
    config = json.loads((root / "dit" / "transformer" / "config.json").read_text())
    old = {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "norm_type": "ada_norm_zero"}
    old |= {"cross_attention_dim": None, "only_cross_attention": False, "use_linear_projection": False}
    (root / "dit" / "transformer" / "config.json").write_text(json.dumps({**config, **old}))

    vae(4, 3, 4, 0.18215).save_pretrained(root / "sd")
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = load_file(root / "sd" / WEIGHTS)
    for old_name, new in names.items():  # as the published files name the attention
        for key in [key for key in state if f"attentions.0.{new}." in key]:
            state[key.replace(new, old_name)] = state.pop(key)
    save_file(state, root / "sd" / WEIGHTS, metadata={"format": "pt"})

    vae(3, 1, 8, 0.9227914214134216).save_pretrained(root / "audioldm" / "vae")
    rates = {"upsample_rates": [5, 4, 2, 2, 2], "upsample_kernel_sizes": [16, 16, 8, 4, 4]}
    voice = SpeechT5HifiGanConfig(
        model_in_dim=64, upsample_initial_channel=32, sampling_rate=16000, normalize_before=False, **rates
    )
    SpeechT5HifiGan(voice).save_pretrained(root / "audioldm" / "vocoder")
    return root


def sources(root: Path, **other: str | Path) -> list[str]:
    paths = {"dit": root / "dit", "vae": root / "sd", "audio-vae": root / "audioldm", "vocoder": root / "audioldm"}
    return [str(word) for name, path in {**paths, **other}.items() for word in (f"--{name}", path)]


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope="module")
def assembled(repositories, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("assembled") / "xl"
    assert (
        main(
            [
                "assemble-xl",
                *sources(repositories),
                "--out",
                str(out),
                "--classes",
                "dog, cat",
                *SMALL,
                "--shared-noise",
                "0.25",
            ]
        )
        == 0
    )
    return out


def test_every_published_weight_is_in_the_pipeline(repositories, assembled):
    pipe = load_pipeline(assembled)
    assert pipe.classes == ["dog", "cat"] and pipe.geometry == ClipGeometry.xl()
    assert pipe.transformer.config.shared_noise == 0.25
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.scheduler.config.beta_schedule == "linear"
    codec, root = pipe.video_codec, repositories
    ours = {k: v for k, v in codec.autoencoder.state_dict().items()}
    theirs = load_file(root / "sd" / WEIGHTS)
    assert len(ours) == len(theirs)
    query = "encoder.mid_block.attentions.0"
    assert torch.equal(ours[f"{query}.to_q.weight"], theirs[f"{query}.query.weight"])
    assert codec.config.latent_std == pytest.approx(1 / 0.18215)
    for ours, path in (
        (pipe.audio_codec.autoencoder, "audioldm/vae/" + WEIGHTS),
        (pipe.audio_codec.synthesiser, "audioldm/vocoder/model.safetensors"),
    ):
        theirs = load_file(root / path)
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())
    assert pipe.audio_codec.config.latent_std == pytest.approx(1 / 0.9227914214134216)
    # The frozen transformer computes what diffusers' own does.
    x, t, y = torch.randn(2, 4, 32, 32), torch.tensor([3, 800]), torch.tensor([1, 10])
    with torch.no_grad():
        model = published.load_checked(DiTTransformer2DModel, root / "dit" / "transformer")
        wanted = model(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(pipe.transformer.backbone(x, t, y), wanted, atol=1e-4, rtol=1e-4)


def test_assembled_pipeline_makes_a_clip_and_tells_its_size(assembled, capsys):
    status, said, _ = run(capsys, "info", "--checkpoint", assembled)
    assert status == 0 and "tunable_share" in said and "\n  audio mlp " in said
    share = json.loads(run(capsys, "info", "--checkpoint", assembled, "--json")[1])["parameters"]["tunable_share"]
    assert 0 < share <= LARGEST_SHARE
    out = load_pipeline(assembled)("cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert out.frames.shape == (1, 16, 256, 256, 3) and out.audio.shape == (1, 25600)
    assert "CC BY-NC 4.0" in (assembled / "README.md").read_text()


def test_half_precision_on_a_cpu_takes_and_makes_everything(assembled):
    pipe = AVDiTPipeline.from_pretrained(assembled, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    sound = torch.sin(torch.arange(25600) * 0.2) * torch.linspace(0, 0.5, 25600)
    assert {p.dtype for part in (pipe.transformer, pipe.audio_codec) for p in part.parameters()} == {torch.bfloat16}
    exact = load_pipeline(assembled)
    assert (pipe.audio_codec.mel(sound[None]) - exact.audio_codec.mel(sound[None])).abs().max() < 1e-3
    positions = dict(exact.transformer.named_buffers())
    for name, found in pipe.transformer.named_buffers():  # only rounded, not computed in half precision
        torch.testing.assert_close(found.float(), positions[name], atol=5e-3, rtol=5e-3)
    for sampler, given in (
        ("ddim", {"audio": sound}),
        ("dpm++", {"image": torch.rand(256, 256, 3)}),
        ("unipc", {"video": torch.rand(16, 256, 256, 3)}),
    ):
        pipe.set_sampler(sampler)
        out = pipe("cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0), **given)
        assert np.isfinite(out.frames).all() and np.isfinite(out.audio).all() and out.frames.std() > 0


def test_offload_fetches_each_part_for_its_work(assembled, tmp_path, capsys):
    fetched = []

    class Fetch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            fetched.append(type(module).__name__)
            return args, kwargs

    pipe = AVDiTPipeline.from_pretrained(assembled)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.video_codec, pipe.audio_codec):
        add_hook_to_module(part, Fetch())
    pipe("cat", num_inference_steps=1, image=torch.zeros(256, 256, 3))
    assert fetched == ["VideoCodec", "AVDiT", "AVDiT", "VideoCodec", "AudioCodec"]  # one step, with guidance
    clip = ["--class", "cat", "--offload", "--out", tmp_path / "clip.mp4"]
    status, _, error = run(capsys, "generate", "--checkpoint", assembled, *clip)
    assert status == 2 and "--offload is for a GPU" in error and not list(tmp_path.iterdir())


def test_benchmark_runs_where_there_is_no_gpu(tiny_checkpoint, capsys):
    options = ["--device", "cpu", "--batches", "1", "--steps", "1", "--runs", "1", "--training-batch", "1"]
    said = benchmark(["--checkpoint", str(tiny_checkpoint), "--no-compile", *options])
    assert json.loads(capsys.readouterr().out) == said
    assert said["eager"].keys() == {"1"} and said["compiled"] == "n/a"
    for figures in said["eager"].values():
        assert figures["seconds_a_clip"] > 0 and 0 < figures["denoiser_share_of_matmul"] < 1.5
        assert figures["peak_gb"]["gpu"] == "n/a" and figures["peak_gb"]["process"] > 0.1
    assert said["training"]["batch"] == 1 and said["training"]["precision"] == "bf16"


def test_published_sizes_of_the_benchmark():
    with torch.device("meta"):
        vaes = published_vae(3, 4, (128, 256, 512, 512), 0.18215), published_vae(1, 8, (128, 256, 512), 0.92)
    assert [sum(p.numel() for p in vae.parameters()) for vae in vaes] == [83_653_863, 55_376_873]


def test_share_that_trains_at_the_papers_size():
    with torch.device("meta"):
        dit = DiT.from_name("DiT-XL/2")
        geometry = ClipGeometry.xl().as_dict()
        model = AVDiT(dit=dict(dit.config), geometry=geometry, num_classes=9, **XL_ADAPTERS)
    table = model.parameter_table()
    assert table["backbone"] == 675_129_632
    assert sum(table.values()) == 770_097_856  # as the module's docstring says
    assert model.trainable_share == pytest.approx(0.1233, abs=1e-4) and model.trainable_share <= LARGEST_SHARE


def test_original_single_file(repositories, tmp_path, capsys):
    state = DiT(hidden_size=256, depth=4, num_heads=4, num_classes=10).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(model="DiT")}, tmp_path / "DiT-XL-2-256x256.pt")
    single = sources(repositories, dit=tmp_path / "DiT-XL-2-256x256.pt")
    assert run(capsys, "assemble-xl", *single, "--out", tmp_path / "xl", *SMALL)[0] == 0
    loaded = AVDiT.from_pretrained(tmp_path / "xl" / "transformer")
    assert all(torch.equal(value, state[key]) for key, value in loaded.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("sd", {"decoder.conv_in.bias": None}, "'decoder.conv_in.bias' is missing"),
        ("sd", {"stranger": torch.zeros(1)}, "'stranger' is unknown"),
        ("audioldm/vae", {"encoder.conv_in.bias": torch.zeros(3)}, "'encoder.conv_in.bias' is (3,), not (8,)"),
        ("audioldm/vocoder", {"conv_pre.bias": None}, "'conv_pre.bias' is missing"),
        ("audioldm/vocoder", {"conv_pre.bias": torch.zeros(9)}, "'conv_pre.bias' is (9,), not (32,)"),
        ("dit/transformer", {"transformer_blocks.2.ff.net.2.bias": None}, "'transformer_blocks.2.ff.net.2.bias'"),
        ("dit/transformer", {"proj_out_1.bias": torch.zeros(1)}, "'proj_out_1.bias' is (1,), not (256,)"),
    ],
)
def test_first_wrong_key_is_named_and_nothing_written(repositories, tmp_path, capsys, part, change, message):
    root = shutil.copytree(repositories, tmp_path / "hub")
    edit(root / part, "model.safetensors" if part.endswith("vocoder") else WEIGHTS, **change)
    status, _, error = run(capsys, "assemble-xl", *sources(root), "--out", tmp_path / "xl", *SMALL)
    assert status == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "'blocks.1.mlp.fc2.bias' is missing"),
        ({"stranger": torch.zeros(1)}, "'stranger' is unknown"),
        ({"final_layer.linear.bias": torch.zeros(3)}, "'final_layer.linear.bias' is (3,), not (32,)"),
        ({"stranger": Path("code")}, "is not a whole file of weights alone"),
    ],
)
def test_first_wrong_key_of_a_single_file_is_named(tmp_path, capsys, change, message):
    state = DiT(hidden_size=256, depth=2, num_heads=4, num_classes=3).state_dict() | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "DiT.pt")
    status, _, error = run(capsys, "convert-dit", tmp_path / "DiT.pt", "--out", tmp_path / "out")
    assert status == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["DiT.pt"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vae": "audioldm/vae"}, "its in_channels is 1, not 3"),
        ({"audio-vae": "sd"}, "its in_channels is 3, not 1"),
        ({"vocoder": "sd"}, "holds a AutoencoderKL: expected SpeechT5HifiGan"),
        ({"dit": "sd"}, "holds a AutoencoderKL: expected DiTTransformer2DModel"),
        ({"dit": "missing.pt"}, "missing.pt does not exist"),
    ],
)
def test_wrong_parts_are_named(repositories, tmp_path, capsys, other, message):
    other = {name: repositories / path for name, path in other.items()}
    arguments = sources(repositories, **other)
    status, _, error = run(capsys, "assemble-xl", *arguments, "--out", tmp_path / "xl", *SMALL)
    assert status == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_much_to_train_is_refused(repositories, tmp_path, capsys):
    status, _, error = run(capsys, "assemble-xl", *sources(repositories), "--out", tmp_path / "xl")
    assert status == 2 and "at most 20%" in error and not list(tmp_path.iterdir())
    status, _, error = run(
        capsys, "assemble-xl", *sources(repositories), "--out", tmp_path / "xl", "--shared-noise", "2"
    )
    assert status == 2 and "shared_noise = 2.0 must be from 0 to 1" in error and not list(tmp_path.iterdir())
    (tmp_path / "kept.txt").write_text("mine")
    status, _, error = run(capsys, "assemble-xl", *sources(repositories), "--out", tmp_path, *SMALL)
    assert status == 2 and "is there already" in error and [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


@pytest.fixture
def hub(repositories, monkeypatch):
    """A hub of which the three repositories are all; it notes what is fetched."""
    folders = {
        "facebook/DiT-XL-2-256": "dit",
        "stabilityai/sd-vae-ft-ema": "sd",
        "cvssp/audioldm-s-full-v2": "audioldm",
    }
    fetched = []

    def model_info(self, repo, files_metadata):
        if repo not in folders:
            raise OSError("no such repository")
        root = repositories / folders[repo]
        files = [path for path in root.rglob("*") if path.is_file()]
        siblings = [SimpleNamespace(rfilename=str(f.relative_to(root)), size=f.stat().st_size) for f in files]
        # Copies that are not wanted stand beside the weights.
        siblings += [SimpleNamespace(rfilename="vae/diffusion_pytorch_model.fp16.safetensors", size=10**12)]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="cc-by-nc-4.0"))

    def download(repo, allow_patterns):
        fetched.extend(f"{folders[repo]}/{name}" for name in allow_patterns)
        return str(repositories / folders[repo])

    monkeypatch.setattr(published.HfApi, "model_info", model_info)
    monkeypatch.setattr(published, "snapshot_download", download)
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda repo, name: None)
    return fetched


def test_licence_and_size_are_said_before_a_download(hub, tmp_path, capsys):
    status, _, error = run(capsys, "assemble-xl", "--out", tmp_path / "xl", *SMALL)
    assert status == 2 and error.count("\n") == 1 and not hub
    assert "facebook/DiT-XL-2-256 (0.01 GB, licence cc-by-nc-4.0)" in error and "--accept-licences" in error
    assert run(capsys, "assemble-xl", "--out", tmp_path / "xl", "--accept-licences", *SMALL)[0] == 0
    assert sorted(hub) == sorted(
        f"{folder}/{name}"
        for folder, part, weights in (
            ("dit", "transformer/", WEIGHTS),
            ("sd", "", WEIGHTS),
            ("audioldm", "vae/", WEIGHTS),
            ("audioldm", "vocoder/", "model.safetensors"),
        )
        for name in (part + "config.json", part + weights)
    )
    status, _, error = run(capsys, "convert-dit", "facebook/DiT-XL-2-256", "--out", tmp_path / "dit")
    assert status == 2 and "licence" in error and not (tmp_path / "dit").exists()
    status, _, error = run(capsys, "convert-dit", "nobody/nothing", "--out", tmp_path / "dit")
    assert status == 2 and "nobody/nothing is neither a path nor a model" in error


def test_shards_and_older_files_of_a_repository():
    names = ["config.json", "x.ckpt", "vae/config.json", "vae/diffusion_pytorch_model.bin"]
    assert published.needed_files(names, "vae") == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]
    shards = [f"vae/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "vae/diffusion_pytorch_model.safetensors.index.json"
    assert set(published.needed_files([*names, *shards, index], "vae")) == {"vae/config.json", *shards, index}
    with pytest.raises(ValueError, match="no model in transformer"):
        published.needed_files(names, "transformer")
    assert PARTS["audio_vae"] == "vae"


def test_converted_folder_is_the_same_model(repositories, tmp_path):
    assert main(["convert-dit", str(repositories / "dit"), "--out", str(tmp_path / "ours")]) == 0
    ours, theirs = load_dit(tmp_path / "ours"), load_dit(repositories / "dit")
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
