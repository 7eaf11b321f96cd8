"""Turbo adapters: what they are taught is where two guided steps land, and the pipeline uses them where it is asked."""

import copy

import pytest
import torch

from avdit.conditions import middle_blocks
from avdit.data.scenes import CLASSES, GENRES
from avdit.generate import Request, generate
from avdit.models.inference import FoldedAVDiT
from avdit.models.schedule import xs_scheduler
from avdit.packs import Pack
from avdit.pipeline import AVDiTPipeline
from avdit.training import turbo
from avdit.training.batches import ClipBatch
from avdit.training.turbo import Teacher


def batch_at(pipe, time, given_frames=0):
    clip = pipe.geometry
    video, audio = pipe.prepare_latents(1, torch.Generator().manual_seed(0))
    frames = (torch.arange(clip.frames) < given_frames).unsqueeze(0)
    rows = (torch.arange(audio.shape[2]) < clip.audio_patch[0] * clip.columns_of(given_frames)).unsqueeze(0)
    columns = rows[:, :: clip.audio_patch[0]]
    return ClipBatch(
        video=video,
        audio=audio,
        video_target=video,
        audio_target=audio,
        t_video=torch.full((1, clip.frames), time).masked_fill(frames, 0),
        t_audio=torch.full((1, clip.audio_columns), time).masked_fill(columns, 0),
        labels=torch.tensor([5]),
        given_video=frames[..., None, None, None],
        given_audio=rows[:, None, :, None],
        weight_video=torch.ones(1, 1, 1, 1, 1),
        share_video=1.0,
        share_audio=1.0,
    )


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("time", "substeps"), [(999, 2), (999, 4), (749, 4), (499, 2), (249, 2), (249, 3)])
@torch.no_grad()
def test_one_step_lands_where_the_guided_steps_do(tiny_pipeline, time, substeps, folded):
    model, batch, count = tiny_pipeline.transformer, batch_at(tiny_pipeline, time), 4
    empty = model.config.num_classes
    fine, coarse = xs_scheduler(), xs_scheduler()
    fine.set_timesteps(substeps * count)
    coarse.set_timesteps(count)
    state = {"video": batch.video, "audio": batch.audio}
    start = fine.timesteps.tolist().index(time)
    for i, t in enumerate(fine.timesteps[start : start + substeps], start):
        late, single = i >= 2 * substeps, i >= substeps
        t_video, t_audio = t.expand(1, 16), t.expand(1, 20)
        wanted = model(state["video"], state["audio"], t_video, t_audio, torch.tensor([5]))
        other = torch.tensor([empty if late else 5])
        free = model(state["video"], state["audio"], t_video, t_audio, other, joint=False, temporal=not single)
        scale = 1.0 if i >= 3 * substeps else 3.0 if single else 4.0
        for key, w, f in zip(state, wanted, free, strict=True):
            state[key] = fine.step(f + scale * (w - f), t, state[key]).prev_sample
    if folded:
        model = FoldedAVDiT(model, torch.float32)
    mixed = [1 + k % 3 for k in range(count)]  # the other steps have their own numbers
    mixed[coarse.timesteps.tolist().index(time)] = substeps
    targets = Teacher(model, xs_scheduler(), mixed, 3.0, 0.5, 0.75, 4.0, 0.25, 0.0, False, empty).targets(batch)
    for target, begin, end in zip(targets, (batch.video, batch.audio), state.values(), strict=True):
        landed = coarse.step(target, time, begin).prev_sample
        torch.testing.assert_close(landed, end, atol=5e-3, rtol=1e-3)
        assert (landed - begin).abs().max() > 0.05


