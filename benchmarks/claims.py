"""The paper's claims in small: variants of the model, trained under one equal budget, in one table.

    python -m benchmarks.claims runs/claims --backbone runs/backbone/backbone --codecs runs/codecs \
        --latents runs/adapters --minutes 30 --clips 16

With ``--pipeline DIR`` in place of backbone and codecs every variant but the one from scratch goes on from that trained
model, less the parts that the variant does without: what takes longer to learn than a small budget shows there.

Every variant learns from the same latents with the same settings, for the same minutes or the same steps, in a process
of its own, so that its memory is its own. What is finished is not done again, and an interrupted training goes on from
its last save. Beside the table (``claims.md``) lie the results as JSON, one file a variant and one of all.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from avdit.benchmark import peak_memory
from avdit.cli import Parser
from avdit.evaluation.report import Settings, evaluate
from avdit.evaluation.tasks import Sampling
from avdit.generate import load_pipeline
from avdit.models.dit import DiT
from avdit.training import adapters
from avdit.training.trainer import processes

RANDOM = "random"  # stands for a backbone of the given one's shape that has learned nothing
VARIANTS: dict[str, dict[str, Any]] = {
    "adapters on the frozen image backbone (ours)": {},
    "everything trained": {"trains": "all"},
    "no interaction": {"model": {"interaction_every": 0, "foley_width": 0}},
    "no temporal attention": {
        "model": {"temporal_width": 0, "temporal_rank": 0, "anchor_rank": 0, "neighbour_rank": 0}
    },
    "no audio adapters": {"model": {"lora_rank": 0}},
    "independent noise in every frame": {"model": {"shared_noise": 0.0}},  # a choice of ours, not of the paper
    "from scratch, without the image backbone": {"trains": "all", "backbone": RANDOM},
}


def parser() -> Parser:
    said = Parser(prog="python -m benchmarks.claims", description="Train the variants and print their table.")
    said.add_argument("out", type=Path, help="folder of the variants, the results and the table")
    start = said.add_mutually_exclusive_group(required=True)
    start.add_argument("--backbone", type=Path, help="folder of the trained image backbone; needs --codecs")
    start.add_argument(
        "--pipeline", type=Path, help="folder of a trained pipeline whose adapters the variants go on from"
    )
    said.add_argument("--codecs", type=Path, help="folder of the codecs, or of a pipeline that has them")
    said.add_argument("--latents", type=Path, required=True, help="cache folder of the adapters stage")
    said.add_argument("--pack", default="landscape")
    said.add_argument("--config", type=Path, help="JSON with settings of the adapters stage that all variants share")
    budget = said.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of training, each variant")
    budget.add_argument("--steps", type=int, help="of training, each variant")
    said.add_argument("--clips", type=int, default=8, help="clips of each class that are measured")
    said.add_argument("--event-clips", type=int, default=16, help="clips of each event class, for synchrony")
    said.add_argument("--sampling-steps", type=int, default=12)
    said.add_argument("--variants", choices=VARIANTS, metavar="VARIANT", nargs="+", help="these alone, in their order")
    said.add_argument("--only", choices=VARIANTS, metavar="VARIANT", help="this one alone, in this process")
    return said


def common(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all variants share.

    Raises:
        ValueError: for folders or a budget that cannot be used.
    """
    if bool(args.backbone) != bool(args.codecs):
        raise ValueError("--backbone and --codecs go together, and not with --pipeline")
    start = (args.pipeline, "model_index.json") if args.pipeline else (args.backbone, "config.json")
    for folder, file in (start, (args.latents / "latents" / args.pack, ".")):
        if not (folder / file).exists():
            raise ValueError(f"{folder} does not exist or holds nothing to train from")
    budget = args.minutes if args.steps is None else args.steps
    if not budget > 0:
        raise ValueError(f"the budget {budget} must be more than 0")
    if args.event_clips < 1:
        raise ValueError(f"--event-clips {args.event_clips} must be 1 or more")
    try:
        config = json.loads(args.config.read_text()) if args.config else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {args.config} is not JSON: {error}") from None
    train = config.pop("train", {}) | {"sample_every": 0}
    train |= {"minutes": args.minutes, "steps": 10**9} if args.steps is None else {"steps": args.steps}
    folders = {"pipeline": args.pipeline} if args.pipeline else {"codecs": args.codecs, "backbone": args.backbone}
    folders = {name: str(folder) for name, folder in {**folders, "cache": args.latents}.items()}
    return {**config, **folders, "pack": args.pack, "clips": 0, "train": train}


def chosen(args: argparse.Namespace) -> list[str]:
    """The variants of the table.

    Raises:
        ValueError: for one from scratch that is to go on from a trained model.
    """
    able = [name for name in VARIANTS if not (args.pipeline and VARIANTS[name].get("backbone") == RANDOM)]
    for name in args.variants or filter(None, [args.only]):
        if name not in able:
            raise ValueError(f"{name!r} does not go on from a pipeline: give --backbone and --codecs")
    return args.variants or able


