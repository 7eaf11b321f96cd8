"""The class table alone learns what a pack's classes look like; nothing else of the model moves."""

import torch
from torch import Tensor

from avdit.data.latents import write_shard
from avdit.data.scenes import CLASSES, render_clip
from avdit.pipeline import AVDiTPipeline
from avdit.training import class_table
from avdit.training.class_table import images_of
from avdit.training.diffusion import Diffusion

TABLE = "class_embedder.embedding_table.weight"


@torch.no_grad()
def image_error(pipe: AVDiTPipeline, images: Tensor, labels: Tensor) -> float:
    """Mean squared error of the backbone's prediction for noised ``images`` (N, C, h, w) of classes ``labels``."""
    draw = torch.Generator().manual_seed(1)
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
    t, noise = torch.full((len(images),), 700), torch.randn(images.shape, generator=draw)
    clean = torch.zeros_like(t, dtype=torch.bool)
    noised, target = Diffusion(pipe.scheduler, torch.device("cpu")).noised(images, noise, t, clean)
    return (images_of(pipe)(noised, t, labels) - target).square().mean().item()


def test_classes_that_change_places_are_told_by_their_rows_and_nothing_else_moves(shipped_checkpoint, tmp_path):
    pipe = AVDiTPipeline.from_pretrained(shipped_checkpoint)
    parts = pipe.transformer, pipe.video_codec, pipe.audio_codec, pipe.scheduler
    before = AVDiTPipeline(*parts, list(CLASSES), "landscape")
    before.save_pretrained(tmp_path / "one")
    frames = torch.stack([render_clip(name, 0).frames[8] for name in CLASSES]).movedim(-1, 1)
    with torch.no_grad():
        images = pipe.video_codec.encode(frames.unsqueeze(0) * 2 - 1)[0]
    labels, clip = torch.arange(len(CLASSES)).roll(1), pipe.geometry
    shard = {"video": images.unsqueeze(1).expand(-1, clip.frames, -1, -1, -1), "label": labels}
    shard |= {"audio": torch.zeros(len(CLASSES), *clip.audio_latent_shape)}
    path = tmp_path / "latents" / "landscape" / "clips-00000000.safetensors"
    write_shard(path, {name: value.half() if value.is_floating_point() else value for name, value in shard.items()})
    wrong = image_error(before, images, labels)

    train = {"steps": 40, "batch_size": 16, "learning_rate": 0.03, "warmup_steps": 1, "sample_every": 40}
    config = {"pipeline": str(tmp_path / "one"), "clips": 1, "cache": str(tmp_path), "train": train}
    assert class_table.run(config, tmp_path / "out", dry_run=True)["seconds_per_step"] > 0
    assert not (tmp_path / "out").exists()
    class_table.run(config, tmp_path / "out")
    after = AVDiTPipeline.from_pretrained(tmp_path / "out" / "pipeline", torch_dtype=torch.float32)
    right = image_error(before, images, labels.roll(-1))
    assert image_error(after, images, labels) < wrong - 0.5 * (wrong - right)
    assert list((tmp_path / "out").glob("**/*.png"))

    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    kept = {name: value.bfloat16().float() for name, value in old.items()}
    assert {name for name, value in new.items() if not torch.equal(value, kept[name])} == {TABLE}
    assert torch.equal(new[TABLE][-1], kept[TABLE][-1])  # of no class
