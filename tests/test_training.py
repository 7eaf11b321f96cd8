"""A killed run goes on from its last save; what it saves can be loaded."""

import json
import os
import signal
import subprocess
import sys
import time

import torch
from safetensors import safe_open

from avdit.geometry import ClipGeometry
from avdit.models.schedule import xs_scheduler
from avdit.training.batches import given_parts
from avdit.training.diffusion import Diffusion, masked_error
from avdit.training.trainer import Trainer, TrainerConfig


def line_fit(out, steps):
    """A small regression whose batches depend on the step alone."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)

    def loss(model, generator, step):
        x = torch.randn(8, 4, generator=generator)
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return Trainer(module, loss, TrainerConfig(steps=steps, warmup_steps=1, save_every=10, final_rate=1.0), out)


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = line_fit(tmp_path / "whole", 40)
    expected = whole.run().weight.detach().clone()

    part = line_fit(tmp_path / "part", 40)
    part.config.steps, kept = 20, part.config.steps
    part.config.final_rate = 1.0
    part.run()
    again = line_fit(tmp_path / "part", kept)
    assert again.resume() and again.step == 20
    torch.testing.assert_close(again.run().weight, expected)


def test_no_two_steps_draw_the_same_noise(tmp_path):
    trainer, seen = line_fit(tmp_path, 1), set()
    for trainer.step in range(600):
        seen.update(torch.rand(1, generator=generator).item() for generator in trainer.generators())
    assert len(seen) > 0.999 * 600 * trainer.global_batch


def test_given_parts_carry_no_loss():
    generator = torch.Generator().manual_seed(0)
    diffusion = Diffusion(xs_scheduler())
    clean, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    t = torch.full((2, 3), 700)
    given = torch.tensor([[True, False, False], [False, False, True]])
    noised, target = diffusion.noised(clean, noise, t, given)
    assert torch.equal(noised[given], clean[given])
    assert not torch.allclose(noised[~given], clean[~given])
    wrong_on_given = target + given.unsqueeze(-1) * 100
    assert masked_error(wrong_on_given, target, ~given.unsqueeze(-1)) == 0
    frames, columns = given_parts({"image": 1.0}, 4, ClipGeometry(), generator)
    assert frames[:, 0].all() and not frames[:, 1:].any() and not columns.any()


def test_velocity_agrees_with_the_scheduler():
    scheduler = xs_scheduler()
    clean, noise = torch.randn(2, 4), torch.randn(2, 4)
    t = torch.tensor([100, 900])
    noised, velocity = Diffusion(scheduler).noised(clean, noise, t, torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(noised, scheduler.add_noise(clean, noise, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, t), atol=1e-5, rtol=1e-5)


def test_kill_and_resume_on_the_command_line(tmp_path):
    settings = {"clips": 1, "parts": ["audio"], "audio": {"steps": 400, "batch_size": 1, "save_every": 2}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "avdit",
        "train",
        "codecs",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "run"),
    ]
    state = tmp_path / "run" / "audio" / "state.safetensors"

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with safe_open(state, "pt") as file:
        reached = int(file.metadata()["step"])
    assert 0 < reached < 400

    settings["audio"]["steps"] = reached + 4
    config.write_text(json.dumps(settings))
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with safe_open(state, "pt") as file:
        assert int(file.metadata()["step"]) == reached + 4
    assert (tmp_path / "run" / "audio_codec" / "config.json").exists()
