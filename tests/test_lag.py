"""Sound that stays some steps behind its picture: how it is sampled, what learns it, and that turbo packs say so."""

import copy
from dataclasses import replace

import pytest
import torch

from avdit.data.scenes import CLASSES, GENRES
from avdit.generate import Request, generate
from avdit.models.avdit import AVDiT
from avdit.models.schedule import xs_scheduler
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training import adapters, lag
from tests.test_turbo import batch_at

STEPS, LAG = 4, 2


def knowing(pipe, shown):
    """A model that knows both clips, and what it was shown: the timesteps, and how much noise there was."""
    wanted = pipe.prepare_latents(1, torch.Generator().manual_seed(99))

    def predict(video, audio, t_video, t_audio, labels, keep=False, seen=None, **_):
        out, told = [], []
        assert (video is None) == (seen is not None)
        for x, clean, times in zip((video, audio), wanted, (t_video, t_audio), strict=True):
            if x is None:
                out.append(None)
                told.append(None)
                continue
            t = int(times[0, -1])
            alpha = torch.ones(()) if t == 0 else pipe.scheduler.alphas_cumprod[t]
            noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt().clamp(min=1e-6)
            out.append((alpha.sqrt() * x - clean) / (1 - alpha).sqrt().clamp(min=1e-6))
            told.append((t, noise.std().item() if t else (x - clean).abs().max().item()))
        shown.append(told)
        return (*out, "what was seen") if keep else tuple(out)

    return predict, wanted


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_sound_is_as_noisy_as_its_picture_was_which_is_seen_once_when_done(tiny_pipeline, sampler, monkeypatch):
    monkeypatch.setattr(tiny_pipeline, "scheduler", tiny_pipeline.scheduler)  # put back at the end
    tiny_pipeline.set_sampler(sampler)
    shown, estimates = [], []
    predict, wanted = knowing(tiny_pipeline, shown)
    monkeypatch.setattr(tiny_pipeline, "denoiser", lambda: predict)

    def step_end(pipe, _index, _timestep, tensors):
        estimates.append((pipe.num_timesteps, (tensors["video_estimate"] - wanted[0]).abs().max().item()))
        return {}

    asked = {"guidance_scale": 1.0, "joint_guidance_scale": 1.0, "output_type": "latent"}
    asked |= {"callback_on_step_end": step_end, "callback_on_step_end_tensor_inputs": ["video_estimate"]}
    made = tiny_pipeline("thunder", STEPS, audio_lag=LAG / STEPS, generator=torch.Generator().manual_seed(1), **asked)
    *pictures, last = (picture for picture, _ in shown)
    sounds = [sound for _, sound in shown]
    times = tiny_pipeline.scheduler.timesteps.tolist()
    assert [t for t, _ in pictures] == [*times, 0] and last is None
    assert [t for t, _ in sounds] == [times[0]] * LAG + times
    assert all(noise < 1e-3 if t == 0 else 0.9 < noise < 1.1 for t, noise in (*pictures, *sounds))
    assert all(total == STEPS + LAG and error < 0.01 for total, error in estimates)
    torch.testing.assert_close(made.frames, wanted[0], atol=0.01, rtol=0)
    torch.testing.assert_close(made.audio, wanted[1], atol=0.01, rtol=0)


def test_what_is_given_waits_for_nothing(tiny_pipeline):
    clip, generator = tiny_pipeline.geometry, torch.Generator
    frames = torch.rand(clip.frames, clip.height, clip.width, 3, generator=generator().manual_seed(0))
    sound = 0.1 * torch.randn(clip.samples, generator=generator().manual_seed(0))
    for given in ({"video": frames}, {"audio": sound}):
        made = [
            tiny_pipeline("thunder", 2, generator=generator().manual_seed(1), audio_lag=share, **given)
            for share in (0.0, 0.5)
        ]
        assert (made[0].frames == made[1].frames).all() and (made[0].audio == made[1].audio).all()
        assert tiny_pipeline.num_timesteps == 2
    for wrong in (1.5, -1):
        with pytest.raises(ValueError, match="audio_lag = .* must be from 0 to 1"):
            tiny_pipeline("thunder", 2, audio_lag=wrong)


