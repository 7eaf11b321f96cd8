import os
import sys

from avdit.cli import main

status = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # Threads of a process group outlive it, and the interpreter's end may abort over them when all work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
