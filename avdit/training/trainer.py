"""The training loop that every stage shares: accelerate, cosine schedule, EMA, samples, exact resume.

A stage supplies ``loss(step) -> dict`` whose batch depends on the step alone (its draws come from a generator
seeded with the step), so that a run which is killed and resumed sees the same data as one that is not.

Every process draws the choices of the *whole* batch (``Trainer.global_batch``) and works on its own rows
(``Trainer.mine``). So the weights do not depend on how many processes and accumulated parts shared the work; on GPUs
they do by their noise (``Trainer.draws``).
"""

import contextlib
import itertools
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast, parse_flag_from_env
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from avdit.training.blocks import checkpoint_blocks, compile_blocks
from avdit.training.flops import counted_flops, matmul_flops

Loss = Callable[[nn.Module, torch.Generator, int], dict[str, Tensor]]

CHECKS = 16  # batches in which the error on held-out clips is measured, the same ones each time
KEPT = "step", "exp_avg", "exp_avg_sq", "momentum_buffer"  # what AdamW and Muon know of a parameter
WAIT = timedelta(hours=6)  # for the slowest process's share of the encoding, or for a sample sheet


def processes() -> PartialState:
    """The processes of this run; those without a GPU, which accelerate takes for single ones, talk by gloo."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available()),
        timeout=WAIT,
    )


def end_processes() -> None:
    """Wait for the others of this run, then close what they talk through; alone, nothing happens.

    Where a process ends while threads of its group still run, torch may abort it after all work is done, and the
    launcher then takes the run for failed.
    """
    if torch.distributed.is_initialized():
        state = processes()
        state.wait_for_everyone()
        state.destroy_process_group()


@dataclass
class TrainerConfig:
    steps: int = 1000
    batch_size: int = 8  # a process, and a part where parts are accumulated
    accumulation: int = 1  # parts whose gradients make one step
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_rate: float = 0.05  # share of the learning rate that the cosine ends on
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    save_every: int = 200
    sample_every: int = 500  # 0: no sample sheets
    check_every: int = 0  # steps between measurements of the error on held-out clips; 0: none
    patience: int = 0  # end after so many of them in a row without a new lowest error; 0: never
    minutes: float = 0.0  # stop after this time; 0: after ``steps``. The schedule then follows the time.
    seed: int = 0
    compile: bool = False  # a minute or two, after which a step takes about three quarters of the time
    gradient_checkpointing: bool = False  # blocks are computed again in the backward pass: less memory, more time
    mixed_precision: str = ""  # "no", "bf16" or "fp16"; empty: as accelerate is configured
    optimiser: str = "adamw"  # or "muon" (Jordan et al. 2024): that for the matrices of the blocks, AdamW for the rest

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("", "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision {self.mixed_precision!r} must be 'no', 'bf16' or 'fp16'")
        if self.optimiser not in ("adamw", "muon"):
            raise ValueError(f"optimiser {self.optimiser!r} must be 'adamw' or 'muon'")
        for name in ("batch_size", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a whole number of 1 or more")
        for name in ("check_every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} {value!r} must be a whole number of 0 or more")
        if self.patience and not self.check_every:
            raise ValueError("patience counts measurements of the held-out error: give check_every, too")


class Trainer:
    """Trains the parameters of ``module`` that want a gradient.

    Args:
        module: Called as ``module(step)`` inside ``loss``; wrapped for several processes by accelerate.
        loss: Maps (module, generator, step) to a dict of scalars whose ``"loss"`` is minimised.
        out: Folder of ``state.safetensors``, the log and the sample sheets.
        sample: Called with the path of a PNG every ``sample_every`` steps, EMA weights in place.
        unused: Whether some parameters take no part in the loss, which several processes must know.
        held_out: As ``loss``, of clips that are never trained on; for ``check_every``.

    Raises:
        ValueError: where blocks are to be computed again that cannot be, or a held-out error is asked for that this
            stage does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        config: TrainerConfig,
        out: Path,
        sample: Callable[[Path], None] | None = None,
        unused: bool = False,
        held_out: Loss | None = None,
    ) -> None:
        if config.check_every and held_out is None:
            raise ValueError("check_every: this stage measures no error on held-out clips")
        processes()
        AcceleratorState._reset_state()  # else the precision of an earlier training in this process would hold
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision or None,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
        self.config, self.loss, self.out, self.sample, self.held_out = config, loss, Path(out), sample, held_out
        self.raw = module.to(self.accelerator.device)
        torch.backends.cudnn.benchmark = True  # batches are of one size
        if config.gradient_checkpointing:
            checkpoint_blocks(self.raw)
        self.parameters = {n: p for n, p in self.raw.named_parameters() if p.requires_grad}
        if config.compile:
            compile_blocks(self.raw)
        self.module, *self.optimisers = self.accelerator.prepare(self.raw, *optimisers(self.parameters, config))
        # Only now do all processes have the first one's weights.
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.step, self.part, self.elapsed = 0, 0, 0.0
        self.drawn_from = config.seed  # what all draws of a step follow from, beside its number
        self.lowest, self.since = math.inf, 0  # error on held-out clips, and the measurements since then
        self.beside: Any = None  # what the stage trains beside the module itself, and is saved with it

    @property
    def parts(self) -> int:
        """How many shares a step's batch is worked on in: processes times accumulated parts."""
        return self.accelerator.num_processes * self.config.accumulation

    @property
    def global_batch(self) -> int:
        """Rows of a step's batch in all."""
        return self.config.batch_size * self.parts

    @property
    def seed(self) -> int:
        return self.drawn_from * 1_000_003 + self.step

    @property
    def rows(self) -> range:
        """Of the whole batch, the rows of this process's part that is being worked on."""
        share = self.part * self.accelerator.num_processes + self.accelerator.process_index
        return range(share * self.config.batch_size, (share + 1) * self.config.batch_size)

    def mine(self, drawn: Tensor) -> Tensor:
        """This part's rows of what was drawn for the whole batch (global_batch, ...)."""
        return drawn[self.rows.start : self.rows.stop]

    def here(self, drawn: Tensor) -> Tensor:
        """The same on this process's device, which is not waited for."""
        return self.mine(drawn).to(self.accelerator.device, non_blocking=True)

    def draws(self) -> list[tuple[torch.Generator, int]]:
        """Generators for this part's noise, each with the number of rows that it is for.

        A GPU draws all rows at once, so that there the noise depends on how the batch is shared out.
        """
        if self.accelerator.device.type != "cuda":
            return [(generator, 1) for generator in self.generators()]
        seed = int(np.random.SeedSequence((self.seed, self.rows.start)).generate_state(1)[0])
        return [(torch.Generator(self.accelerator.device).manual_seed(seed), len(self.rows))]

    def generators(self) -> list[torch.Generator]:
        """One for each row of this part, for what is too large to be drawn by every process for all rows."""
        # Mixed by numpy, as torch's CPU generator heeds the lowest 32 bits of a seed alone.
        seeds = [int(np.random.SeedSequence((self.seed, row)).generate_state(1)[0]) for row in self.rows]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    @property
    def state_path(self) -> Path:
        return self.out / "state.safetensors"

    def save(self) -> None:
        """Write weights, EMA and optimiser state in one file that replaces the last one whole."""
        tensors = {}
        state = {p: kept for optimiser in self.optimisers for p, kept in optimiser.optimizer.state.items()}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = self.ema[name]
            for key, value in state.get(parameter, {}).items():
                tensors[f"optimiser.{key}.{name}"] = value
        if self.beside is not None:
            tensors.update({f"beside.{name}": value for name, value in self.beside.state_dict().items()})
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        part = self.state_path.with_suffix(".part")
        told = {name: str(getattr(self, name)) for name in ("step", "elapsed", "lowest", "since")}
        save_file(tensors, part, metadata=told)
        os.replace(part, self.state_path)

    def resume(self) -> bool:
        """Go on from the last save; False where there is none."""
        if not self.state_path.exists():
            return False
        device = self.accelerator.device
        place = "cpu" if device.type == "cpu" else str(device)  # safetensors does not know "cpu:0", as gloo has it
        with safe_open(self.state_path, "pt", device=place) as file, torch.no_grad():
            meta, keys = file.metadata(), set(file.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema.{name}"))
                state = {k: n for k in KEPT if (n := f"optimiser.{k}.{name}") in keys}
                for optimiser in self.optimisers:
                    if state and any(parameter is p for group in optimiser.param_groups for p in group["params"]):
                        optimiser.optimizer.state[parameter] = {k: file.get_tensor(n) for k, n in state.items()}
            if self.beside is not None:
                told = [name for name in keys if name.startswith("beside.")]
                self.beside.load_state_dict({name.removeprefix("beside."): file.get_tensor(name) for name in told})
        self.step, self.elapsed = int(meta["step"]), float(meta["elapsed"])
        self.lowest, self.since = float(meta.get("lowest", math.inf)), int(meta.get("since", 0))
        return True

    def swap_ema(self) -> None:
        """Exchange the weights with their averages; a second call undoes it."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                kept = parameter.detach().clone()
                parameter.copy_(self.ema[name])
                self.ema[name].copy_(kept)

    def run(self, resume: bool = False) -> nn.Module:
        """Train to the end of the schedule, or with ``resume`` from the last save on.

        Returns the module with its averaged weights.
        """
        if resume:
            self.resume()
        cfg, main = self.config, self.accelerator.is_main_process
        self.out.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=cfg.steps, initial=self.step, disable=not main, mininterval=10, dynamic_ncols=False, ncols=110)
        start, before, first = time.monotonic(), self.elapsed, self.step
        if cfg.check_every and self.step == 0:
            self.check()
        while self.step < cfg.steps and (not cfg.minutes or self.elapsed < cfg.minutes * 60) and not self.learned:
            terms = self.train_step()
            self.elapsed = self.agreed(before + time.monotonic() - start)
            bar.update()
            if self.step % 20 == 0:
                terms = self.accelerator.reduce(terms, "mean")
            if main and self.step % 20 == 0:
                values = {k: round(v.item(), 4) for k, v in terms.items()}
                done = (self.step - first) * self.global_batch
                speed = done / (time.monotonic() - start)
                bar.set_postfix({**values, "clips/s": round(speed, 2)}, refresh=False)
                self.note({"speed": round(speed, 2), **values})
            if cfg.check_every and self.step % cfg.check_every == 0:
                self.check()
            if main and self.step % cfg.save_every == 0:
                self.save()
            if main and self.sample and cfg.sample_every and self.step % cfg.sample_every == 0:
                self.draw(self.out / f"samples-{self.step:06d}.png")
        bar.close()
        if cfg.check_every and self.step > first and self.step % cfg.check_every:
            self.check()
        if main:
            self.save()
        self.swap_ema()
        if main and self.sample and cfg.sample_every:
            with torch.no_grad():
                self.sample(self.out / "samples-final.png")
        return self.raw

    def train_step(self) -> dict[str, Tensor]:
        """One update of the weights and of their averages; returns the terms of this process's last part."""
        cfg = self.config
        progress = self.step / cfg.steps
        if cfg.minutes:
            progress = max(progress, self.elapsed / (cfg.minutes * 60))
        rate = cfg.final_rate + (1 - cfg.final_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = cfg.learning_rate * rate * min(1.0, (self.step + 1) / cfg.warmup_steps)
        for self.part in range(cfg.accumulation):
            last = self.part == cfg.accumulation - 1
            # Processes exchange their gradients once a step, after the last part.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                terms = self.loss(self.module, torch.Generator().manual_seed(self.seed), self.step)
                self.accelerator.backward(terms["loss"] / cfg.accumulation)
        self.accelerator.clip_grad_norm_(list(self.parameters.values()), cfg.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(cfg.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        return {name: term.detach() for name, term in terms.items()}

    def note(self, values: dict[str, Any]) -> None:
        """Add a line to the log."""
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, "seconds": round(self.elapsed), **values}) + "\n")

    @property
    def learned(self) -> bool:
        """Whether the error on held-out clips has stopped falling."""
        return 0 < self.config.patience <= self.since

    @torch.no_grad()
    def check(self) -> None:
        """Measure the error of the averaged weights on held-out clips.

        Batches and noise are the same each time and of every ``seed``, so that runs compare.
        """
        at, found = self.step, []
        self.swap_ema()
        self.drawn_from = 0
        for step, part in itertools.product(range(CHECKS), range(self.config.accumulation)):
            self.step, self.part = step, part  # what is drawn follows from them
            found.append(self.held_out(self.module, torch.Generator().manual_seed(self.seed), step))
        self.step, self.drawn_from = at, self.config.seed
        self.swap_ema()
        terms = {name: torch.stack([one[name].detach() for one in found]).mean() for name in found[0]}
        values = {name: round(term.item(), 5) for name, term in self.accelerator.reduce(terms, "mean").items()}
        self.since = 0 if values["loss"] < self.lowest else self.since + 1
        self.lowest = min(self.lowest, values["loss"])
        if self.accelerator.is_main_process:
            self.note({"held_out": values})
        self.accelerator.print(f"step {self.step}: held-out {', '.join(f'{k} {v:.4f}' for k, v in values.items())}")

    def agreed(self, seconds: float) -> float:
        """The first process's clock: all must stop at the same step."""
        if self.accelerator.num_processes == 1 or not self.config.minutes:
            return seconds
        return float(broadcast(torch.tensor(seconds, device=self.accelerator.device)))

    def dry_run(self) -> dict[str, Any]:
        """Time one step, after two that do not count, and count what memory holds; nothing is written.

        Returns:
            ``parameters``; ``batch``; ``counted_gb`` (weights, gradients, optimiser and averages of this process,
            from their sizes); ``peak_gb`` (measured: the device's memory, or this process's on a CPU);
            ``seconds_per_step`` (measured) and ``hours`` of the whole schedule; ``gflop_per_step`` of this process
            (counted) and ``share_of_peak``, of what a large product of matrices reaches here (measured).
        """
        cuda = self.accelerator.device.type == "cuda"
        with counted_flops() as flops:
            self.train_step()
        self.train_step()  # if it is to be compiled, now
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.train_step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        possible = matmul_flops(self.accelerator.device, self.accelerator.mixed_precision)
        trainable = sum(p.numel() for p in self.parameters.values())
        total = sum(p.numel() for p in self.raw.parameters())
        held = sum(p.numel() * p.element_size() for p in self.raw.parameters())
        gradients = sum(p.numel() * p.element_size() for p in self.parameters.values())
        states = (kept for optimiser in self.optimisers for kept in optimiser.optimizer.state.values())
        state = sum(value.nbytes for kept in states for value in kept.values())
        counted = {"weights": held, "gradients": gradients, "optimiser": state, "averages": gradients}
        unit = 1 if sys.platform == "darwin" else 1024
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        cfg = self.config
        batch = {"process": cfg.batch_size, "accumulation": cfg.accumulation, "global": self.global_batch}
        return {
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "parameters": {"trainable": trainable, "frozen": total - trainable},
            "batch": batch,
            "counted_gb": {name: round(size / 1e9, 3) for name, size in counted.items()},
            "peak_gb": round(peak / 1e9, 3),
            "seconds_per_step": round(seconds, 3),
            "gflop_per_step": round(flops.get_total_flops() / 1e9, 3),
            "share_of_peak": round(flops.get_total_flops() / seconds / possible, 6),
            "hours": round(cfg.minutes / 60 if cfg.minutes else seconds * cfg.steps / 3600, 2),
        }

    def draw(self, path: Path) -> None:
        """Write a sample sheet made with the averaged weights."""
        self.swap_ema()
        with torch.no_grad():
            self.sample(path)
        self.swap_ema()


def optimisers(parameters: dict[str, nn.Parameter], config: TrainerConfig) -> list[torch.optim.Optimizer]:
    """Those of ``config`` over named ``parameters``; their rates stand for steps of the same size."""
    matrices = {}
    if config.optimiser == "muon":
        inner = re.compile(r"(^|\.)(blocks|adapters)\..*\.weight$")
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and inner.search(n)}
    others = [p for n, p in parameters.items() if n not in matrices]
    shared = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    made: list[torch.optim.Optimizer] = []
    if others:
        made.append(torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True, **shared))
    if matrices:
        made.append(torch.optim.Muon(list(matrices.values()), adjust_lr_fn="match_rms_adamw", **shared))
    return made


def trainer_config(values: dict, **defaults) -> TrainerConfig:
    """The stage's defaults with what the user's configuration changes.

    Raises:
        ValueError: for a setting that does not exist, or a value that cannot be.
    """
    known = asdict(TrainerConfig())
    for name in values:
        if name not in known:
            raise ValueError(f"unknown training setting {name!r}: choose from {', '.join(known)}")
    return TrainerConfig(**{**defaults, **values})