def test_turbo_packs_say_how_far_their_sound_stays_behind(tiny_checkpoint, tmp_path):
    pipe = AVDiTPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    state = {name: value + 0.02 for name, value in copy.deepcopy(pipe.transformer.adapter_state_dict()).items()}
    pipe.add_pack("own-turbo", Pack(pipe.classes, state, steps=3, audio_lag=0.333))
    seen = []
    made = generate(pipe, Request("thunder", sampler="turbo"), on_step=lambda *told: seen.append(told[:2]))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    pipe.save_pretrained(tmp_path / "saved")
    again = AVDiTPipeline.from_pretrained(tmp_path / "saved")
    same = generate(again, Request("thunder", sampler="turbo"))
    assert (same.frames == made.frames).all() and (same.audio == made.audio).all()
    again._packs["own-turbo"] = replace(again._packs["own-turbo"], audio_lag=0.0)
    other = generate(again, Request("thunder", sampler="turbo"))
    assert abs(other.audio - made.audio).max() > 1e-3
    # A stream's windows wait, too.
    seen.clear()
    generate(pipe, Request("thunder", sampler="turbo", seconds=2.5), on_step=lambda *told: seen.append(told[:2]))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_clips_to_learn_it_from_have_more_of_their_own_noise_in_the_sound(tiny_pipeline):
    scheduler = xs_scheduler()
    scheduler.set_timesteps(STEPS)
    alphas, times = scheduler.alphas_cumprod, scheduler.timesteps.tolist()
    for place, given in ((0, 0), (1, 0), (3, 0), (3, 4)):
        batch = batch_at(tiny_pipeline, times[place], given)
        late = batch.behind(alphas, torch.tensor([LAG / STEPS]))
        heard = ~batch.given_columns
        assert (late.t_audio[heard] == times[max(0, place - LAG)]).all() and (late.t_audio[~heard] == 0).all()
        assert torch.equal(late.t_video, batch.t_video) and torch.equal(late.video, batch.video)
        # A batch of one noise tells its clip by where its velocity leads: more noise, the same clip.
        alpha = alphas[late.t_audio.repeat_interleave(tiny_pipeline.geometry.audio_patch[0], 1)][:, None, :, None]
        before = batch.clips(alphas, batch.video_target, batch.audio_target)[1]
        old = batch.shares(alphas)[1]
        noise = (1 - old).sqrt() * batch.audio + old.sqrt() * batch.audio_target
        shown = (alpha.sqrt() * before + (1 - alpha).sqrt() * noise).where(~batch.given_audio, batch.audio)
        torch.testing.assert_close(late.audio, shown, atol=1e-4, rtol=0)
        done = late.finished(alphas)
        assert (done.t_video == 0).all() and torch.equal(done.audio, late.audio)
        seen = batch.clips(alphas, batch.video_target, batch.audio_target)[0].where(~batch.given_video, batch.video)
        torch.testing.assert_close(done.video, seen)
    picture = batch_at(tiny_pipeline, times[3])
    given = replace(
        picture, given_video=torch.ones_like(picture.given_video), t_video=torch.zeros_like(picture.t_video)
    )
    sound = replace(
        picture, given_audio=torch.ones_like(picture.given_audio), t_audio=torch.zeros_like(picture.t_audio)
    )
    for batch in (given, sound):  # of which one is given whole stays as it is
        late = batch.behind(alphas, torch.tensor([LAG / STEPS]))
        assert torch.equal(late.audio, batch.audio) and torch.equal(late.t_audio, batch.t_audio)
        assert torch.equal(late.finished(alphas).video, batch.video)


def after_saving(value):
    """A weight as it is in a file of half the size."""
    return value.bfloat16().float()


