from dataclasses import replace

import numpy as np
import pytest
import torch

from avdit.generate import Request, Stopped, generate, settings_of
from avdit.models.noise import draw_noise
from avdit.pipeline import SAMPLERS, AVDiTPipeline
from avdit.streaming import OVERLAP


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(tiny_pipeline):
    tiny_pipeline.set_sampler("ddim")
    return tiny_pipeline


def test_clip_has_the_geometry(pipe):
    out = pipe("thunder", num_inference_steps=2, generator=seeded(1))
    assert out.frames.shape == (1, 16, 256, 256, 3) and out.audio.shape == (1, 25600)
    assert 0 <= out.frames.min() and out.frames.max() <= 1 and np.isfinite(out.audio).all()
    assert (out.fps, out.sampling_rate) == (10, 16000)


def test_the_pipeline_and_a_request_mean_the_same_where_nothing_is_said(pipe):
    plain = pipe("thunder", generator=seeded(1), output_type="latent")
    settings = settings_of(Request("thunder"))
    pipe.set_sampler(settings.pop("sampler"))
    asked = pipe(generator=seeded(1), output_type="latent", **settings)
    assert torch.equal(plain.frames, asked.frames) and torch.equal(plain.audio, asked.audio)


def test_large_seeds_are_told_apart(pipe):
    """Torch's generator would take the first two for one."""
    sounds = [generate(pipe, Request("thunder", seed=seed, steps=1)).audio for seed in (3, 2**32 + 3, 2**33 + 3)]
    assert all(not np.array_equal(a, b) for a, b in zip(sounds, sounds[1:] + sounds[:1], strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_is_the_same_clip_alone_and_in_a_batch(pipe, sampler):
    pipe.set_sampler(sampler)
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    alone = pipe("thunder", generator=seeded(1), **settings)
    batch = pipe(["raining", "thunder"], generator=[seeded(2), seeded(1)], **settings)
    torch.testing.assert_close(batch.frames[1], alone.frames[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.audio[1], alone.audio[0], atol=1e-4, rtol=1e-4)
    assert alone.frames.isfinite().all() and (batch.frames[0] - batch.frames[1]).abs().max() > 0.1


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_frames_share_their_part_of_the_noise(pipe, shared):
    generator = seeded(0)
    drawn = [draw_noise(pipe.geometry, shared, generator) for _ in range(16)]
    video, audio = (torch.stack(part) for part in zip(*drawn, strict=True))
    assert abs(video.std() - 1) < 0.01 and abs(audio.std() - 1) < 0.01
    assert abs(video[:, 0].std() - 1) < 0.02, "the image backbone knows the noise of one frame"
    assert abs((video[:, 2] * video[:, 9]).mean() - shared) < 0.02
    assert abs((video[0, 2] * video[1, 2]).mean()) < 0.06, "two clips share nothing"


def test_pipeline_draws_the_noise_that_its_model_was_trained_on(pipe):
    video, audio = pipe.prepare_latents(1, seeded(5))
    wanted = draw_noise(pipe.geometry, pipe.transformer.config.shared_noise, seeded(5))
    assert pipe.transformer.config.shared_noise == 0.5
    assert torch.equal(video[0], wanted[0]) and torch.equal(audio[0], wanted[1])


def test_class_and_guidance_matter(pipe):
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    base = pipe("thunder", generator=seeded(1), **settings)
    other = pipe("raining", generator=seeded(1), **settings)
    sound_only = pipe("thunder", generator=seeded(1), audio_guidance_scale=5.0, **settings)
    assert (base.frames - other.frames).abs().max() > 1e-3
    assert (base.audio - sound_only.audio).abs().max() > 1e-3


def test_what_guidance_leads_away_from_changes_with_the_steps(pipe):
    def after(step, **settings):
        seen = []
        pipe(
            "thunder",
            num_inference_steps=4,
            generator=seeded(1),
            output_type="latent",
            callback_on_step_end=lambda _pipe, i, _t, tensors: seen.append(tensors["video_latents"]) or {},
            **settings,
        )
        return seen[step]

    weak, strong = {"guidance_scale": 2.0}, {"guidance_scale": 8.0}
    assert torch.allclose(after(0, **weak), after(0, **strong), atol=1e-5)
    assert not torch.allclose(after(1, **weak), after(1, **strong), atol=1e-3)
    early = {"guidance_start": 0.0}
    assert not torch.allclose(after(0, **weak, **early), after(0, **strong, **early), atol=1e-3)
    alone, joint = {"joint_guidance_scale": 1.0}, {"joint_guidance_scale": 4.0}
    assert not torch.allclose(after(0, **alone), after(0, **joint), atol=1e-4)
    single, never = {"temporal_guidance_start": 0.0}, {"temporal_guidance_start": 1.0}
    assert not torch.allclose(after(3, **weak), after(3, **weak, **never), atol=1e-3)
    assert not torch.allclose(after(0, **weak, **single), after(0, **strong, **single), atol=1e-3)
    ended = {"guidance_end": 0.25}
    assert torch.equal(after(3, **weak, **ended), after(3, **strong, **ended))
    for name in ("guidance_start", "guidance_end", "temporal_guidance_start", "context_noise", "given_guidance"):
        with pytest.raises(ValueError, match=f"^{name} = 2"):
            after(0, **{name: 2})


def test_what_is_given_comes_back_untouched(pipe):
    video = np.random.default_rng(0).random((16, 256, 256, 3), np.float32)
    audio = np.random.default_rng(1).standard_normal(25600).astype(np.float32) * 0.1
    settings = {"num_inference_steps": 4, "output_type": "latent", "generator": seeded(0)}
    with torch.no_grad():
        clean_video = pipe.video_codec.encode(torch.from_numpy(video).permute(0, 3, 1, 2)[None] * 2 - 1)
        clean_audio = pipe.audio_codec.encode(torch.from_numpy(audio)[None])
    out = pipe("thunder", video=video, **settings)
    assert torch.equal(out.frames, clean_video) and not torch.allclose(out.audio, clean_audio, atol=0.1)
    out = pipe("thunder", audio=audio, **settings)
    assert torch.equal(out.audio, clean_audio)
    out = pipe("thunder", image=video[0], **settings)
    torch.testing.assert_close(out.frames[:, 0], clean_video[:, 0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out.frames[:, 1], clean_video[:, 1], atol=0.1)
    continued = []
    for noise in (0.0, 0.1):  # that the model sees there is not in what comes back
        settings |= {"context_noise": noise, "generator": seeded(0)}
        out = pipe("thunder", given_latents=(clean_video[:, -4:], clean_audio[:, :, -10:]), **settings)
        assert torch.equal(out.frames[:, :4], clean_video[:, -4:])
        assert torch.equal(out.audio[:, :, :10], clean_audio[:, :, -10:])
        assert not torch.allclose(out.frames[:, 4:], clean_video[:, 4:], atol=0.1)
        assert not torch.allclose(out.audio[:, :, 10:], clean_audio[:, :, 10:], atol=0.1)
        continued.append(out.frames[:, 4:])
    assert not torch.allclose(*continued, atol=1e-3)
    for share, same in (
        (0.0, True),
        (1.0, False),
    ):  # the class does not guide the picture unless asked to
        settings |= {"generator": seeded(0), "given_guidance": share}
        guided = pipe("thunder", given_latents=(clean_video[:, -4:], clean_audio[:, :, -10:]), **settings)
        assert torch.allclose(guided.frames[:, 4:], continued[1], atol=1e-4) == same
    settings |= {"generator": seeded(0), "guidance_scale": 1.0, "audio_guidance_scale": 2.0}
    free = pipe("thunder", given_latents=(clean_video[:, -4:], clean_audio[:, :, -10:]), **settings)
    torch.testing.assert_close(free.frames[:, 4:], continued[1])


def test_factorized_clips_follow_from_an_image_of_their_own(pipe):
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    generator = seeded(3)
    pipe.prepare_latents(1, generator)  # the clip's own noise is drawn before its first frame is made
    image = pipe.first_frame(torch.tensor([pipe.classes.index("thunder")]), generator)
    clip = pipe("thunder", generator=seeded(3), factorized=True, **settings)
    torch.testing.assert_close(clip.frames[:, :1], image)
    pair = pipe(["raining", "thunder"], generator=[seeded(2), seeded(3)], factorized=True, **settings)
    torch.testing.assert_close(pair.frames[1], clip.frames[0], atol=1e-4, rtol=1e-4)
    heard = pipe("thunder", generator=seeded(3), factorized=True, audio=np.zeros(pipe.geometry.samples), **settings)
    torch.testing.assert_close(heard.frames[:, :1], image)  # a sound that is given leaves the picture to be made
    given = np.full((pipe.geometry.height, pipe.geometry.width, 3), 0.5, np.float32)
    shown = [pipe("thunder", generator=seeded(3), factorized=f, image=given, **settings) for f in (True, False)]
    assert torch.equal(shown[0].frames[:, 0], shown[1].frames[:, 0])  # but a picture that is given is the first frame


def test_what_follows_a_first_frame_takes_all_new_noise(pipe):
    asked = {"num_inference_steps": 3, "output_type": "latent"}

    def made(**settings) -> torch.Tensor:
        return pipe("thunder", generator=seeded(3), **asked, **settings).frames

    assert torch.equal(made(factorized=True), made(factorized=True, eta=1.0))
    assert torch.equal(made(factorized=False), made(factorized=False, eta=0.7))
    for factorized in (True, False):
        assert not torch.allclose(made(factorized=factorized, eta=1.0), made(factorized=factorized, eta=0.7), atol=0.1)


def test_a_first_frame_is_led_away_from_a_picture_of_its_class_that_falls_apart(pipe, monkeypatch):
    model, label, seen = pipe.denoiser(), pipe.classes.index("thunder"), []

    def asked(*state, blind=(), **knows):
        seen.append((int(state[4]), bool(blind)))
        return model(*state, blind=blind, **knows)

    monkeypatch.setattr(pipe, "denoiser", lambda: asked)
    pipe.first_frame(torch.tensor([label]), seeded(3))
    guided = seen.count((label, True))
    assert guided == seen.count((len(pipe.classes), False)) > 0 and len(seen) > 3 * guided
    assert (len(pipe.classes), True) not in seen


def test_the_class_guides_what_follows_a_first_frame(pipe):
    settings = {"num_inference_steps": 4, "output_type": "latent", "joint_guidance_scale": 1.0}

    def clip(label: str, scale: float, factorized: bool) -> torch.Tensor:
        image = np.full((pipe.geometry.height, pipe.geometry.width, 3), 0.5, np.float32)
        settings["audio_guidance_scale"] = 1.0
        made = pipe(label, generator=seeded(3), image=image, guidance_scale=scale, factorized=factorized, **settings)
        return made.frames[:, 1:]

    assert torch.allclose(clip("thunder", 1.0, False), clip("thunder", 4.0, False), atol=1e-4)
    assert not torch.allclose(clip("thunder", 1.0, True), clip("thunder", 4.0, True), atol=1e-2)

    def continued(scale: float, factorized: bool) -> torch.Tensor:
        past = torch.randn(1, 4, 16, 16, 16, generator=seeded(5)), torch.randn(1, 8, 10, 16, generator=seeded(6))
        asked = {"guidance_scale": scale, "factorized": factorized, "given_latents": past, **settings}
        return pipe("thunder", generator=seeded(3), **asked).frames[:, 4:]

    assert torch.allclose(continued(1.0, False), continued(4.0, False), atol=1e-4)
    assert not torch.allclose(continued(1.0, True), continued(4.0, True), atol=1e-2)


def test_where_events_count_what_follows_a_first_frame_is_guided_as_where_none_was_made(pipe, monkeypatch):
    model, asked = pipe.denoiser(), {"num_inference_steps": 4, "output_type": "latent"}
    seen: list[tuple[int, bool, bool]] = []  # class, whether it knows of other frames, whether blocks are blind

    def noted(*state, temporal=True, blind=(), **knows):
        if state[0].shape[1] > 1:
            seen.append((int(state[4]), temporal, bool(blind)))
        return model(*state, temporal=temporal, blind=blind, **knows)

    monkeypatch.setattr(pipe, "denoiser", lambda: noted)
    pack, label, none = pipe._packs[pipe._pack], pipe.classes.index("thunder"), len(pipe.classes)
    told = {}
    for eventful in (False, True):
        seen.clear()
        monkeypatch.setitem(pipe._packs, pipe._pack, replace(pack, eventful=eventful))
        clip = pipe("thunder", generator=seeded(3), factorized=True, **asked)
        told[eventful] = clip.frames, {way for way in seen if way != (label, True, False)}
    assert torch.equal(told[False][0][:, 0], told[True][0][:, 0])  # the image is made in one way
    assert told[False][1] == {(none, True, True)} and told[True][1] == {(none, False, False)}
    assert (label, True, False) in seen  # led by what it hears in the first step, of its own class
    again = pipe("thunder", generator=seeded(3), factorized=True, eta=0.7, **asked)
    assert torch.equal(again.frames, told[True][0])


def test_saved_pipeline_makes_the_same_clip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*.json") if str(pipe.name_or_path) in p.read_text()]
    again = AVDiTPipeline.from_pretrained(tmp_path)
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    first, second = (p("wind noise", generator=seeded(3), **settings) for p in (pipe, again))
    assert torch.equal(first.frames, second.frames) and again.classes == pipe.classes


def test_callback_sees_every_step_and_can_change_the_latents(pipe):
    seen = []

    def callback(_pipe, step, timestep, tensors):
        seen.append((step, timestep))
        return {"video_latents": tensors["video_latents"] * 0} if step == 2 else {}

    out = pipe("thunder", 3, generator=seeded(0), callback_on_step_end=callback, output_type="latent")
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] > seen[2][1]
    assert not out.frames.any()


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0), ("unipc", 0.0)])
def test_a_perfect_prediction_is_shown_at_every_step_and_made(pipe, monkeypatch, sampler, eta):
    clean = torch.randn(1, 16, 16, 16, 16, generator=seeded(5)), torch.randn(1, 8, 40, 16, generator=seeded(6))
    alphas, frame = pipe.scheduler.alphas_cumprod, torch.rand(256, 256, 3, generator=seeded(7))

    def perfect(video, audio, t_video, _t_audio, _classes, **_guidance):
        alpha = alphas[t_video[0, -1]]
        return tuple((alpha.sqrt() * x - x0) / (1 - alpha).sqrt() for x, x0 in zip((video, audio), clean, strict=True))

    monkeypatch.setattr(AVDiTPipeline, "denoiser", lambda _pipe: perfect)
    seen = []

    def callback(_pipe, _step, _timestep, tensors):
        assert list(tensors) == ["video_estimate"]
        seen.append(tensors["video_estimate"])

    pipe.set_sampler(sampler)
    asked = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["video_estimate"]}
    try:
        out = pipe("thunder", 6, image=frame, eta=eta, generator=seeded(0), output_type="latent", **asked)
    finally:
        pipe.set_sampler("ddim")
    assert len(seen) == 6 and all(torch.equal(estimate[:, 0], out.frames[:, 0]) for estimate in seen)
    for estimate in [*seen, out.frames]:
        assert (estimate - clean[0])[:, 1:].abs().mean() < 0.05  # the model is asked in bfloat16
    assert (out.audio - clean[1]).abs().mean() < 0.05


