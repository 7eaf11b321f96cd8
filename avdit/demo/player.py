"""The player of a stream, which is sent the segments as the service makes them."""

import gradio as gr
from gradio.data_classes import FileDataDict, MediaStreamChunk

from avdit.demo.service import Chunk


class LiveVideo(gr.Video):
    """``gr.Video`` for chunks that are ready to be sent.

    Gradio's own takes each piece apart with ffprobe and ffmpeg, encodes its sound, and puts it together again: three
    programs a piece, for pieces of any origin. Ours follow on each other already.
    """

    is_template = True  # in the browser it is its parent

    async def stream_output(
        self, value: Chunk | None, output_id: str, first_chunk: bool
    ) -> tuple[MediaStreamChunk | None, FileDataDict]:
        """The next segment, and where the browser finds the playlist."""
        playlist: FileDataDict = {
            "path": output_id,
            "is_stream": True,
            "orig_name": "video-stream.mp4",
            "meta": {"_type": "gradio.FileData"},
        }
        if value is None:  # nothing new
            return None, playlist
        return {"data": value.video.read_bytes(), "duration": value.length, "extension": ".ts"}, playlist