def test_stage_teaches_a_turbo_pack_to_wait(tiny_checkpoint, tmp_path):
    model = AVDiTPipeline.from_pretrained(tiny_checkpoint).transformer
    begun = {name: value + 0.01 for name, value in model.adapter_state_dict().items()}
    Pack(list(CLASSES), begun, steps=4, eta=0.5).save(tmp_path / "begun")
    config = {"pipeline": str(tiny_checkpoint), "student": str(tmp_path / "begun"), "clips": 1, "audio_lag": 0.5}
    config["train"] = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "learning_rate": 1e-4, "sample_every": 2}
    lag.run(config, tmp_path / "out")
    pack = Pack.load(tmp_path / "out" / "pack")
    assert (pack.classes, pack.steps, pack.eta, pack.audio_lag) == (list(CLASSES), 4, 0.5, 0.5)
    moved = [name for name, value in pack.state.items() if not torch.equal(value, begun[name].bfloat16())]
    assert any(".temporal." in name for name in moved) and any(".audio_mlp." in name for name in moved)
    assert not any("class_embedder" in name or "foley." in name for name in moved)
    assert list((tmp_path / "out").glob("**/*.png"))

    # Without a student the pipeline's own adapters learn it, for sampling in any number of steps.
    config["cache"], own = str(tmp_path / "out"), tmp_path / "own" / "pipeline"
    config["train"]["sample_every"] = 0
    lag.run({**config, "student": None}, own.parent)
    pipe = AVDiTPipeline.from_pretrained(own)
    after = pipe.transformer.state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(after[name], after_saving(value))]
    assert any(".temporal." in name for name in moved) and not any("backbone." in name for name in moved)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("thunder", 4, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert pipe.num_timesteps == 6 and made.audio.isfinite().all()

    config |= {"parts": ["temporal", "anchor"], "student": None}
    config["train"]["steps"] = 1
    lag.run(config, tmp_path / "parts")
    learned = AVDiTPipeline.from_pretrained(tmp_path / "parts" / "pipeline").transformer.state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(learned[name], after_saving(value))]
    assert moved and all(".temporal." in name or ".anchor." in name for name in moved)

    Pack(list(GENRES), begun, steps=4).save(tmp_path / "other")
    Pack(list(CLASSES), begun).save(tmp_path / "joint")
    wrong = (
        ({"student": str(tmp_path / "other")}, "other has other classes than the pipeline"),
        ({"student": str(tmp_path / "joint")}, "joint is no turbo pack"),
        ({"student": None, "parts": ["temporal", "ears"]}, "parts: no block's adapters have 'ears'"),
        ({"audio_lag": 5}, "audio_lag 5 must be a number from 0 to 1"),
    )
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            lag.run({**config, **change}, tmp_path / "not")


def test_adapters_learn_a_noisier_sound_from_the_clips_themselves(tiny_checkpoint, tmp_path, monkeypatch):
    seen, told = [], AVDiT.forward

    def forward(model, video, audio, t_video, t_audio, *rest, **how):
        if torch.is_grad_enabled():
            seen.append((t_video[:, -1], t_audio[:, -1]))
        return told(model, video, audio, t_video, t_audio, *rest, **how)

    monkeypatch.setattr(AVDiT, "forward", forward)
    config = {"pipeline": str(tiny_checkpoint), "clips": 1, "audio_lag": 0.25, "tasks": {"joint": 1.0}}
    config |= {"factorized": True, "eventful": True}
    config["train"] = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "sample_every": 0}
    adapters.run(config, tmp_path / "out")
    more = torch.cat([audio - video for video, audio in seen])
    assert len(more) == 32 and more.min() >= 0 and 100 < more.max() <= 250
    pipe = AVDiTPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    pack = Pack.load(tmp_path / "out" / "pack")
    assert (pipe.factorized, pipe.eventful, pipe.config.audio_lag) == (True, True, 0.25)
    assert (pack.factorized, pack.eventful, pack.audio_lag) == (True, True, 0.25)
    with pytest.raises(ValueError, match="audio_lag 2 must be"):
        adapters.run({**config, "audio_lag": 2}, tmp_path / "not")

    # Adapters that go on from these remember it.
    on = {name: value for name, value in config.items() if name != "audio_lag"}
    on |= {"pipeline": str(tmp_path / "out" / "pipeline"), "cache": str(tmp_path / "out")}
    seen.clear()
    adapters.run(on, tmp_path / "on")
    more = torch.cat([audio - video for video, audio in seen])
    assert more.min() >= 0 and 100 < more.max() <= 250
    assert Pack.load(tmp_path / "on" / "pack").audio_lag == 0.25
