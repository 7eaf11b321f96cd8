"""Clips rendered a second, class by class: ``python -m benchmarks.scenes [--clips 12] [--json]``.

Clips are shared out to as many processes as there are cores, each on one thread, as the training's cache is made.
"""

import argparse
import json
import multiprocessing
import platform
import time

import torch

from avdit.data.scenes import ALL_CLASSES, HELD_OUT, render_clip
from avdit.machine import usable_cores


def prepare() -> None:
    """One thread a process; the first clip of a process, which fills caches, does not count."""
    torch.set_num_threads(1)
    render_clip(0, HELD_OUT)


def render_one(task: tuple[str, int]) -> None:
    label, seed = task
    render_clip(label, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12, help="of each class")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.clips < 1:
        parser.error(f"--clips {args.clips} must be 1 or more")
    cores, speeds, taken = usable_cores(), {}, 0.0
    with multiprocessing.get_context("spawn").Pool(cores, prepare) as pool:
        pool.map(render_one, [(ALL_CLASSES[0], HELD_OUT)] * cores, chunksize=1)  # until all have started
        for label in ALL_CLASSES:
            start = time.perf_counter()
            pool.map(render_one, [(label, HELD_OUT + k) for k in range(args.clips)], chunksize=1)
            seconds = time.perf_counter() - start
            speeds[label], taken = round(args.clips / seconds, 1), taken + seconds
    values = {
        "machine": {"processor": platform.processor() or platform.machine(), "processes": cores},
        "clips_of_each_class": args.clips,
        "clips_per_second": round(args.clips * len(ALL_CLASSES) / taken, 1),
        "by_class": speeds,
    }
    if args.json:
        print(json.dumps(values))
        return
    print(f"{values['clips_per_second']} clips/s over all classes, {cores} processes, {args.clips} clips a class")
    for label, speed in speeds.items():
        print(f"{label:20} {speed:6.1f}")


if __name__ == "__main__":
    main()