def test_steps_add_noise_of_the_seed_as_eta_says(pipe):
    def made(eta):
        return pipe("thunder", num_inference_steps=3, eta=eta, generator=seeded(1), output_type="latent")

    still, moved = made(0.0), made(1.0)
    assert torch.equal(moved.frames, made(1.0).frames) and torch.equal(moved.audio, made(1.0).audio)
    assert not torch.allclose(still.frames, moved.frames, atol=0.1)
    assert not torch.allclose(still.audio, moved.audio, atol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_labels": "thundr"}, "unknown class 'thundr'"),
        ({"class_labels": []}, "no class was given"),
        ({"given_latents": (1, 2), "image": np.zeros((256, 256, 3), np.float32)}, "give one of video, audio, image"),
        ({"latents": (torch.zeros(1), torch.zeros(1))}, "latents of the picture are"),
        ({"video": np.zeros((3, 16, 256, 256, 3), np.float32)}, "video has shape"),
        ({"class_labels": 11}, "class 11 does not exist"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"output_type": "jpeg"}, "must be 'np', 'pt' or 'latent'"),
        ({"given_latents": (torch.zeros(1, 16, 16, 16, 16), torch.zeros(1, 8, 10, 16))}, "latents given are"),
        ({"generator": [seeded(0), seeded(1)]}, "2 generators were given for 1 clips"),
        ({"audio": np.zeros(100, np.float32)}, "it must have at least 25600"),
        ({"video": np.zeros((16, 64, 64, 3), np.float32)}, "it must be at least 16 frames of 256 x 256 x 3"),
    ],
)
def test_wrong_input_is_named(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": "thunder", "num_inference_steps": 1, **settings})


def test_long_clip_continues_window_after_window(pipe):
    steps = []
    request = Request("thunder", seed=5, steps=2, seconds=3.0)
    result = generate(pipe, request, on_step=lambda step, total, _: steps.append((step, total)))
    assert result.frames.shape[0] == 30 and len(result.audio) == 48000
    assert steps == [(k, 6) for k in range(1, 7)]  # 16 frames, then 12 new ones a window
    whole = generate(pipe, Request("thunder", seed=5, steps=2, seconds=4.0))  # ends with a window's end
    assert len(whole.audio) == 64000 and np.abs(whole.audio[-160:]).max() > 0
    again = generate(pipe, request)
    assert np.array_equal(result.frames, again.frames) and np.array_equal(result.audio, again.audio)
    first = generate(pipe, Request("thunder", seed=5, steps=2))
    assert np.array_equal(result.frames[:16], first.frames) and OVERLAP == 4


def test_stop_ends_at_the_next_step(pipe):
    steps = []
    with pytest.raises(Stopped):
        generate(pipe, Request("thunder", steps=20), lambda k, *_: steps.append(k), lambda: len(steps) == 3)
    assert steps == [1, 2, 3]


def test_pipeline_built_in_memory_makes_a_clip(pipe):
    fresh = AVDiTPipeline(pipe.transformer, pipe.video_codec, pipe.audio_codec, pipe.scheduler, classes=pipe.classes)
    fresh.set_progress_bar_config(disable=True)
    result = generate(fresh, Request("thunder", seed=1, steps=1))
    assert "weights_sha256" not in result.recipe and len(result.frames) == 16
