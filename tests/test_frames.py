"""First frames in few steps: how they are sampled, what trains for them, and that packs keep how many they take."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_adversary import drawn
from torch import nn

from avdit.data.latents import Shards
from avdit.data.scenes import PACKS
from avdit.models.schedule import xs_scheduler
from avdit.pipeline import AVDiTPipeline
from avdit.training import frames, images
from avdit.training.adversary import Led
from avdit.training.frames import StepMoments
from avdit.training.moments import WARMUP
from avdit.training.trainer import Trainer, TrainerConfig

TRAIN = {"steps": 2, "batch_size": 4, "sample_every": 0, "warmup_steps": 1, "mixed_precision": "no"}


@pytest.fixture
def one_pack(tiny_pipeline, tmp_path):
    """A folder with a pipeline whose first frames are made alone."""
    tiny_pipeline.save_pretrained(tmp_path / "one")
    pipe = AVDiTPipeline.from_pretrained(tmp_path / "one")
    model = pipe.transformer.with_parts(image_rank=0) if pipe.transformer.config.image_rank else pipe.transformer
    parts = model, pipe.video_codec, pipe.audio_codec, pipe.scheduler
    AVDiTPipeline(*parts, pipe.classes, "own", factorized=True, eventful=True).save_pretrained(tmp_path / "alone")
    return tmp_path / "alone"


def config(folder, tmp_path, **changes):
    return {"pipeline": str(folder), "clips": 1, "cache": str(tmp_path / "cache"), "image_rank": 4, **changes}


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_model_that_knows_its_image_is_led_to_it_in_any_number_of_steps(tiny_pipeline, steps, monkeypatch):
    wanted = torch.randn(1, 1, *tiny_pipeline.geometry.video_latent_shape, generator=torch.Generator().manual_seed(5))
    alphas, seen = tiny_pipeline.scheduler.alphas_cumprod, []

    def knowing(video, audio, t_video, t_audio, labels, joint, temporal):
        alpha = alphas[t_video[0, 0]]
        seen.append((int(t_video[0, 0]), ((video - alpha.sqrt() * wanted) / (1 - alpha).sqrt()).std().item()))
        return (alpha.sqrt() * video - wanted) / (1 - alpha).sqrt(), None

    pack = tiny_pipeline._packs["own"]
    monkeypatch.setitem(tiny_pipeline._packs, "own", replace(pack, image_steps=steps))
    monkeypatch.setattr(tiny_pipeline, "denoiser", lambda: knowing)
    made = tiny_pipeline.first_frame(torch.tensor([3]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, wanted, atol=1e-3, rtol=1e-3)
    assert len(seen) == steps and [t for t, _ in seen] == sorted({t for t, _ in seen}, reverse=True)
    assert all(noise == pytest.approx(1, abs=0.05) for _, noise in seen)  # as much of it as the model is told


def test_updates_for_images_alone_train_and_the_pipeline_keeps_its_steps(one_pack, tmp_path):
    before = AVDiTPipeline.from_pretrained(one_pack).transformer.state_dict()
    frames.run(config(one_pack, tmp_path, steps=3, train=TRAIN), tmp_path / "out")
    pipe = AVDiTPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipe.first_frames == {"factorized": True, "image_steps": 3, "eventful": True}
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value.bfloat16().float()) for name, value in before.items())
    new = after.keys() - before.keys()
    assert new and all(".image_" in name and after[name].any() for name in new)

    pipe.set_progress_bar_config(disable=True)
    made = [pipe("thunder", 2, generator=torch.Generator().manual_seed(1), output_type="latent") for _ in range(2)]
    assert torch.equal(made[0].frames, made[1].frames)
    alone = pipe.first_frame(torch.tensor([5]), torch.Generator().manual_seed(1))
    assert alone.isfinite().all() and alone.shape[:2] == (1, 1)


def test_of_a_class_in_which_something_is_yet_to_happen_the_first_frames_alone_are_learned(
    one_pack, tmp_path, monkeypatch
):
    seen, told = [], frames.Led

    def led(velocity, made, real, labels):
        seen.extend(zip(labels.tolist(), real, strict=True))
        return told(velocity, made, real, labels)

    monkeypatch.setattr(frames, "Led", led)
    train = {**TRAIN, "batch_size": 32}
    frames.run(config(one_pack, tmp_path, openings=["explosion", "thunder"], train=train), tmp_path / "out")
    shards = Shards(tmp_path / "cache" / "latents" / "landscape")
    classes = shards.get("label", torch.arange(len(shards)))
    places = {  # of the frames seen, in the one clip of their class
        label: {int((clip.float() - frame).abs().amax((1, 2, 3)).argmin()) for at, frame in seen if at == label}
        for label, clip in zip(classes.tolist(), shards.get("video", torch.arange(len(shards))), strict=True)
    }
    for label, name in enumerate(PACKS["landscape"]):
        assert (places[label] == {0}) == (name in ("explosion", "thunder")), name


def test_a_pack_keeps_in_how_many_steps_its_first_frames_are_made(one_pack, tmp_path):
    pipe = AVDiTPipeline.from_pretrained(one_pack)
    other = replace(
        pipe._packs["own"],
        classes=[f"other {name}" for name in pipe.classes],
        state=pipe.transformer.adapter_state_dict(),
    )
    pipe.add_pack("other", replace(other, image_steps=4))
    pipe.save_pretrained(tmp_path / "two")
    again = AVDiTPipeline.from_pretrained(tmp_path / "two")
    assert again.image_steps is None
    again.use_pack("other")
    assert again.image_steps == 4


@pytest.mark.parametrize(("shown", "moments"), [(0.0, False), (0.5, False), (0.5, True)])
def test_a_killed_run_goes_on(one_pack, tmp_path, shown, moments):
    for steps, folder in ((4, "whole"), (2, "parts"), (4, "parts")):
        train = {**TRAIN, "final_rate": 1.0, "steps": steps}
        torch.manual_seed(0)
        told = config(one_pack, tmp_path, shown_weight=shown, moments=moments, train=train)
        frames.run(told, tmp_path / folder, resume=True)
    whole, parts = (load_file(tmp_path / folder / "state.safetensors") for folder in ("whole", "parts"))
    for judge, wanted in (("noised", True), ("shown", shown > 0)):
        kept = f"beside.{judge}.made.mean" if moments else f"beside.{judge}.exp_avg."
        assert any(name.startswith(kept) for name in whole) == wanted
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 0.5)])
def test_images_that_are_too_faint_are_led_to_as_much_contrast_as_rendered_ones(tiny_pipeline, tmp_path, weights):
    """By either judge; those that are alike are hardly led anywhere."""
    trainer = Trainer(nn.Linear(1, 1), lambda *_: {}, TrainerConfig(batch_size=4, mixed_precision="no"), tmp_path)
    alphas, labels = xs_scheduler().alphas_cumprod, torch.arange(4) % 2
    parts, shape = (tiny_pipeline.transformer.backbone, tiny_pipeline.video_codec), (4, 16, 16, 16)
    found = []
    for contrast in (0.5, 1.0):
        judge, generator = StepMoments(trainer, *parts, 2, weights, alphas, [800, 100], [1]), torch.Generator()
        for step in range(6):
            made = (contrast * drawn(*shape, seed=step)).requires_grad_()
            real = drawn(*shape, seed=100 + step)
            told = judge(Led(made, made, real, labels), 1, 0 * made.sum(), generator, WARMUP)
        told["loss"].backward()
        kind = "noised" if weights[0] else "shown"
        found.append((-(made.grad * made).sum() / made.grad.norm() / made.norm(), told[kind]))
    (more, apart), (alike, near) = found
    assert more > 0.02 and abs(alike) < 0.5 * more and near < 0.7 * apart


def test_images_that_train_again_want_many_steps_again(one_pack, tmp_path):
    frames.run(config(one_pack, tmp_path, train={**TRAIN, "steps": 1}), tmp_path / "few")
    again = config(tmp_path / "few" / "pipeline", tmp_path, train={**TRAIN, "steps": 1})
    images.run(again, tmp_path / "many")
    assert AVDiTPipeline.from_pretrained(tmp_path / "many" / "pipeline").image_steps is None
    images.run({**again, "image_rank": 0}, tmp_path / "table")  # what makes the images stays as it is
    assert AVDiTPipeline.from_pretrained(tmp_path / "table" / "pipeline").image_steps == 8


def test_a_model_that_predicts_noise_is_refused(one_pack, tmp_path):
    pipe = AVDiTPipeline.from_pretrained(one_pack)
    pipe.register_modules(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="epsilon"))
    pipe.save_pretrained(tmp_path / "noise")
    with pytest.raises(ValueError, match="a model that predicts the velocity"):
        frames.run(config(tmp_path / "noise", tmp_path, train=TRAIN), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"adversarial_weight": 11}, "adversarial_weight 11 must be"),
        ({"shown_weight": -1}, "shown_weight -1 must be"),
        ({"image_rank": 0}, "no updates for images: give image_rank"),
        ({"openings": ["tango"]}, "openings of 'tango': choose from"),
        ({"pipeline": "nowhere"}, "nowhere is not a pipeline folder"),
    ],
)
def test_what_cannot_be_trained_is_told_in_a_sentence(one_pack, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        frames.run({**config(one_pack, tmp_path), "train": TRAIN, **changes}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
