"""Sound of a stream that reaches the browser together with its picture, however busy the machine is."""

import time

import gradio.components.video
from gradio.audio_stream_encoder import AAC_FRAME_SAMPLES, AacStreamEncoder

PATIENCE = 5.0  # seconds for the sound of one piece
HELD_BACK = 2  # frames that an encoder may keep until more samples come


class PatientEncoder(AacStreamEncoder):
    """Gradio's encoder of a stream's sound, which hands out all that it was fed.

    Gradio waits 5 ms. On a busy machine a piece would go out with its picture and little of its sound, which would
    follow with the next piece; and the player, which plays as far as it has both, would wait in the middle of it.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self._samples = self._taken = 0

    def feed(self, pcm: bytes) -> None:
        """Encode signed 16-bit samples."""
        self._samples += len(pcm) // (2 * self.channels)
        super().feed(pcm)

    def take(self, timeout: float | None = None) -> list[bytes]:
        """The frames that are done; unless ``timeout`` says otherwise, those of all samples so far but the last few."""
        frames: list[bytes] = []
        due = self._samples * self.output_rate // (self.sample_rate * AAC_FRAME_SAMPLES) - HELD_BACK
        deadline = time.monotonic() + PATIENCE
        while timeout is None and self._taken + len(frames) < due and (left := deadline - time.monotonic()) > 0:
            if not (more := super().take(left)):  # it has ended, or takes too long
                break
            frames += more
        frames += super().take(timeout)
        self._taken += len(frames)
        return frames


def use_patient_encoder() -> None:
    """Let gradio's streamed videos be encoded by it."""
    gradio.components.video.AacStreamEncoder = PatientEncoder
