"""The page's ready clips, one a class: ``python -m benchmarks.page_examples`` (again whenever the weights change).

Each is what ``python -m avdit generate --class NAME --seed SEED`` makes with the shipped weights, and its recipe, seed
and weights' hash among it, is in the file's comment. ``--class NAME --seed SEED`` makes one of them anew; a seed that
is to stay belongs into ``SEEDS``.
"""

import argparse
from pathlib import Path

import torch

from avdit.demo.examples import FOLDER, example_path
from avdit.generate import DEFAULT_CHECKPOINT, Request, generate, load_pipeline
from avdit.machine import fast_dtype, fast_precision

SEEDS = {"splashing water": 2, "wind noise": 5}  # of the classes whose clip is not that of seed 1
MOST_BYTES = 2_500_000  # of all clips together: they travel with every clone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--class", dest="label", help="only this one")
    parser.add_argument("--seed", type=int, help="with --class: another than the one that is recorded")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    pipe = load_pipeline(args.checkpoint, dtype=fast_dtype(cpu))
    FOLDER.mkdir(exist_ok=True)
    for label in [args.label] if args.label else pipe.classes:
        seed = SEEDS.get(label, 1) if args.seed is None else args.seed
        with fast_precision(cpu):
            path = generate(pipe, Request(label, seed=seed, steps=args.steps)).save(example_path(label))
        print(f"{path.name}: seed {seed}, {path.stat().st_size:,} bytes", flush=True)
    total = sum(path.stat().st_size for path in FOLDER.glob("*.mp4"))
    if total > MOST_BYTES:
        raise SystemExit(f"the clips are {total:,} bytes together and should be at most {MOST_BYTES:,}")


if __name__ == "__main__":
    main()
