"""Start the demo page: ``python app.py [--share] [--host H] [--port P] [--device D] [--checkpoint DIR]``."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

MAX_UPLOAD = "500mb"


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"app.py: {message}\n")


def parse() -> argparse.Namespace:
    """What was asked for on the command line; ends the program with a sentence where that makes no sense."""
    parser = Parser(prog="app.py", description="The AV-DiT demo page.")
    parser.add_argument("--share", action="store_true", help="public link; so does GRADIO_SHARE=True")
    parser.add_argument("--host", default=None, help="address to listen on; this machine alone by default")
    parser.add_argument("--port", type=int, default=None, help="7860, or the next that is free, by default")
    parser.add_argument("--device", default=None, help="cpu (the default), cuda, …")
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="pipeline folder; checkpoints/avdit-xs by default"
    )
    args = parser.parse_args()
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port} must be from 1 to 65535")
    return args


def main() -> int:
    """Build the page and serve it; 2 where it cannot start."""
    args = parse()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported
    # Imported late, so that a wrong option is answered at once and not after the seconds that these take.
    from avdit.checkpoint import DEFAULT_CHECKPOINT
    from avdit.demo.looks import style_sheet, theme
    from avdit.demo.machine import mcp_installed, zero_gpu
    from avdit.demo.service import Service
    from avdit.demo.ui import create_demo
    from avdit.media import ensure_ffmpeg

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the visitors' files are removed then, too
    try:
        ensure_ffmpeg()
        with tempfile.TemporaryDirectory(prefix="avdit-gradio-", ignore_cleanup_errors=True) as cache:
            os.environ.setdefault("GRADIO_TEMP_DIR", cache)  # uploads and what is sent end with the server
            service = Service(args.checkpoint or DEFAULT_CHECKPOINT, args.device or ("cuda" if zero_gpu() else "cpu"))
            page = create_demo(service)
            page.launch(
                prevent_thread_lock=True,
                share=args.share or None,
                server_name=args.host,
                server_port=args.port,
                max_file_size=MAX_UPLOAD,
                mcp_server=mcp_installed(),
                theme=theme(),
                css=style_sheet(service.classes),
                _frontend=False,  # else it gives up where its own page takes more than 3 s once, on a busy machine
            )
            service.load()  # visitors look round and play examples meanwhile; who wants a clip of their own waits
            page.block_thread()
    except (ValueError, OSError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
