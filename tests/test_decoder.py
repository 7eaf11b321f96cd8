"""The video decoder for what a model makes: remade clips, and what is learned from them."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file

from avdit.data.scenes import render_clip
from avdit.models.features import ImageFeatures
from avdit.pipeline import AVDiTPipeline
from avdit.training import decoder
from avdit.training.decoder import Critics, made, remade
from avdit.training.moments import Moments

SHORT = {"steps": 2, "batch_size": 2, "sample_every": 0, "warmup_steps": 1}


def latents(pipe, names, seed=0):
    clips = [render_clip(name, seed) for name in names]
    frames = torch.stack([clip.frames for clip in clips]).movedim(-1, 2) * 2 - 1
    with torch.no_grad():
        video = pipe.video_codec.encode(frames.to(pipe.dtype)).float()
        audio = pipe.audio_codec.encode(torch.stack([clip.audio for clip in clips]).to(pipe.dtype)).float()
    return video, audio


@pytest.mark.parametrize("turbo", [False, True])
def test_a_remade_clip_keeps_its_layout_but_is_the_models(shipped_pipeline, turbo):
    names = ["waterfall burbling", "fire crackling"]
    video, audio = latents(shipped_pipeline, names)
    made = remade(shipped_pipeline, video, audio, names, turbo, 12, 0.7, torch.Generator().manual_seed(0))
    near = (made - video).square().mean((1, 2, 3, 4))
    far = (made - video.flip(0)).square().mean((1, 2, 3, 4))
    assert (near > 0.01).all() and (near < far / 3).all()


def test_of_a_dance_the_first_frame_stays(shipped_pipeline):
    video, audio = latents(shipped_pipeline, ["house"])
    made = remade(shipped_pipeline, video, audio, ["house"], False, 12, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, 0], video[:, 0])
    assert ((made - video).square().mean((2, 3, 4))[0, 1:] > 1e-3).all()


@pytest.mark.parametrize("turbo", [False, True])
def test_what_is_made_from_noise_is_what_the_page_would_make(shipped_pipeline, turbo):
    names = ["thunder", "raining"]
    found = made(shipped_pipeline, names, turbo, 3, torch.Generator().manual_seed(5))
    frames = shipped_pipeline(
        names, turbo=turbo, num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="pt"
    ).frames
    shown, _ = shipped_pipeline.decode(found, None, "pt")
    assert torch.equal(shown, frames)


def test_soft_frames_that_stand_for_no_rendered_one_are_led_to_be_as_crisp():
    """Half of the frames are soft views of other clips than those beside them; how crisp they are is what learns."""
    clips = [render_clip("raining", seed).frames[::2] for seed in range(6)]
    frames = torch.cat(clips).permute(0, 3, 1, 2)[..., :96, :96] * 2 - 1
    soft = F.avg_pool2d(frames, 5, 1, 2, count_include_pad=False)
    features, crispness = ImageFeatures(), torch.full((1,), 0.2, requires_grad=True)
    critics = Critics(None, Moments(Accelerator(cpu=True), features, 1), 1.0)
    optimiser, drawn = torch.optim.Adam([crispness], 0.04), torch.Generator().manual_seed(0)
    anew, labels = torch.arange(8) >= 4, torch.zeros(8, dtype=torch.long)
    for step in range(60):
        rows, others = torch.randint(len(frames), (2, 8), generator=drawn)
        made = soft[others] + crispness * (frames - soft)[others]
        y = torch.where(anew.view(-1, 1, 1, 1), made, frames[rows] + 0.1)
        maps = features(frames[rows]), features(y)
        own = (y[~anew] - frames[rows][~anew]).square().mean()
        told = critics(y, maps, torch.zeros_like(anew), anew, labels, own, drawn, step)
        optimiser.zero_grad()
        told["loss"].backward()
        optimiser.step()
    assert 0.7 < float(crispness.detach()) < 1.4


def test_the_decoder_alone_learns(tmp_path, tiny_checkpoint):
    config = {"pipeline": str(tiny_checkpoint), "clips": 1, "remade": 1, "sampling_steps": 2, "train": SHORT}
    decoder.run(config, tmp_path)
    before, after = (AVDiTPipeline.from_pretrained(path) for path in (tiny_checkpoint, tmp_path / "pipeline"))
    old, new = before.video_codec.float().state_dict(), after.video_codec.float().state_dict()
    changed = {name for name, value in old.items() if not torch.equal(new[name], value.to(torch.bfloat16).float())}
    assert changed and all(name.startswith("autoencoder.decoder.") for name in changed)
    assert after.packs == before.packs
    told = decoder.run(config, tmp_path / "dry", dry_run=True)
    decoders = sum(p.numel() for p in before.video_codec.autoencoder.decoder.parameters())
    assert told["parameters"]["trainable"] == decoders
    assert not (tmp_path / "dry").exists()
    # Clips that are made from noise, too, are other ones, and so are the same clips remade more often.
    anew = {**config, "made": 1, "cache": str(tmp_path), "train": {**SHORT, "batch_size": 4}}
    decoder.run(anew, tmp_path / "made")
    state = load_file(tmp_path / "made" / "state.safetensors")
    assert state["beside.moments.made.count"].sum() == 4  # two steps, of whose four frames two are made from noise
    # The same clips remade more often are other ones: what lies in the cache is not taken for them.
    decoder.run({**config, "remade": 2, "cache": str(tmp_path)}, tmp_path / "more")
    assert (tmp_path / "more" / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"remade": 0}, "remade"),
        ({"adversarial_weight": -1}, "adversarial_weight"),
        ({"moments_weight": -1}, "moments_weight"),
        ({"made": 1, "train": {"batch_size": 6}}, "batch_size 6 must be a multiple of 4"),
        ({"eta": 2}, "eta"),
        ({"train": {"batch_size": 1}}, "batch_size 1 must be 2 or more"),
        ({"train": {"stepps": 1}}, "unknown training setting 'stepps'"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        decoder.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
