"""Stage 4: adapters for few steps without guidance, distilled from a trained pipeline's.

    python -m avdit train turbo --config turbo.json --out runs/turbo    # {"pipeline": DIR} at least

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) with the guidance folded in (Meng et al. 2023,
arXiv 2210.03142): one step of the student must land where some guided steps of the teacher land. Only adapters train,
and only at the timesteps that are ever used. The result is a pack that takes the place of its teacher's.

``"adversarial_weight"`` adds an adversary, to which each step must lead to what might be a real clip (adversary.py).
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from avdit.conditions import middle_blocks
from avdit.generate import Request, between, whole
from avdit.models.avdit import AVDiT
from avdit.models.inference import FoldedAVDiT, can_fold
from avdit.packs import Pack
from avdit.pipeline import GIVEN_GUIDANCE, GUIDANCE_END
from avdit.training.adapters import DEFAULTS as ADAPTERS
from avdit.training.adapters import first_frames, from_pipeline, geometry_of, sample_sheet
from avdit.training.adversary import ClipAdversary, Discriminator
from avdit.training.batches import ClipBatch, ClipBatches
from avdit.training.data import TrainingData, held_out_data, training_data
from avdit.training.diffusion import Diffusion, timesteps_of
from avdit.training.trainer import Trainer, trainer_config

DEFAULTS = {
    "pipeline": "checkpoints/avdit-xs",
    "pack": "landscape",
    "student": None,  # folder of the pack that the student begins with; null: with its teacher's
    "clips": 160,  # rendered clips a class
    "steps": 4,  # of the student's sampler
    "eta": 0.0,  # new noise that each of them adds, as the pipeline's
    "distilled_eta": None,  # that which its teacher leaves room for; null: as much
    "substeps": 2,  # of its teacher for each of them
    "early_substeps": 4,  # in the first half of them, where events find their moment
    "guidance": Request.guidance,  # of the teacher
    "guidance_start": 0.25,  # share of its steps after which guidance leads away from any class
    "guidance_end": GUIDANCE_END,  # share of its steps that are guided
    "joint_guidance": Request.joint_guidance,  # of picture and sound by each other in its first steps
    "temporal_guidance_start": 0.25,  # share of its steps after which guidance leads away from single images
    "given_guidance": GIVEN_GUIDANCE,  # share of what guidance adds to a picture that is given in part
    "audio_lag": 0.0,  # share of the steps by which sound stays behind its picture, as the teacher learned it (lag.py)
    "factorized": ADAPTERS["factorized"],
    "class_table": ADAPTERS["class_table"],
    "moving_weight": ADAPTERS["moving_weight"],
    "steady_weight": ADAPTERS["steady_weight"],
    "context_noise": ADAPTERS["context_noise"],
    "context_contrast": ADAPTERS["context_contrast"],
    "context_anchor": ADAPTERS["context_anchor"],
    "class_repeats": ADAPTERS["class_repeats"],
    "adversarial_weight": 0.0,  # of an adversary, as a share of the distillation's gradient (see adversary.py)
    "tasks": ADAPTERS["tasks"],
    "train": {"steps": 4000, "batch_size": 4, "learning_rate": 3e-4, "warmup_steps": 50, "ema_decay": 0.99},
}

ADVERSARY_WARMUP = 150  # steps in which its weight rises


class Teacher:
    """Some steps of guided DDIM for every step of the student.

    Args:
        model: The trained model, whose gradients are not wanted; or the same, folded.
        substeps: Of the teacher for each of the student's steps.
        start: Share of the teacher's steps after which guidance leads away from any class, as in the pipeline.
        end: Share of its steps after which nothing is guided.
        joint: Guidance of picture and sound by each other in the first steps.
        temporal_start: Share of the steps after which guidance leads away from single images.
        given: Share of what guidance adds that stays for a picture of which a part is given.
        from_first: Whether what follows a first frame, or a window before it, is guided as the pipeline does where
            clips are made from their first frame on and no event counts.
        empty: The unconditional class.
        eta: New noise of the student's steps. The teacher lands below their ends by as much, from where that noise
            leads back up to them.
        blind: Blocks that are blind in what guidance leads away from, of clips that are made from their first frame.
    """

    def __init__(
        self,
        model: nn.Module | FoldedAVDiT,
        scheduler: DDIMScheduler,
        substeps: Sequence[int],
        guidance: float,
        start: float,
        end: float,
        joint: float,
        temporal_start: float,
        given: float,
        from_first: bool,
        empty: int,
        eta: float = 0.0,
        blind: Collection[int] = (),
    ) -> None:
        self.blind = blind
        self.model, self.guidance, self.joint, self.empty = model, guidance, joint, empty
        self.from_first = from_first
        self.start, self.end, self.temporal_start, self.given = start, end, temporal_start, given
        coarse = copy.deepcopy(scheduler)
        coarse.set_timesteps(len(substeps))
        self.sampler, self.starts, self.substeps = (
            coarse,
            coarse.timesteps,
            torch.tensor(substeps),
        )  # (steps,), the first falling
        ends = torch.cat([self.starts[1:], torch.tensor([-1])])  # at the last end nothing is noised
        alphas = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)]).double()
        # A step of DDIM with the deviation sigma of new noise is one without it to less noise, and the noise on top.
        before, after = alphas[self.starts], alphas[ends]
        sigma = eta * ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
        landing = after / (1 - sigma**2)
        ends = torch.where(ends < 0, ends, (landing.unsqueeze(1) - alphas[:-1]).abs().argmin(1))
        share = torch.arange(max(substeps) + 1) / self.substeps.unsqueeze(1)  # of each step, (steps, most + 1)
        # Rounded as the scheduler does, whose own times these are where all steps have as many and nothing is added.
        self.grid = (self.starts.unsqueeze(1) + 1 - (self.starts - ends).unsqueeze(1) * share.clamp(max=1)).round() - 1
        self.grid = self.grid.long()
        self.alphas = torch.where(share < 1, alphas[self.grid], landing.unsqueeze(1)).float()  # (steps, most + 1)
        if scheduler.config.prediction_type != "v_prediction":
            raise ValueError("turbo adapters are distilled from a model that predicts the velocity")

    @torch.no_grad()
    def targets(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """The velocities of picture and sound at which one step of the student lands where the teacher does."""
        # Either has one timestep but for what is given, which may have more noise than the student's last step.
        given = batch.given_frames, batch.given_columns
        own = [t.masked_fill(part, 0).amax(1) for t, part in zip((batch.t_video, batch.t_audio), given, strict=True)]
        whole = [part.all(1) for part in given]  # nothing of it moves: it goes with the other one
        times = own[0].where(~whole[0], own[1]), own[1].where(~whole[1], own[0])
        starts, substeps, grid, alphas = (
            told.to(batch.video.device) for told in (self.starts, self.substeps, self.grid, self.alphas)
        )
        places = [(starts.unsqueeze(0) == time.unsqueeze(1)).int().argmax(1) for time in times]
        counts = [substeps[place] for place in places]
        most = torch.maximum(*counts)
        state = [batch.video, batch.audio]
        for k in range(int(most.max())):
            rows = most > k
            part, at = batch.rows(rows), [place[rows] for place in places]
            now = [x[rows] for x in state]
            done = (at[0] + (k / counts[0][rows]).clamp(max=1)) / len(starts)  # of the picture, as the pipeline counts
            predicted = self.guided(part, now, [grid[place, k].clamp(min=0) for place in at], done)
            for i, (x, v, fixed) in enumerate(zip(now, predicted, (part.given_video, part.given_audio), strict=True)):
                # One that is there before the other stays: its last alphas are the same.
                (a, s), (a_new, s_new) = (scales(alphas[at[i], k + j], x) for j in (0, 1))
                moved = a_new * (a * x - s * v) + s_new * (s * x + a * v)
                state[i] = state[i].index_put((rows,), torch.where(fixed, x, moved))
        out = []
        for start, end, place in zip((batch.video, batch.audio), state, places, strict=True):
            (a, s), (a_new, s_new) = (scales(alphas[place, k], start) for k in (0, -1))
            clean = (end * s - start * s_new) / (a_new * s - a * s_new)  # of the one step from start to end
            out.append((a * start - clean) / s)
        return out[0], out[1]

    def guided(self, batch: ClipBatch, state: list[Tensor], now: Sequence[Tensor], done: Tensor) -> list[Tensor]:
        """The teacher's velocities of picture and sound at ``now`` (B,) each.

        They are guided as the pipeline is after ``done`` (B,) of its steps.
        """
        times = zip((batch.given_frames, batch.given_columns), (batch.t_video, batch.t_audio), now, strict=True)
        t_video, t_audio = (t.where(given, time.unsqueeze(1)) for given, t, time in times)
        wanted = [v.float() for v in self.model(*state, t_video, t_audio, batch.labels)]
        if self.guidance == self.joint == 1:
            return wanted
        late, single = done >= self.start, done >= self.temporal_start
        frames = batch.given_frames.sum(1)
        in_part = (frames > 0) & (frames < batch.given_frames.shape[1])
        from_first = in_part & self.from_first
        inputs = (*state, t_video, t_audio, torch.where(late | from_first, self.empty, batch.labels))
        others, guided = [v.clone() for v in wanted], done < self.end
        together = ~from_first & ~single
        kinds = (from_first, True, self.blind), (together, True, ()), (~from_first & single, False, ())
        for rows, temporal, blind in kinds:
            rows = rows & guided
            if rows.any():
                found = self.model(*(part[rows] for part in inputs), joint=False, temporal=temporal, blind=blind)
                for other, v in zip(others, found, strict=True):
                    other[rows] = v.float()
        # Else a picture that is given in part is guided less, as in the pipeline.
        picture = 1 + torch.where(in_part & ~from_first, self.given, 1.0) * (self.guidance - 1)
        scales = (torch.where(late | single, alone, self.joint) for alone in (picture, self.guidance))
        return [
            w + scale.view(-1, *(1,) * (v.ndim - 1)) * (v - w)
            for scale, v, w in zip(scales, wanted, others, strict=True)
        ]


def fast(master: AVDiT, trainer: Trainer) -> nn.Module | FoldedAVDiT:
    """What computes the predictions of the frozen ``master`` fastest on the trainer's device, in its precision."""
    master = master.to(trainer.accelerator.device)
    precision = trainer.accelerator.mixed_precision
    if can_fold(master) and precision != "fp16":
        return FoldedAVDiT(master, torch.bfloat16 if precision == "bf16" else torch.float32)
    if trainer.config.compile:
        master.compile_blocks()
    return master


