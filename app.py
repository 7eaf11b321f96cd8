"""Start the demo page: ``python app.py [--share] [--host H] [--port P] [--device D] [--checkpoint DIR]``."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from avdit.demo.ui import CSS, THEME, create_demo  # noqa: E402  gradio reads the setting when it is imported
from avdit.generate import DEFAULT_CHECKPOINT  # noqa: E402
from avdit.media import ensure_ffmpeg  # noqa: E402


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"app.py: {message}\n")


def main() -> int:
    """Build the page and serve it; 2 where it cannot start."""
    parser = Parser(prog="app.py", description="The AV-DiT demo page.")
    parser.add_argument("--share", action="store_true", help="public link; so does GRADIO_SHARE=True")
    parser.add_argument("--host", default=None, help="address to listen on; this machine alone by default")
    parser.add_argument("--port", type=int, default=None, help="7860, or the next that is free, by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="pipeline folder")
    args = parser.parse_args()
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port} must be from 1 to 65535")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the clips' folder is removed then, too
    try:
        ensure_ffmpeg()
        demo = create_demo(args.checkpoint, args.device)
        demo.launch(
            share=args.share or None, server_name=args.host, server_port=args.port, theme=THEME, css_paths=[CSS]
        )
    except (ValueError, OSError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
