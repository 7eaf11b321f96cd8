"""Start the demo page: ``python app.py [--share] [--host H] [--port P] [--device D] [--checkpoint DIR]``."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from avdit.demo.ui import CSS, THEME, create_demo  # noqa: E402  gradio reads the setting when it is imported
from avdit.generate import DEFAULT_CHECKPOINT  # noqa: E402
from avdit.media import ensure_ffmpeg  # noqa: E402


def main() -> int:
    """Build the page and serve it; 2 where it cannot start."""
    parser = argparse.ArgumentParser(description="The AV-DiT demo page.")
    parser.add_argument("--share", action="store_true", help="public link")
    parser.add_argument("--host", default=None, help="address to listen on; this machine alone by default")
    parser.add_argument("--port", type=int, default=None, help="7860, or the next that is free, by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="pipeline folder")
    args = parser.parse_args()
    try:
        ensure_ffmpeg()
        demo = create_demo(args.checkpoint, args.device)
    except ValueError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    try:
        demo.launch(
            share=args.share or None, server_name=args.host, server_port=args.port, theme=THEME, css_paths=[CSS]
        )
    except OSError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