def scales(alpha: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of signal and noise for cumulative ``alpha`` (B,), shaped to broadcast over ``like`` (B, ...)."""
    alpha = alpha.view(-1, *(1,) * (like.ndim - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()


def run(config: dict, out: Path, resume: bool = False, dry_run: bool = False) -> dict[str, Any] | None:
    """Distil the adapters of a pipeline into ``out``/pack; a dry run says what that would cost.

    Raises:
        ValueError: for a pipeline that cannot be distilled, a student's pack that does not fit, steps that are not a
            whole number from 1 to 1000, an ``eta``, ``distilled_eta`` or ``audio_lag`` that is not from 0 to 1, or an
            adversary's weight that is not from 0 to 10.
    """
    config = {**DEFAULTS, **config}
    for name in ("steps", "substeps", "early_substeps"):
        whole(config[name], name, 1, 1000)
    if config["distilled_eta"] is None:
        config["distilled_eta"] = config["eta"]
    for name in ("eta", "distilled_eta", "audio_lag"):
        between(config[name], name, 0, 1)
    between(config["adversarial_weight"], "adversarial_weight", 0, 10)
    steps = config["steps"]
    substeps = [config["early_substeps"]] * (steps // 2) + [config["substeps"]] * (steps - steps // 2)
    config, classes, scheduler = from_pipeline(config)
    settings = trainer_config({**DEFAULTS["train"], **config.get("train", {})})
    geometry = geometry_of(config)
    data = training_data(config, out, geometry, classes, dry_run)
    held_out = held_out_data(config, out, data, settings.check_every)
    data = data.repeated(config["class_repeats"])
    torch.manual_seed(settings.seed)
    model = AVDiT.from_pretrained(config["start"])
    model.freeze_backbone()
    master = copy.deepcopy(model, {id(model.backbone): model.backbone}).requires_grad_(False)
    if config["student"]:
        pack = Pack.load(Path(config["student"]), lambda _: master.adapter_state_dict())
        if pack.classes != data.classes:
            raise ValueError(f"student {config['student']} has other classes than the pipeline")
        model.load_adapter_state_dict(pack.state)
    model.class_embedder.requires_grad_(config["class_table"])

    def loss(data: TrainingData, module: nn.Module, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        batch = replace(batches, data=data).draw(generator)
        if config["audio_lag"]:
            lag = torch.full((len(batch.labels),), config["audio_lag"], device=batch.video.device)
            batch = batch.behind(diffusion.alphas, lag, teacher.starts.to(lag.device))
        with trainer.accelerator.autocast():
            video_target, audio_target = teacher.targets(batch)
        video, audio = module(*batch.inputs)
        terms = {"video": batch.video_error(video, video_target), "audio": batch.audio_error(audio, audio_target)}
        told = {name: term.detach() for name, term in terms.items()}
        total = terms["video"] + terms["audio"]
        if trainer.beside is None or not torch.is_grad_enabled():
            return {"loss": total, **told}
        return {**told, **trainer.beside(batch, video, audio, total, generator, step)}

    def sheet(path: Path) -> None:
        unguided = {"guidance_scale": 1.0, "joint_guidance_scale": 1.0}
        unguided |= {name: config[name] for name in ("eta", "audio_lag")}
        sample_sheet(model, data, scheduler, config, path, num_inference_steps=steps, **unguided)

    checked = partial(loss, held_out) if held_out else None
    trainer = Trainer(model, partial(loss, data), settings, out, sheet, held_out=checked)
    if config["adversarial_weight"]:
        trainer.beside = ClipAdversary(
            trainer,
            Discriminator(geometry, len(data.classes)),
            scheduler.alphas_cumprod,
            config["adversarial_weight"],
            ADVERSARY_WARMUP,
        )
    teacher = Teacher(
        fast(master, trainer),
        scheduler,
        substeps,
        config["guidance"],
        config["guidance_start"],
        config["guidance_end"],
        config["joint_guidance"],
        config["temporal_guidance_start"],
        config["given_guidance"],
        config["factorized"] and not config["eventful"],
        len(data.classes),
        config["distilled_eta"],
        middle_blocks(len(model.backbone.blocks)),
    )
    diffusion = Diffusion(scheduler, trainer.accelerator.device)
    batches = ClipBatches.configured(
        config,
        data,
        diffusion,
        trainer,
        dropout=0.0,
        timesteps=partial(timesteps_of, teacher.starts),
        shared_noise=model.config.shared_noise,
    )
    if dry_run:
        return {"data": data.told, **trainer.dry_run()}
    trainer.run(resume)
    if trainer.accelerator.is_main_process:
        state = {name: value.to(torch.bfloat16) for name, value in model.adapter_state_dict().items()}
        told = {name: config[name] for name in ("eta", "audio_lag")} | first_frames(config)
        Pack(data.classes, state, steps, **told).save(Path(out) / "pack")
    return None
