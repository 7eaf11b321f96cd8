"""One call, one clip: sampling of picture and sound together as a diffusers pipeline."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from avdit.conditions import Array, ConditionMixin, middle_blocks
from avdit.geometry import ClipGeometry
from avdit.models.audio_codec import AudioCodec
from avdit.models.avdit import AVDiT, Seen
from avdit.models.config import PortableConfig
from avdit.models.inference import FoldedAVDiT, can_fold
from avdit.models.noise import draw_noise
from avdit.models.video_codec import VideoCodec
from avdit.packs import PackMixin

GIVEN_GUIDANCE = 0.0  # share of what guidance adds that a picture keeps of which a part is given
GUIDANCE_END = 0.5  # share of the steps that are guided: in the others guidance adds contrast and costs time
ETA = 0.7  # new noise of a step; in what follows a first frame all of it is new (docs/trials.md, thirty-third run)
ETA_FROM_FIRST = 1.0
SAMPLERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


@dataclass
class AVDiTPipelineOutput(BaseOutput):
    """``frames`` (B, F, H, W, 3) in [0, 1] and ``audio`` (B, samples), or latents of both, with their rates."""

    frames: Array
    audio: Array
    fps: int
    sampling_rate: int


class AVDiTPipeline(PackMixin, ConditionMixin, PortableConfig, DiffusionPipeline):
    """Joint generation of video and audio, and each from the other.

    Args:
        factorized: Whether the adapters that the model was made with are for clips whose first frame is made alone.
            Further packs say so themselves, and so with:
        image_steps: Steps without guidance that were distilled into its updates for images; None: none were.
        eventful: Whether what follows a first frame is guided as where none is given: that settles when something
            happens, where else guidance would hold bodies together.
        audio_lag: Share of the steps by which their sound stays behind the picture.

    Example:
        >>> pipe = AVDiTPipeline.from_pretrained("checkpoints/avdit-xs")
        >>> out = pipe("thunder", num_inference_steps=12, generator=torch.Generator().manual_seed(7))
        >>> out.frames.shape, out.audio.shape
        ((1, 16, 256, 256, 3), (1, 25600))
    """

    model_cpu_offload_seq = "transformer->video_codec->audio_codec"
    _callback_tensor_inputs = ["video_latents", "audio_latents", "video_estimate"]

    def __init__(
        self,
        transformer: AVDiT,
        video_codec: VideoCodec,
        audio_codec: AudioCodec,
        scheduler: DDIMScheduler,
        classes: list[str] | None = None,
        pack: str = "own",
        factorized: bool = False,
        image_steps: int | None = None,
        eventful: bool = False,
        audio_lag: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, video_codec=video_codec, audio_codec=audio_codec, scheduler=scheduler
        )
        classes = list(classes or [str(i) for i in range(transformer.config.num_classes)])
        facts = {"factorized": factorized, "image_steps": image_steps, "eventful": eventful, "audio_lag": audio_lag}
        self.register_to_config(classes=classes, pack=pack, **facts)
        self.set_first_pack(pack, classes, **facts)
        self._folded: tuple[list, FoldedAVDiT] | None = None  # the weights that it was made from, and it
        self._num_timesteps = 0

    @property
    def geometry(self) -> ClipGeometry:
        return self.transformer.clip

    @property
    def num_timesteps(self) -> int:
        """Steps of the present or the last call, those included in which the picture waits for the sound."""
        return self._num_timesteps

    def set_sampler(self, name: str) -> None:
        """Choose the sampler: ``ddim``, ``dpm++`` (DPM-Solver++ 2M) or ``unipc``.

        Raises:
            ValueError: for another name.
        """
        if name not in SAMPLERS:
            raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
        kind = SAMPLERS[name]
        if type(self.scheduler) is not kind:
            self.scheduler = kind.from_config(self.scheduler.config)

    def check_inputs(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int,
        shares: dict[str, float],
        output_type: str,
        given_latents: tuple[Tensor, Tensor] | None,
        video: Array | None,
        audio: Array | None,
        image: Array | None,
        callback_tensors: Sequence[str],
    ) -> None:
        """Raise ``ValueError`` with one clear sentence for what cannot be sampled."""
        count = len(self.classes)
        if not class_labels:
            raise ValueError("no class was given: name at least one")
        for label in class_labels:
            if not 0 <= label <= count:
                raise ValueError(f"class {label} does not exist: choose 0 to {count - 1}, or {count} for none")
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} = {share!r} must be from 0 to 1")
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps = {num_inference_steps!r} must be a whole number from 1 to 1000")
        if output_type not in ("np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} must be 'np', 'pt' or 'latent'")
        if sum(part is not None for part in (video, audio, image, given_latents)) > 1:
            raise ValueError("give one of video, audio, image and given_latents")
        for name in callback_tensors:
            if name not in self._callback_tensor_inputs:
                raise ValueError(f"callback tensor {name!r} must be one of {', '.join(self._callback_tensor_inputs)}")

    def check_turbo(self, labels: Sequence[int]) -> int:
        """Steps of the turbo adapters for the classes ``labels``.

        Raises:
            ValueError: where there are none, or another sampler than theirs is set.
        """
        steps = self.turbo_steps(labels)
        if steps is None:
            raise ValueError(f"there are no turbo adapters for {self.pack_of(labels)[0]}: leave turbo out")
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError("turbo adapters need the sampler ddim")
        return steps

    def denoiser(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What predicts while sampling: the transformer, or on a CPU its folded form, anew when the weights change."""
        if not can_fold(self.transformer):
            return self.transformer
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.transformer.dtype
        weights = [dtype, *((id(p), p.data_ptr(), p._version) for p in self.transformer.parameters())]
        if self._folded is None or self._folded[0] != weights:
            self._folded = weights, FoldedAVDiT(self.transformer, dtype)
        return self._folded[1]

    def prepare_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> tuple[Tensor, Tensor]:
        """Noise for picture (B, F, C, h, w) and sound (B, C, T, f), drawn on the CPU, clip by clip.

        Raises:
            ValueError: where there are several generators but not one a clip.
        """
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators were given for {batch} clips: give one a clip, or one")
        generators = generator if isinstance(generator, list) else [generator] * batch
        drawn = [draw_noise(self.geometry, self.transformer.config.shared_noise, g) for g in generators]
        return torch.stack([v for v, _ in drawn]), torch.stack([a for _, a in drawn])

    def clean_estimate(self, predicted: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """What the model's output ``predicted`` at timestep ``t`` takes the finished latents for.

        ``predicted`` and ``latents`` have one shape, and so has what is returned.
        """
        alpha = self.scheduler.alphas_cumprod[t]
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        if self.scheduler.config.prediction_type == "v_prediction":
            return a * latents - s * predicted
        return (latents - s * predicted) / a

    @torch.no_grad()
    def decode(
        self, video_latents: Tensor | None, audio_latents: Tensor | None, output_type: str = "np"
    ) -> tuple[Array | None, Array | None]:
        """Latents to frames (B, F, H, W, 3) in [0, 1] and audio (B, samples); None to None."""
        frames = audio = None
        if video_latents is not None:
            frames = self.video_codec.decode(video_latents.to(self.video_codec.dtype)).permute(0, 1, 3, 4, 2) / 2 + 0.5
        if audio_latents is not None:
            audio = self.audio_codec.decode(audio_latents.to(self.audio_codec.dtype))
        if output_type == "pt":
            return frames, audio
        return tuple(None if part is None else part.float().cpu().numpy() for part in (frames, audio))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int],
        num_inference_steps: int = 12,
        guidance_scale: float = 2.0,
        audio_guidance_scale: float | None = None,
        guidance_start: float = 0.25,
        guidance_end: float = GUIDANCE_END,
        joint_guidance_scale: float = 5.0,
        temporal_guidance_start: float = 0.25,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        video: Array | None = None,
        audio: Array | None = None,
        image: Array | None = None,
        given_latents: tuple[Tensor, Tensor] | None = None,
        context_noise: float = 0.0,
        given_guidance: float = GIVEN_GUIDANCE,
        latents: tuple[Tensor, Tensor] | None = None,
        turbo: bool = False,
        audio_lag: float | None = None,
        factorized: bool | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("video_latents", "audio_latents"),
    ) -> AVDiTPipelineOutput | tuple[Array, Array]:
        """Make one clip for every class given.

        Args:
            class_labels: Name or index, or several.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Guidance of the picture after the first steps; 1 is none.
            audio_guidance_scale: That of the sound; as the picture's where it is left out.
            guidance_start: Share of the steps after which guidance leads away from any class. At high noise that costs
                variety (Kynkäänniemi et al. 2024, arXiv 2404.07724): rare moments, such as lightning, and their
                synchrony. It leads what factorized adapters make from a first frame or from the window before, which
                settle these, from the start; and there away from blind middle blocks, too (see
                :func:`avdit.conditions.middle_blocks`), so that a body that moves stays one body.
            guidance_end: Share of the steps after which nothing is guided, as what a clip shows is settled then: an
                interval, as in that paper, which saves the second look at each of those steps.
            joint_guidance_scale: Guidance of picture and sound by each other in the first steps, away from what each
                would be alone; 1 is none. It is there that the moment of an event is settled.
            temporal_guidance_start: Share of the steps after which guidance leads away from single images, too, as
                they would be without temporal attention, so that frames hold together (after the skipped layers of
                Hyung et al. 2024, arXiv 2411.18664). Before, it would hold events up.
            eta: Noise that each step adds anew, as the share of DDPM's (Song et al. 2021, arXiv 2010.02502, eq. 16): it
                washes out errors of the steps before. 0 is none; of the samplers ``ddim`` alone has it. Left out: 0.7,
                and 1 where factorized adapters make all that follows a first frame, whose looks stay with any noise.
            generator: CPU generator, or one a clip; the same seed gives the same clip alone or in a batch.
            video: Frames (F, H, W, 3) in [0, 1] that are given: their sound is made.
            audio: Samples (n,) that are given: their picture is made.
            image: First frame (H, W, 3) in [0, 1].
            given_latents: Continue: clean latents (B, n, C, h, w) of the first frames and (B, C, t, f) of their sound,
                such as the last ones of the clip before; of sound, whole audio columns are used.
            context_noise: Noise, as a share of the schedule, in which ``given_latents`` are shown to the model, so that
                it does not take over their faults; what is returned holds them as they were given.
            given_guidance: Share of what ``guidance_scale`` adds that stays for a picture of which a part is given: the
                first frame, or what is continued. That settles most of what guidance would, which beside it adds
                contrast, window by window. Guidance of picture and sound by each other stays: without it, events of
                later windows fall apart. Factorized adapters, whose windows keep their contrast, keep it all.
            latents: Noise of picture and sound, in place of drawing it.
            turbo: Use the pack's turbo adapters: their own few steps and ``eta``, no guidance, the sampler ``ddim``.
            audio_lag: Share of the steps by which the sound stays behind the picture, as noisy as that was then: when
                something is heard is settled in the first steps, in which a picture tells little yet. The picture, once
                done, waits for it, so that there are as many steps more; where either is given, nothing waits. Adapters
                should have learned it (training/lag.py). Left out: as these did.
            factorized: Where no picture is given, make the first frame alone, as an image of the frozen backbone, and
                all else from it (Girdhar et al. 2023, arXiv 2311.10709): what moves keeps its looks. Left out: as the
                pack was trained.
            output_type: ``np``, ``pt`` or ``latent``.
            callback_on_step_end: Called as diffusers calls it; what it returns replaces the latents.
            callback_on_step_end_tensor_inputs: What it is given: the latents, and ``video_estimate``, what the step
                takes the finished ones of the picture for.

        Raises:
            ValueError: with a sentence that says what is wrong, before anything is sampled.
        """
        # 1. Check what was asked for.
        labels = self.label_ids(class_labels)
        self.check_inputs(
            labels,
            num_inference_steps,
            {
                "guidance_start": guidance_start,
                "guidance_end": guidance_end,
                "temporal_guidance_start": temporal_guidance_start,
                "context_noise": context_noise,
                "given_guidance": given_guidance,
                "eta": eta or 0.0,
                "audio_lag": audio_lag or 0.0,
            },
            output_type,
            given_latents,
            video,
            audio,
            image,
            callback_on_step_end_tensor_inputs,
        )
        if turbo:
            num_inference_steps = self.check_turbo(labels)
            guidance_scale = audio_guidance_scale = joint_guidance_scale = 1.0
        pack, labels = self.pack_of(labels)
        if turbo:
            pack = self.turbo_pack(pack)
            eta = self._packs[pack].eta
        self.use_pack(pack)
        device, dtype, batch = self._execution_device, self.transformer.dtype, len(labels)
        audio_guidance_scale = guidance_scale if audio_guidance_scale is None else audio_guidance_scale

        # 2. Draw the noise and encode what is given.
        video_latents, audio_latents = latents or self.prepare_latents(batch, generator)
        clip = self.geometry
        for name, part, wanted in (
            ("picture", video_latents, (batch, clip.frames, *clip.video_latent_shape)),
            ("sound", audio_latents, (batch, *clip.audio_latent_shape)),
        ):
            if tuple(part.shape) != wanted:
                raise ValueError(f"the latents of the {name} are {tuple(part.shape)}; they must be {wanted}")
        # Latents stay in 32-bit floats whatever the networks compute in: small steps must not be rounded away.
        video_latents, audio_latents = video_latents.to(device).float(), audio_latents.to(device).float()
        clean_video, clean_audio, frames, columns = self.encode_conditions(video, audio, image, given_latents, batch)
        class_ids = torch.tensor(labels, device=device)
        factorized = self.factorized if factorized is None else factorized
        if factorized and clean_video is None:
            clean_video = torch.zeros_like(video_latents)
            clean_video[:, :1] = self.first_frame(class_ids, generator)
            frames[0] = True
        in_part = bool(frames.any()) and not bool(frames.all())
        # Of these what is given has settled what varies, so that guidance by the class costs none of it.
        from_first = factorized and in_part and not self.eventful
        if eta is None:
            eta = ETA_FROM_FIRST if from_first else ETA
        if in_part and not from_first:
            guidance_scale = 1 + given_guidance * (guidance_scale - 1)
        keep_video = frames.view(1, -1, 1, 1, 1)
        keep_audio = columns.repeat_interleave(self.geometry.audio_patch[0]).view(1, 1, -1, 1)

        def given(
            video_latents: Tensor, audio_latents: Tensor, video: Tensor | None, audio: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            if video is not None:
                video_latents = torch.where(keep_video, video, video_latents)
            if audio is not None:
                audio_latents = torch.where(keep_audio, audio, audio_latents)
            return video_latents, audio_latents

        context = 0
        shown = clean_video, clean_audio
        if given_latents is not None and context_noise:
            context = round(context_noise * (len(self.scheduler.alphas_cumprod) - 1))
            alpha = self.scheduler.alphas_cumprod[context]
            shown = tuple(
                alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
                for clean, noise in ((clean_video, video_latents), (clean_audio, audio_latents))
            )
        video_latents, audio_latents = given(video_latents, audio_latents, *shown)

        # 3. Prepare the timesteps; multistep samplers keep a history, so each modality has its own.
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        audio_scheduler = copy.deepcopy(self.scheduler)
        no_class = torch.full_like(class_ids, self.transformer.config.num_classes)
        share = self._packs[pack].audio_lag if audio_lag is None else audio_lag
        picture_given = bool(frames.all())
        lag = 0 if picture_given or columns.all() else round(share * num_inference_steps)

        # 4. Denoise.
        denoiser, times = self.denoiser(), self.scheduler.timesteps
        seen: Seen | None = None  # what sound is told of a picture that is done, kept from the first look at it

        def look(*state: Any, **how: Any) -> list[Any]:
            return [out.float() if isinstance(out, Tensor) else out for out in denoiser(*state, **how)]

        blind = middle_blocks(len(self.transformer.backbone.blocks)) if from_first else ()
        self._num_timesteps = num_inference_steps + lag
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i in range(self._num_timesteps):
                done = picture_given or i >= num_inference_steps  # with the picture
                t, t_audio = torch.zeros_like(times[0]) if done else times[i], times[max(i - lag, 0)]
                late, single = (i >= start * num_inference_steps for start in (guidance_start, temporal_guidance_start))
                scales = (guidance_scale, audio_guidance_scale) if late or single else (joint_guidance_scale,) * 2
                if i >= guidance_end * num_inference_steps:
                    scales = (1, 1)
                state = (
                    video_latents.to(dtype),
                    audio_latents.to(dtype),
                    t.expand(batch, len(frames)).masked_fill(frames, context),
                    t_audio.expand(batch, len(columns)).masked_fill(columns, context),
                )
                sound_alone = None, state[1], None, state[3]
                if not done:
                    video_out, audio_out = look(*state, class_ids)
                elif seen is None:
                    video_out, audio_out, seen = look(*state, class_ids, keep=True)
                else:
                    video_out, audio_out = look(*sound_alone, class_ids, seen=seen)
                if scales != (1, 1):
                    # What guidance leads away from knows ever less: nothing of the other modality, then nothing of
                    # the other frames, at last nothing of the class. From a first frame on it knows that frame
                    # throughout, as it must move from there, never the class, and its picture does not hang together.
                    known = no_class if late or from_first else class_ids
                    away = sound_alone if done else state
                    others = look(*away, known, joint=False, temporal=from_first or not single, blind=blind)
                    video_out, audio_out = (
                        out if other is None else other + scale * (out - other)
                        for scale, out, other in zip(scales, (video_out, audio_out), others, strict=True)
                    )
                video_estimate = video_latents if done else self.clean_estimate(video_out, t, video_latents)
                video_estimate, _ = given(video_estimate, audio_latents, clean_video, None)
                fresh: list[dict[str, Any]] = [{}, {}]
                if eta and isinstance(self.scheduler, DDIMScheduler):
                    drawn = self.prepare_latents(batch, generator)  # as frames share it with each other
                    # At 1 from pure noise the scheduler takes a root of nought, which rounding can make negative.
                    fresh = [{"eta": min(eta, 0.999), "variance_noise": noise.to(device)} for noise in drawn]
                if not done:
                    video_latents = self.scheduler.step(video_out, t, video_latents, return_dict=False, **fresh[0])[0]
                if i >= lag:
                    audio_latents = audio_scheduler.step(
                        audio_out, t_audio, audio_latents, return_dict=False, **fresh[1]
                    )[0]
                video_latents, audio_latents = given(video_latents, audio_latents, *shown)
                if callback_on_step_end is not None:
                    tensors = {
                        "video_latents": video_latents,
                        "audio_latents": audio_latents,
                        "video_estimate": video_estimate,
                    }
                    asked = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, int(t_audio if done else t), asked) or {}
                    if changed.get("video_latents", video_latents) is not video_latents:
                        seen = None  # was another picture
                    video_latents = changed.pop("video_latents", video_latents)
                    audio_latents = changed.pop("audio_latents", audio_latents)
                bar.update()

        # 5. Decode.
        video_latents, audio_latents = given(video_latents, audio_latents, clean_video, clean_audio)
        if output_type == "latent":
            frames_out, audio_out = video_latents, audio_latents
        else:
            frames_out, audio_out = self.decode(video_latents, audio_latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return frames_out, audio_out
        return AVDiTPipelineOutput(frames_out, audio_out, self.geometry.fps, self.geometry.sampling_rate)
