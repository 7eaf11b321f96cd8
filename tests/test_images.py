"""What a pack has for images alone learns what its classes look like; nothing else of the model moves."""

import pytest
import torch
from torch import Tensor

from avdit.data.latents import write_shard
from avdit.data.scenes import CLASSES, render_clip
from avdit.models.avdit import AVDiT
from avdit.pipeline import AVDiTPipeline
from avdit.training import images as stage
from avdit.training.diffusion import Diffusion

TABLE = "class_embedder.embedding_table.weight"


@pytest.fixture(scope="module")
def one_pack(shipped_checkpoint, tmp_path_factory) -> tuple[AVDiTPipeline, dict, Tensor, Tensor]:
    """A pipeline of one pack, a configuration to train it, and images whose classes have changed places."""
    folder = tmp_path_factory.mktemp("images")
    pipe = AVDiTPipeline.from_pretrained(shipped_checkpoint)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    model = AVDiT(**{**config, "image_rank": 0})
    model.load_state_dict(pipe.transformer.state_dict(), strict=False)
    parts = model, pipe.video_codec, pipe.audio_codec, pipe.scheduler
    AVDiTPipeline(*parts, list(CLASSES), "landscape").save_pretrained(folder / "one")
    before = AVDiTPipeline.from_pretrained(folder / "one")
    frames = torch.stack([render_clip(name, 0).frames[8] for name in CLASSES]).movedim(-1, 1)
    with torch.no_grad():
        images = pipe.video_codec.encode(frames.unsqueeze(0) * 2 - 1)[0]
    labels, clip = torch.arange(len(CLASSES)).roll(1), pipe.geometry
    shard = {"video": images.unsqueeze(1).expand(-1, clip.frames, -1, -1, -1), "label": labels}
    shard |= {"audio": torch.zeros(len(CLASSES), *clip.audio_latent_shape)}
    path = folder / "latents" / "landscape" / "clips-00000000.safetensors"
    write_shard(path, {name: value.half() if value.is_floating_point() else value for name, value in shard.items()})
    return before, {"pipeline": str(folder / "one"), "clips": 1, "cache": str(folder)}, images, labels


@torch.no_grad()
def image_error(pipe: AVDiTPipeline, images: Tensor, labels: Tensor) -> float:
    """Mean squared error of the prediction for noised ``images`` (N, C, h, w) of classes ``labels``."""
    draw = torch.Generator().manual_seed(1)
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
    t, noise = torch.full((len(images),), 700), torch.randn(images.shape, generator=draw)
    clean = torch.zeros_like(t, dtype=torch.bool)
    noised, target = Diffusion(pipe.scheduler, torch.device("cpu")).noised(images, noise, t, clean)
    return (stage.Images(pipe.transformer)(noised, t, labels) - target).square().mean().item()


def moved(before: AVDiTPipeline, after: AVDiTPipeline) -> set[str]:
    """Names of parameters that are new or others than before, which were saved in 16 bits."""
    old = {name: value.bfloat16().float() for name, value in before.transformer.state_dict().items()}
    new = after.transformer.state_dict()
    return {name for name, value in new.items() if name not in old or not torch.equal(value, old[name])}


def test_classes_that_change_places_are_told_by_their_rows_and_nothing_else_moves(one_pack, tmp_path):
    before, config, images, labels = one_pack
    wrong, right = image_error(before, images, labels), image_error(before, images, labels.roll(-1))
    train = {"steps": 40, "batch_size": 16, "learning_rate": 0.03, "warmup_steps": 1, "sample_every": 40}
    config = {**config, "train": train}
    assert stage.run(config, tmp_path / "out", dry_run=True)["seconds_per_step"] > 0
    assert not (tmp_path / "out").exists()
    stage.run(config, tmp_path / "out")
    after = AVDiTPipeline.from_pretrained(tmp_path / "out" / "pipeline", torch_dtype=torch.float32)
    assert image_error(after, images, labels) < wrong - 0.5 * (wrong - right)
    assert list((tmp_path / "out").glob("**/*.png"))
    assert moved(before, after) == {TABLE}
    tables = (pipe.transformer.class_embedder.embedding_table.weight for pipe in (before, after))
    assert torch.equal(*(table[-1].bfloat16() for table in tables))  # of no class


def test_updates_learn_images_and_leave_clips_alone(one_pack, tmp_path):
    before, config, images, labels = one_pack
    wrong = image_error(before, images, labels)
    train = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 1, "sample_every": 0}
    config = {**config, "class_table": False, "train": train}
    with pytest.raises(ValueError, match="nothing would train"):
        stage.run(config, tmp_path / "out")
    stage.run({**config, "image_rank": 8}, tmp_path / "out")
    after = AVDiTPipeline.from_pretrained(tmp_path / "out" / "pipeline", torch_dtype=torch.float32)
    assert image_error(after, images, labels) < 0.9 * wrong
    assert all(".image_" in name for name in moved(before, after))
    clip = {"class_labels": "thunder", "num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    before = before.to(torch.bfloat16).to(torch.float32)  # with its weights as they are in a file
    clips = [pipe(**clip, generator=torch.Generator().manual_seed(0)).frames for pipe in (before, after)]
    torch.testing.assert_close(*clips, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="image_rank 4 is less than the pipeline's, which is 8"):
        stage.run({**config, "image_rank": 4, "pipeline": str(tmp_path / "out" / "pipeline")}, tmp_path / "again")
    known = image_error(after, images, labels)
    stage.give_updates(after, 12)  # there may be more of them, and nothing is forgotten
    assert after.transformer.config.image_rank == 12
    assert image_error(after, images, labels) == pytest.approx(known, rel=1e-4)
    ups = [value for name, value in after.transformer.named_parameters() if ".image_" in name and ".up." in name]
    assert ups and all(up.shape[1] == 12 and up[:, :8].any() and not up[:, 8:].any() for up in ups)
