"""What a clip is made from: picture, sound or latents that a user gives, or a first frame that is made alone."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from avdit.models.avdit import AVDiT

FIRST_FRAME_STEPS = 16  # of the first frame where it is made alone, each of which costs a sixteenth of a clip's
FIRST_FRAME_GUIDED = 0.5  # share of these steps with guidance; later it adds contrast alone
FIRST_FRAME_GUIDANCE = 4.0  # by the class there, which settles what the clip shows
FIRST_FRAME_WHOLE = 1.0  # guidance away from blind middle blocks, in whose pictures nothing hangs together: one body
FIRST_FRAME_RESCALE = 0.7  # share of the contrast that both add which is taken back
FEW_STEPS_RENEWED = 0.5  # share of few steps without guidance after which all noise is new, which settles one pose
FEW_STEPS_NOISE = 0.7  # new noise, as a share of its deviation, after the others: with more, what is faint is lost
Array = np.ndarray | Tensor


def middle_blocks(depth: int) -> range:
    """The two blocks in the middle of ``depth``: there places exchange what a picture shows, not how it looks.

    Where tokens see themselves alone in them, pictures come apart, and guidance away from that holds them together
    (Ahn et al. 2024, arXiv 2403.17377).
    """
    return range(max(depth // 2 - 1, 0), depth // 2 + 1)


def image_velocity(
    denoiser: Callable[..., tuple[Tensor, Tensor]],
    model: AVDiT,
    latents: Tensor,
    time: Tensor,
    class_ids: Tensor,
    guided: bool,
) -> Tensor:
    """What ``denoiser``, of ``model``, predicts for noised images alone (B, 1, C, h, w) at timesteps ``time`` (B, 1).

    Where it is ``guided``, that leads away from no class, and from blind middle blocks.
    """
    state = latents, None, time, None
    own = denoiser(*state, class_ids, joint=False, temporal=False)[0].float()
    if not guided:
        return own
    no_class, blind = torch.full_like(class_ids, model.config.num_classes), middle_blocks(len(model.backbone.blocks))
    none = denoiser(*state, no_class, joint=False, temporal=False)[0].float()
    apart = denoiser(*state, class_ids, joint=False, temporal=False, blind=blind)[0].float()
    led = none + FIRST_FRAME_GUIDANCE * (own - none) + FIRST_FRAME_WHOLE * (own - apart)
    # As Lin et al. 2023 (arXiv 2305.08891, section 3.4) do it: without this, colours come out too strong.
    contrast = own.std((2, 3, 4), keepdim=True) / led.std((2, 3, 4), keepdim=True)
    return led * torch.lerp(torch.ones_like(contrast), contrast, FIRST_FRAME_RESCALE)


class ConditionMixin:
    """How a pipeline comes by the latents that are given to its model clean."""

    def first_frame(self, class_ids: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Latents (B, 1, C, h, w) of an image of each class (B,), made alone, with the pack's updates for images."""
        if self.image_steps:
            return self.few_step_frame(class_ids, generator)
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(FIRST_FRAME_STEPS, device=class_ids.device)
        latents = self.prepare_latents(len(class_ids), generator)[0][:, :1].to(class_ids.device)
        denoiser, model = self.denoiser(), self.transformer
        for i, t in enumerate(scheduler.timesteps):
            state, time = latents.to(model.dtype), t.expand(len(latents), 1)
            guided = i < FIRST_FRAME_GUIDED * FIRST_FRAME_STEPS
            led = image_velocity(denoiser, model, state, time, class_ids, guided)
            latents = scheduler.step(led, t, latents, return_dict=False)[0]  # new noise makes it worse
        return latents

    def few_step_frame(self, class_ids: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """The same by updates that were taught few steps without guidance, between which noise is renewed."""
        scheduler, denoiser = DDIMScheduler.from_config(self.scheduler.config), self.denoiser()
        scheduler.set_timesteps(self.image_steps, device=class_ids.device)

        def noise() -> Tensor:
            return self.prepare_latents(len(class_ids), generator)[0][:, :1].to(class_ids.device)

        latents = old = noise()
        for i, t in enumerate(scheduler.timesteps):
            if i:
                share = 1.0 if i <= FEW_STEPS_RENEWED * self.image_steps else FEW_STEPS_NOISE
                kept = (1 - share**2) ** 0.5
                latents = scheduler.add_noise(latents, kept * old + share * noise(), t.expand(len(latents)))
            state, time = latents.to(self.transformer.dtype), t.expand(len(latents), 1)
            velocity = image_velocity(denoiser, self.transformer, state, time, class_ids, guided=False)
            clean, alpha = self.clean_estimate(velocity, t, latents), scheduler.alphas_cumprod[t]
            latents, old = clean, (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return latents

    @torch.no_grad()
    def encode_conditions(
        self,
        video: Array | None,
        audio: Array | None,
        image: Array | None,
        given_latents: tuple[Tensor, Tensor] | None,
        batch: int,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Clean latents (B, F, C, h, w) and (B, C, T, f) of what is given, None where nothing of a modality is.

        Returns:
            Both, and which frames (F,) and audio columns (M,) they cover.

        Raises:
            ValueError: for a part of the wrong number of axes, size or length.
        """
        clip, device = self.geometry, self._execution_device
        for name, part, axes in (("image", image, 3), ("video", video, 4), ("audio", audio, 1)):
            if part is not None and part.ndim != axes and not (part.ndim == axes + 1 and len(part) in (1, batch)):
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}: give {axes} axes, or one entry a clip before them"
                )
        frames = torch.zeros(clip.frames, dtype=torch.bool)
        columns = torch.zeros(clip.audio_columns, dtype=torch.bool)
        video_latents = audio_latents = None
        if image is not None:
            video = torch.as_tensor(image).unsqueeze(-4)
        if video is not None:
            pixels = torch.as_tensor(video, dtype=self.video_codec.dtype, device=device)
            pixels = pixels.unsqueeze(0) if pixels.ndim == 4 else pixels
            count = 1 if image is not None else clip.frames
            if pixels.shape[1] < count or tuple(pixels.shape[2:]) != (clip.height, clip.width, 3):
                raise ValueError(
                    f"the picture given is {tuple(pixels.shape[1:])}; it must be at least {count} frames of "
                    f"{clip.height} x {clip.width} x 3"
                )
            encoded = self.video_codec.encode(pixels[:, :count].permute(0, 1, 4, 2, 3) * 2 - 1)
            video_latents = torch.zeros(len(encoded), clip.frames, *clip.video_latent_shape, device=device)
            video_latents[:, :count] = encoded
            video_latents = video_latents.expand(batch, -1, -1, -1, -1)
            frames[:count] = True
        if audio is not None:
            sound = torch.as_tensor(audio, dtype=torch.float32, device=device)  # of 8 bits it would hiss
            sound = sound.unsqueeze(0) if sound.ndim == 1 else sound
            if sound.shape[1] < clip.samples:
                raise ValueError(f"the sound given has {sound.shape[1]} samples; it must have at least {clip.samples}")
            audio_latents = self.audio_codec.encode(sound[:, : clip.samples]).float().expand(batch, -1, -1, -1)
            columns[:] = True
        if given_latents is not None:
            picture, sound = given_latents
            count, steps = picture.shape[1], sound.shape[2]
            if not (0 < count < clip.frames and 0 < steps < clip.audio_latent_shape[1]):
                raise ValueError(
                    f"the latents given are of {count} frames and {steps} steps of sound; they must be at least 1 and "
                    f"fewer than the clip's {clip.frames} and {clip.audio_latent_shape[1]}"
                )
            video_latents = torch.zeros(batch, clip.frames, *clip.video_latent_shape, device=device)
            audio_latents = torch.zeros(batch, *clip.audio_latent_shape, device=device)
            video_latents[:, :count], audio_latents[:, :, :steps] = picture, sound
            frames[:count] = True
            columns[: steps // clip.audio_patch[0]] = True
        return video_latents, audio_latents, frames.to(device), columns.to(device)