@torch.no_grad()
def test_with_new_noise_on_top_the_step_ends_where_the_sampler_expects_it(tiny_pipeline):
    """The teacher goes on to less noise, by as much as a step of DDIM then adds."""
    model, time, end, eta = tiny_pipeline.transformer, 749, 499, 0.7
    batch, coarse = batch_at(tiny_pipeline, time), xs_scheduler()
    coarse.set_timesteps(4)
    alphas = coarse.alphas_cumprod.double()
    sigma = eta * ((1 - alphas[end]) / (1 - alphas[time]) * (1 - alphas[time] / alphas[end])).sqrt()
    below = alphas[end] / (1 - sigma**2)
    landing = (alphas - below).abs().argmin()
    assert end - 200 < landing < end - 50
    grid = (time, round((time + int(landing)) / 2))
    levels = (alphas[grid[0]], alphas[grid[1]], below)
    state = [batch.video.double(), batch.audio.double()]
    for now, alpha, after in zip(grid, levels[:-1], levels[1:], strict=True):
        times = torch.full((1, 16), now), torch.full((1, 20), now)
        made = model(*(x.float() for x in state), *times, batch.labels)
        for i, v in enumerate(made):
            clean, noise = (
                (alpha.sqrt() * state[i] - (1 - alpha).sqrt() * v),
                (1 - alpha).sqrt() * state[i] + alpha.sqrt() * v,
            )
            state[i] = after.sqrt() * clean + (1 - after).sqrt() * noise
    settings = 1.0, 0.5, 1.0, 1.0, 0.25, 0.0, False, model.config.num_classes
    targets = Teacher(model, xs_scheduler(), [2] * 4, *settings, eta).targets(batch)
    generator = torch.Generator().manual_seed(1)
    for target, begin, landed in zip(targets, (batch.video, batch.audio), state, strict=True):
        noise = torch.randn(begin.shape, generator=generator)
        stepped = coarse.step(target, time, begin, eta=eta, variance_noise=noise).prev_sample
        wanted = (alphas[end] / below).sqrt() * landed + sigma * noise
        torch.testing.assert_close(stepped.double(), wanted, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize(("place", "substeps"), [(1, [2] * 4), (3, [2] * 4), (3, [3, 3, 2, 2]), (2, [1, 1, 3, 3])])
@torch.no_grad()
def test_sound_that_stays_behind_is_led_from_where_it_is(tiny_pipeline, place, substeps):
    """It makes its own step while the picture makes a later one, each as finely as the teacher does that one."""
    model, scheduler, lag = tiny_pipeline.transformer, xs_scheduler(), 2
    settings = 1.0, 0.5, 1.0, 1.0, 0.25, 0.0, False, model.config.num_classes
    teacher = Teacher(model, scheduler, substeps, *settings)
    coarse = xs_scheduler()
    coarse.set_timesteps(4)
    times = coarse.timesteps.tolist()
    behind = max(0, place - lag)
    batch = batch_at(tiny_pipeline, times[place])
    batch = batch.behind(scheduler.alphas_cumprod, torch.tensor([lag / 4]), teacher.starts)
    assert (batch.t_audio == times[behind]).all()
    grids = []
    for at in (place, behind):
        fine = xs_scheduler()
        fine.set_timesteps(4 * substeps[at])
        grids.append((fine, fine.timesteps[at * substeps[at] :][: substeps[at]]))
    state = [batch.video, batch.audio]
    for k in range(max(len(grid) for _, grid in grids)):
        # Who is there already waits, and is shown as it is.
        ends = [[*times, 0][at + 1] for at in (place, behind)]
        now = [grid[k] if k < len(grid) else end for (_, grid), end in zip(grids, ends, strict=True)]
        shown = torch.full_like(batch.t_video, int(now[0])), torch.full_like(batch.t_audio, int(now[1]))
        made = model(*state, *shown, batch.labels)
        state = [
            fine.step(v, now[i], x).prev_sample if k < len(grid) else x
            for i, (v, x, (fine, grid)) in enumerate(zip(made, state, grids, strict=True))
        ]
    for target, begin, end, at in zip(
        teacher.targets(batch), (batch.video, batch.audio), state, (place, behind), strict=True
    ):
        landed = coarse.step(target, times[at], begin).prev_sample
        torch.testing.assert_close(landed, end, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize(("factorized", "eventful"), [(False, False), (True, False), (True, True)])
def test_the_stage_guides_what_follows_a_first_frame_as_the_pipeline_does(
    tiny_checkpoint, tmp_path, monkeypatch, factorized, eventful
):
    ways, told = set(), Teacher.guided

    def guided(teacher, batch, *rest):
        ways.add(teacher.from_first)
        return told(teacher, batch, *rest)

    monkeypatch.setattr(Teacher, "guided", guided)
    train = {"steps": 1, "batch_size": 2, "warmup_steps": 1, "sample_every": 0}
    config = {"pipeline": str(tiny_checkpoint), "clips": 1, "steps": 2, "early_substeps": 2, "train": train}
    turbo.run({**config, "factorized": factorized, "eventful": eventful}, tmp_path)
    assert ways == {factorized and not eventful}


@torch.no_grad()
def test_what_is_given_stays_and_is_seen_clean(tiny_pipeline):
    model = tiny_pipeline.transformer
    teacher = Teacher(model, xs_scheduler(), [2] * 4, 2.0, 0.5, 1.0, 3.0, 0.25, 0.0, False, model.config.num_classes)
    batch = batch_at(tiny_pipeline, 749, given_frames=4)
    video, audio = teacher.targets(batch)
    assert torch.isfinite(video).all() and torch.isfinite(audio).all()
    now, done = [torch.tensor([749])] * 2, torch.tensor([0.25])  # where guidance leads away from single images
    times = (batch.t_video, batch.t_audio)
    own = model(batch.video, batch.audio, *times, batch.labels)
    guided = teacher.guided(batch, [batch.video, batch.audio], now, done)
    torch.testing.assert_close(guided[0], own[0])  # a picture that is given in part is not guided, its sound is
    assert not torch.allclose(guided[1], own[1], atol=1e-3)
    half = Teacher(model, xs_scheduler(), [2] * 4, 2.0, 0.5, 1.0, 3.0, 0.25, 0.5, False, model.config.num_classes)
    assert not torch.allclose(half.guided(batch, [batch.video, batch.audio], now, done)[0], own[0], atol=1e-3)


@pytest.mark.parametrize("given", [1, 4])
@torch.no_grad()
def test_what_follows_a_first_frame_or_a_window_is_led_away_from_no_class(tiny_pipeline, given):
    model, batch = tiny_pipeline.transformer, batch_at(tiny_pipeline, 999, given_frames=given)
    if given == 1:  # a frame alone
        batch.given_audio.fill_(False)
        batch.t_audio.fill_(999)
    empty, times = model.config.num_classes, (batch.t_video, batch.t_audio)
    teacher = Teacher(model, xs_scheduler(), [1] * 4, 2.0, 0.5, 0.75, 3.0, 0.25, 0.0, True, empty, blind=(1,))
    wanted = model(batch.video, batch.audio, *times, batch.labels)
    others = model(batch.video, batch.audio, *times, torch.tensor([empty]), joint=False, blind=(1,))
    for done, scale in ((0.0, 3.0), (0.25, 2.0), (0.5, 2.0), (0.75, 1.0)):
        found = teacher.guided(batch, [batch.video, batch.audio], [torch.tensor([999])] * 2, torch.tensor([done]))
        for ours, v, w in zip(found, wanted, others, strict=True):
            torch.testing.assert_close(ours, w + scale * (v - w))


@torch.no_grad()
def test_from_a_first_frame_the_teacher_goes_the_pipelines_way(tiny_pipeline):
    """All its steps for one of the student's land on the clip that the pipeline makes."""
    model, batch = tiny_pipeline.transformer, batch_at(tiny_pipeline, 999, given_frames=1)
    batch.given_audio.fill_(False)
    batch.t_audio.fill_(999)
    image = torch.rand(256, 256, 3, generator=torch.Generator().manual_seed(0))
    latents = batch.video.clone(), batch.audio.clone()
    given = {"image": image, "latents": latents, "factorized": True, "output_type": "latent", "eta": 0.0}
    asked = {"num_inference_steps": 4, "guidance_scale": 2.0, "joint_guidance_scale": 3.0}
    made = tiny_pipeline(5, **asked, **given)
    batch.video[:, :1] = made.frames[:, :1]
    settings = 2.0, 0.25, 0.5, 3.0, 0.25, 0.0, True, model.config.num_classes, 0.0
    blind = middle_blocks(len(model.backbone.blocks))
    landed = [-v for v in Teacher(model, xs_scheduler(), [4], *settings, blind).targets(batch)]
    torch.testing.assert_close(landed[0][:, 1:], made.frames[:, 1:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(landed[1], made.audio, atol=1e-3, rtol=1e-3)
    seeing = [-v for v in Teacher(model, xs_scheduler(), [4], *settings).targets(batch)]
    assert (seeing[0] - landed[0])[:, 1:].abs().max() > 0.01  # what it is led away from is blind


@torch.no_grad()
def test_a_past_with_more_noise_than_the_last_step_does_not_move_the_step(tiny_pipeline):
    model, count = tiny_pipeline.transformer, 8
    teacher = Teacher(
        model, xs_scheduler(), [2] * count, 1.0, 0.5, 1.0, 1.0, 0.25, 0.0, False, model.config.num_classes
    )
    time = int(teacher.starts.min())
    batch = batch_at(tiny_pipeline, time, given_frames=4)
    batch.t_video[:, :4], batch.t_audio[batch.given_columns] = time + 26, time + 26
    fine = xs_scheduler()
    fine.set_timesteps(2 * count)
    video, audio = batch.video, batch.audio
    given = [batch.given_video, batch.given_audio]
    for t in fine.timesteps[-2:]:
        times = (t.where(~mask, time + 26) for mask in (batch.given_frames, batch.given_columns))
        made = model(video, audio, *times, batch.labels)
        video, audio = (
            x.where(mask, fine.step(v, t, x).prev_sample)
            for x, v, mask in zip((video, audio), made, given, strict=True)
        )
    coarse = xs_scheduler()
    coarse.set_timesteps(count)
    landed = coarse.step(teacher.targets(batch)[0], time, batch.video).prev_sample
    # 1000 is no multiple of 16: the scheduler's timesteps and its steps between them differ by one at most.
    torch.testing.assert_close(landed[:, 4:], video[:, 4:], atol=0.01, rtol=0)


def test_stage_distils_a_student_that_has_begun(tiny_checkpoint, tmp_path):
    model = AVDiTPipeline.from_pretrained(tiny_checkpoint).transformer
    table = "class_embedder.embedding_table.weight"
    begun = {name: value + 0.01 for name, value in model.adapter_state_dict().items()}
    Pack(list(CLASSES), begun, steps=4).save(tmp_path / "begun")
    config = {"pipeline": str(tiny_checkpoint), "student": str(tmp_path / "begun"), "clips": 1, "class_table": False}
    config["train"] = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "learning_rate": 1e-4, "sample_every": 0}
    config |= {"audio_lag": 0.25, "eta": 1.0, "distilled_eta": 0.0}
    turbo.run(config, tmp_path / "out")
    pack = Pack.load(tmp_path / "out" / "pack")
    assert (pack.classes, pack.steps, pack.audio_lag, pack.eta) == (list(CLASSES), 4, 0.25, 1.0)
    for name, value in pack.state.items():  # nearer to where it began than that is to its teacher
        torch.testing.assert_close(value.float(), begun[name], atol=4e-3, rtol=1e-2)
    assert torch.equal(pack.state[table], begun[table].bfloat16())
    moved = [name for name, value in pack.state.items() if not torch.equal(value, begun[name].bfloat16())]
    assert any(".temporal." in name for name in moved) and any(".audio_mlp." in name for name in moved)
    Pack(list(GENRES), begun).save(tmp_path / "other")
    with pytest.raises(ValueError, match="other has other classes than the pipeline"):
        turbo.run({**config, "student": str(tmp_path / "other"), "cache": str(tmp_path / "out")}, tmp_path / "not")


def turbo_pipeline(folder, steps=3, eta=0.0):
    pipe = AVDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    state = {name: value + 0.02 for name, value in copy.deepcopy(pipe.transformer.adapter_state_dict()).items()}
    pipe.add_pack("own-turbo", Pack(pipe.classes, state, steps=steps, eta=eta))
    return pipe


def test_pipeline_uses_them_where_it_is_asked(tiny_checkpoint, tmp_path):
    pipe = turbo_pipeline(tiny_checkpoint)
    assert list(pipe.packs) == ["own"] and pipe.turbo_steps("thunder") == 3
    slow = generate(pipe, Request("thunder", steps=3, guidance=1.0))
    seen = []
    fast = generate(
        pipe, Request("thunder", sampler="turbo", steps=30), on_step=lambda done, total, _: seen.append(total)
    )
    assert seen == [3, 3, 3]
    assert (fast.recipe["steps"], fast.recipe["guidance"], fast.recipe["sampler"]) == (3, 1.0, "turbo")
    assert abs(fast.frames - slow.frames).max() > 0.01
    assert (generate(pipe, Request("thunder", steps=3, guidance=1.0)).frames == slow.frames).all()
    pipe.save_pretrained(tmp_path)
    again = AVDiTPipeline.from_pretrained(tmp_path)
    assert (generate(again, Request("thunder", sampler="turbo")).frames == fast.frames).all()


def test_they_tell_how_much_new_noise_their_steps_add(tiny_checkpoint, tmp_path):
    without, pipe = turbo_pipeline(tiny_checkpoint), turbo_pipeline(tiny_checkpoint, eta=0.7)
    first, second = (generate(pipe, Request("thunder", seed=seed, sampler="turbo")) for seed in (1, 2))
    assert abs(first.frames - generate(without, Request("thunder", seed=1, sampler="turbo")).frames).max() > 0.01
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]  # each clip draws its own
    both = pipe(["thunder"] * 2, turbo=True, generator=generators)
    for alone, together in zip((first, second), both.frames, strict=True):
        assert abs(alone.frames - together).max() < 1e-3
    pipe.save_pretrained(tmp_path)
    again = AVDiTPipeline.from_pretrained(tmp_path)
    assert (generate(again, Request("thunder", seed=1, sampler="turbo")).frames == first.frames).all()


@pytest.mark.parametrize(
    ("name", "value"), [("eta", -0.1), ("eta", 1.5), ("eta", "0.7"), ("eta", None), ("distilled_eta", 2)]
)
def test_a_bad_share_of_new_noise_is_said(tiny_checkpoint, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} {value!r} must be a number from 0 to 1$"):
        turbo.run({"pipeline": str(tiny_checkpoint), name: value}, tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("substeps", 2.0), ("early_substeps", "4"), ("steps", True)])
def test_bad_settings_are_said_before_anything_is_made(tiny_checkpoint, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} {value!r} must be a whole number from 1 to 1000$"):
        turbo.run({"pipeline": str(tiny_checkpoint), name: value}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_none_there_is_said(tiny_pipeline):
    with pytest.raises(ValueError, match="no turbo adapters for 'thunder'"):
        generate(tiny_pipeline, Request("thunder", sampler="turbo"))
    with pytest.raises(ValueError, match="no turbo adapters"):
        tiny_pipeline("thunder", turbo=True)


def test_other_samplers_are_refused(tiny_checkpoint):
    pipe = turbo_pipeline(tiny_checkpoint)
    pipe.set_sampler("unipc")
    with pytest.raises(ValueError, match="need the sampler ddim"):
        pipe("thunder", turbo=True)
    with pytest.raises(ValueError, match="other classes"):
        pipe.add_pack("lost-turbo", Pack(["krump"], pipe.transformer.adapter_state_dict(), steps=2))