def claim(shared: dict[str, Any], out: Path) -> None:
    """Note the settings in ``out``, so that variants of two budgets never stand in one table.

    Raises:
        ValueError: where other settings were noted before.
    """
    note = out / "settings.json"
    if note.exists() and json.loads(note.read_text()) != shared:
        raise ValueError(f"{out} holds variants of other settings: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(shared, indent=1))


def folder_of(out: Path, name: str) -> Path:
    return out / name.split(",")[0].split(" (")[0].replace(" ", "-")


def configured(shared: dict[str, Any], name: str, out: Path) -> dict[str, Any]:
    """The settings of one variant."""
    change = VARIANTS[name]
    parts = {**shared.get("model", {}), **change.get("model", {})}
    config = {**shared, **change, ("parts" if "pipeline" in shared else "model"): parts}
    if config.get("backbone") == RANDOM:
        folder = out / "random-backbone"
        torch.manual_seed(0)
        DiT.from_config(DiT.load_config(shared["backbone"])).save_pretrained(folder)
        config["backbone"] = str(folder)
    return config


def trained(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one variant in ``folder``, or go on where it was interrupted; returns what that cost."""
    note = folder / "training.json"
    if note.exists():
        return json.loads(note.read_text())
    adapters.run(config, folder, resume=True)
    with safe_open(folder / "state.safetensors", "pt") as file:
        meta = file.metadata()
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if key.startswith("weight.")]  # noqa: SIM118
    steps, seconds = int(meta["step"]), float(meta["elapsed"])
    batch = {**adapters.DEFAULTS["train"], **config["train"]}
    clips = steps * batch["batch_size"] * batch.get("accumulation", 1)
    cost = {
        "tunable": sum(torch.Size(shape).numel() for shape in shapes),
        "steps": steps,
        "training_minutes": seconds / 60,
        "training_clips": clips,
        "clips_per_second": clips / seconds,
        "peak_gb": peak_memory(processes().device) / 1e9,  # the evaluation has not added its own yet
    }
    note.write_text(json.dumps(cost, indent=1))
    return cost


def train_and_measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One variant's training, its cost, and its figures."""
    folder = folder_of(args.out, name)
    cost = trained(configured(common(args), name, folder), folder)
    pipe = load_pipeline(folder / "pipeline", str(processes().device))
    share = cost["tunable"] / sum(p.numel() for p in pipe.transformer.parameters())
    sampling = Sampling(steps=args.sampling_steps)
    figures = evaluate(pipe, Settings(clips=args.clips, parts=("quality",), sampling=sampling))
    # A clip of nine is 0.11 of a share: too coarse to compare variants by, and only event clips are made here.
    sync = evaluate(pipe, Settings(clips=args.event_clips, parts=("sync",), sampling=sampling))["sync"]
    return {"variant": name, "share": share, **cost, "figures": {**figures, "sync": sync}}


def table(results: list[dict[str, Any]]) -> str:
    """The markdown table, with what the codecs keep and what is no model's as its last rows."""
    head = ["variant", "tunable", "share", "picture's class", "sound's class", "within 100 ms", "AV-Align"]
    head += ["FVD", "KVD", "FAD", "training clips/s", "peak memory"]

    def measured(found: dict[str, Any], classes: tuple[str, str], sync: tuple[str, str], key: str) -> list[str]:
        shares = [found["class_accuracy"][name] for name in classes] + [found["sync"][name] for name in sync]
        distances = [found[name][key] for name in ("fvd", "kvd", "fad")]
        return [f"{x:.2f}" for x in shares] + ["-" if x is None else f"{x:.1f}" for x in distances]

    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for one in results:
        model = measured(one["figures"], ("video", "audio"), ("within_100ms", "av_align"), "value")
        cost = [f"{one['clips_per_second']:.1f}", f"{one['peak_gb']:.2f} GB"]
        rows.append([one["variant"], f"{one['tunable'] / 1e6:.2f} M", f"{one['share']:.1%}", *model, *cost])
    found = results[0]["figures"]
    floors = ("codec_floor_video", "codec_floor_audio"), ("codec_floor", "av_align_codec_floor"), "codec_floor"
    ceilings = ("chance", "chance"), ("shuffled", "av_align_shuffled"), "ceiling"
    rows.append(["*held-out clips through the codecs*", "", "", *measured(found, *floors), "", ""])
    rows.append(["*chance, shuffled, wrong classes*", "", "", *measured(found, *ceilings), "", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """The table with what it was made with."""
    budget = f"{args.minutes:g} minutes" if args.steps is None else f"{args.steps} steps"
    found = results[0]["figures"]
    how, count = found["settings"], found["class_accuracy"]["clips"]
    device = processes().device
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    machine = f"{processor or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"Budget: {budget} of training each, pack `{args.pack}`; machine: {machine}.",
        f"Measured: {count} clips, {how['steps']} steps of {how['sampler']}, guidance {how['guidance']:g}, "
        f"features {found['fvd']['features']} ({found['fvd']['size']} pixels) and {found['fad']['features']}; "
        f"synchrony over {found['sync']['samples']} clips ({found['sync']['timing']}).",
        f"Steps done: {', '.join(str(one['steps']) for one in results)}.",
    ]
    return table(results) + "\n\n" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Train what is not finished, then print and write the table; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    try:
        shared, names = common(args), chosen(args)
        Settings(clips=args.clips, sampling=Sampling(steps=args.sampling_steps)).classes({args.pack: ["any"]})
        claim({**shared, "measured": [args.clips, args.event_clips, args.sampling_steps]}, args.out)
        if args.only:
            result = train_and_measure(args, args.only)
            (folder_of(args.out, args.only) / "result.json").write_text(json.dumps(result, indent=1))
            return 0
        for name in names:
            if not (folder_of(args.out, name) / "result.json").exists():
                subprocess.run([sys.executable, "-m", "benchmarks.claims", *words, "--only", name], check=True)
    except subprocess.CalledProcessError as error:
        return error.returncode  # the variant's own process has said why
    except (ValueError, OSError) as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    results = [json.loads((folder_of(args.out, name) / "result.json").read_text()) for name in names]
    (args.out / "claims.json").write_text(json.dumps(results, indent=1))
    (args.out / "claims.md").write_text(text(args, results))
    print(text(args, results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
