"""Every length of the project follows from one :class:`ClipGeometry`.

Seconds, frames, samples, mel frames, latent sizes and token counts are all derived here, so that
no other module multiplies a rate by a duration on its own.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ClipGeometry:
    """Sizes of one clip and of its latents. The defaults are those of ``avdit-xs``.

    Raises:
        ValueError: where a size is not a multiple of the factor or patch that divides it.
    """

    frames: int = 16
    fps: int = 10
    height: int = 256
    width: int = 256
    sampling_rate: int = 16000  # Hz
    hop_length: int = 160  # samples a mel frame
    mel_bins: int = 64
    video_factor: int = 16  # pixels a latent cell, each way
    video_channels: int = 16
    video_patch: int = 2  # latent cells a token, each way
    audio_factor: int = 4  # mel cells a latent cell, in time and in frequency
    audio_channels: int = 8
    audio_patch: tuple[int, int] = (2, 4)  # latent cells a token: (time, frequency)

    def __post_init__(self) -> None:
        object.__setattr__(self, "audio_patch", tuple(self.audio_patch))
        for name, value, divisor in (
            ("height", self.height, self.video_factor * self.video_patch),
            ("width", self.width, self.video_factor * self.video_patch),
            ("frames x sampling_rate", self.frames * self.sampling_rate, self.fps * self.hop_length),
            ("mel_frames", self.mel_frames, self.audio_factor * self.audio_patch[0]),
            ("mel_bins", self.mel_bins, self.audio_factor * self.audio_patch[1]),
        ):
            if value % divisor:
                raise ValueError(f"{name} = {value} must be a multiple of {divisor}")

    @classmethod
    def xl(cls) -> "ClipGeometry":
        """The paper's sizes: SD VAE (factor 8, 4 channels), 256 tokens a frame, 160 audio tokens."""
        return cls(video_factor=8, video_channels=4, audio_patch=(2, 2))

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    @property
    def samples(self) -> int:
        return self.samples_of(self.frames)

    @property
    def mel_frames(self) -> int:
        return self.samples // self.hop_length

    @property
    def video_latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame."""
        return self.video_channels, self.height // self.video_factor, self.width // self.video_factor

    @property
    def audio_latent_shape(self) -> tuple[int, int, int]:
        """(C, time, frequency) of one clip's sound."""
        return self.audio_channels, self.mel_frames // self.audio_factor, self.mel_bins // self.audio_factor

    @property
    def video_grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens in a frame."""
        _, height, width = self.video_latent_shape
        return height // self.video_patch, width // self.video_patch

    @property
    def audio_grid(self) -> tuple[int, int]:
        """(time, frequency) of audio tokens; the first is the number of audio columns."""
        _, time, frequency = self.audio_latent_shape
        return time // self.audio_patch[0], frequency // self.audio_patch[1]

    @property
    def audio_columns(self) -> int:
        return self.audio_grid[0]

    @property
    def tokens_per_frame(self) -> int:
        return self.video_grid[0] * self.video_grid[1]

    @property
    def video_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def audio_tokens(self) -> int:
        return self.audio_grid[0] * self.audio_grid[1]

    def samples_of(self, frames: int) -> int:
        """Samples that sound while ``frames`` frames are shown."""
        return round(frames * self.sampling_rate / self.fps)

    def frames_of(self, seconds: float) -> int:
        """Frames that show ``seconds`` of a clip, at least one."""
        return max(1, round(seconds * self.fps))

    def columns_of(self, frames: int) -> int:
        """Whole audio columns that lie within the first ``frames`` frames."""
        return frames * self.audio_columns // self.frames

    def as_dict(self) -> dict:
        """The fields and what follows from them, for ``info --json``."""
        return {**asdict(self), "audio_patch": list(self.audio_patch), "samples": self.samples}
