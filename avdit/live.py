"""One encoder of picture and of sound that live as long as a stream, whose segments follow on each other."""

import io
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType

from avdit.media import AAC_BITS, MediaError, audio_frame, video_frames

BEGIN = Fraction(1)  # seconds on the segments' clock at which a stream begins; the encoder's lead-in comes before it
# Each picture comes out as it goes in: nothing waits for the next one.
H264 = {"preset": "superfast", "tune": "zerolatency", "crf": "18"}


class LiveEncoder:
    """Encodes a stream piece after piece into MPEG-TS segments of H.264 and AAC, which players take as HLS.

    Joined end to end the segments are one file. The timestamps go on from segment to segment, every one begins with a
    key frame, and the sound is coded without a break: an AAC frame sounds right only beside its neighbours. Of the
    sound, up to three of its frames (0.19 s at 16 kHz) follow with the next segment.

    Args:
        fps: Frames a second.
        height: Of a frame, even; so is ``width``.
        sampling_rate: Of the sound, one that AAC knows.
    """

    def __init__(self, *, fps: int, height: int, width: int, sampling_rate: int) -> None:
        self.fps, self.sampling_rate = fps, sampling_rate
        self._picture = picture = av.CodecContext.create("libx264", "w")
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        picture.framerate, picture.time_base = Fraction(fps), Fraction(1, fps)
        picture.options = H264
        picture.thread_count = 1  # more only wait for each other at this size
        self._sound = sound = av.CodecContext.create("aac", "w")
        sound.sample_rate, sound.layout, sound.format, sound.bit_rate = sampling_rate, "mono", "fltp", AAC_BITS
        sound.time_base = Fraction(1, sampling_rate)
        self._frames = self._samples = 0  # taken so far

    def segment(self, frames: np.ndarray, audio: np.ndarray, last: bool = False) -> bytes:
        """The next segment.

        Args:
            frames: (F, H, W, 3) in [0, 1].
            audio: (samples,) in [-1, 1], as long as the picture.
            last: Nothing follows, so the rest of the sound comes, too.

        Raises:
            MediaError: where there are values that are no numbers.
        """
        if not (np.isfinite(frames).all() and np.isfinite(audio).all()):
            raise MediaError("the stream holds values that are not finite numbers")
        packets = self._picture_packets(frames) + self._sound_packets(audio, last)
        file = io.BytesIO()
        # Each segment has a muxer of its own, whose packet counters begin anew: the flag says so to players.
        with av.open(file, "w", format="mpegts", options={"mpegts_flags": "initial_discontinuity"}) as segment:
            streams = {
                "video": segment.add_mux_stream(
                    "h264", self.fps, width=self._picture.width, height=self._picture.height
                ),
                # An encoder in name only: from its settings the muxer knows the header of each frame.
                "audio": segment.add_stream("aac", self.sampling_rate, layout="mono"),
            }
            for kind, packet in packets:
                packet.stream = streams[kind]
                packet.pts = packet.dts = packet.pts + round(BEGIN / packet.time_base)
            segment.mux(packet for _, packet in sorted(packets, key=lambda pair: pair[1].dts * pair[1].time_base))
        return file.getvalue()

    def _picture_packets(self, frames: np.ndarray) -> list[tuple[str, av.Packet]]:
        packets = []
        for number, frame in enumerate(video_frames(frames, self.fps, self._frames)):
            if number == 0:
                frame.pict_type = PictureType.I
            packets += self._picture.encode(frame)
        self._frames += len(frames)
        return [("video", packet) for packet in packets]

    def _sound_packets(self, audio: np.ndarray, last: bool) -> list[tuple[str, av.Packet]]:
        # The encoder keeps what does not fill a frame of AAC yet.
        packets = self._sound.encode(audio_frame(audio, self.sampling_rate, self._samples))
        packets += self._sound.encode(None) if last else []
        self._samples += len(audio)
        return [("audio", packet) for packet in packets]
