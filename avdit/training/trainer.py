"""The training loop that every stage shares: accelerate, cosine schedule, EMA, samples, exact resume.

A stage supplies ``loss(step) -> dict`` whose batch depends on the step alone (its draws come from a generator
seeded with the step), so that a run which is killed and resumed sees the same data as one that is not.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class TrainerConfig:
    steps: int = 1000
    batch_size: int = 8  # a process
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_rate: float = 0.05  # share of the learning rate that the cosine ends on
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    save_every: int = 200
    sample_every: int = 500
    minutes: float = 0.0  # stop after this time; 0: after ``steps``. The schedule then follows the time.
    seed: int = 0
    compile: bool = False  # pays off after about a thousand steps


class Trainer:
    """Trains the parameters of ``module`` that want a gradient.

    Args:
        module: Called as ``module(step)`` inside ``loss``; wrapped for several processes by accelerate.
        loss: Maps (module, generator, step) to a dict of scalars whose ``"loss"`` is minimised.
        out: Folder of ``state.safetensors``, the log and the sample sheets.
        sample: Called with the path of a PNG every ``sample_every`` steps, EMA weights in place.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, torch.Generator, int], dict[str, Tensor]],
        config: TrainerConfig,
        out: Path,
        sample: Callable[[Path], None] | None = None,
    ) -> None:
        self.accelerator = Accelerator()
        self.config, self.loss, self.out, self.sample = config, loss, Path(out), sample
        self.out.mkdir(parents=True, exist_ok=True)
        self.raw = module.to(self.accelerator.device)
        self.parameters = {n: p for n, p in self.raw.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()}
        optimiser = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        module = torch.compile(self.raw) if config.compile else self.raw
        self.module, self.optimiser = self.accelerator.prepare(module, optimiser)
        self.step, self.elapsed = 0, 0.0

    @property
    def state_path(self) -> Path:
        return self.out / "state.safetensors"

    def save(self) -> None:
        """Write weights, EMA and optimiser state in one file that replaces the last one whole."""
        tensors = {}
        inner = self.optimiser.optimizer.state
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = self.ema[name]
            for key, value in inner.get(parameter, {}).items():
                tensors[f"optimiser.{key}.{name}"] = value
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        part = self.state_path.with_suffix(".part")
        save_file(tensors, part, metadata={"step": str(self.step), "elapsed": str(self.elapsed)})
        os.replace(part, self.state_path)

    def resume(self) -> bool:
        """Go on from the last save; False where there is none."""
        if not self.state_path.exists():
            return False
        with safe_open(self.state_path, "pt", device=str(self.accelerator.device)) as file, torch.no_grad():
            meta, keys = file.metadata(), set(file.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema.{name}"))
                state = {k: f"optimiser.{k}.{name}" for k in ("step", "exp_avg", "exp_avg_sq")}
                if state["step"] in keys:
                    self.optimiser.optimizer.state[parameter] = {k: file.get_tensor(n) for k, n in state.items()}
        self.step, self.elapsed = int(meta["step"]), float(meta["elapsed"])
        return True

    def swap_ema(self) -> None:
        """Exchange the weights with their averages; a second call undoes it."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                kept = parameter.detach().clone()
                parameter.copy_(self.ema[name])
                self.ema[name].copy_(kept)

    def run(self) -> nn.Module:
        """Train to the end of the schedule; returns the module with its averaged weights."""
        cfg, main = self.config, self.accelerator.is_main_process
        offset = self.accelerator.process_index
        bar = tqdm(total=cfg.steps, initial=self.step, disable=not main, mininterval=10, dynamic_ncols=False, ncols=110)
        start, before, first = time.monotonic(), self.elapsed, self.step
        while self.step < cfg.steps and (not cfg.minutes or self.elapsed < cfg.minutes * 60):
            progress = self.step / cfg.steps
            if cfg.minutes:
                progress = max(progress, self.elapsed / (cfg.minutes * 60))
            rate = cfg.final_rate + (1 - cfg.final_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
            for group in self.optimiser.param_groups:
                group["lr"] = cfg.learning_rate * rate * min(1.0, (self.step + 1) / cfg.warmup_steps)
            seed = (cfg.seed * 1_000_003 + self.step) * self.accelerator.num_processes + offset
            terms = self.loss(self.module, torch.Generator().manual_seed(seed), self.step)
            self.accelerator.backward(terms["loss"])
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), cfg.clip_norm)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.step += 1
            decay = min(cfg.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
            self.elapsed = before + time.monotonic() - start
            bar.update()
            if main and self.step % 20 == 0:
                values = {k: round(v.item(), 4) for k, v in terms.items()}
                done = (self.step - first) * cfg.batch_size * self.accelerator.num_processes
                speed = done / (time.monotonic() - start)
                bar.set_postfix({**values, "clips/s": round(speed, 2)}, refresh=False)
                with (self.out / "log.jsonl").open("a") as log:
                    row = {"step": self.step, "seconds": round(self.elapsed), "speed": round(speed, 2), **values}
                    log.write(json.dumps(row) + "\n")
            if main and self.step % cfg.save_every == 0:
                self.save()
            if main and self.sample and self.step % cfg.sample_every == 0:
                self.draw(self.out / f"samples-{self.step:06d}.png")
        bar.close()
        if main:
            self.save()
        self.swap_ema()
        if main and self.sample:
            with torch.no_grad():
                self.sample(self.out / "samples-final.png")
        return self.raw

    def draw(self, path: Path) -> None:
        """Write a sample sheet made with the averaged weights."""
        self.swap_ema()
        with torch.no_grad():
            self.sample(path)
        self.swap_ema()


def trainer_config(values: dict, **defaults) -> TrainerConfig:
    """The stage's defaults with what the user's configuration changes.

    Raises:
        ValueError: for a setting that does not exist.
    """
    known = asdict(TrainerConfig())
    for name in values:
        if name not in known:
            raise ValueError(f"unknown training setting {name!r}: choose from {', '.join(known)}")
    return TrainerConfig(**{**defaults, **values})
