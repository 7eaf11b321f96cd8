"""``python -m avdit``: make, render, train, measure, convert and assemble."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from avdit.generate import DEFAULT_CHECKPOINT, Request, generate, load_pipeline, usable_device, weights_sha256
from avdit.machine import fast_dtype, fast_precision
from avdit.models.avdit import AVDiT
from avdit.pipeline import AVDiTPipeline

STAGES = (
    "codecs",
    "vocoder",
    "backbone",
    "images",
    "frames",
    "foley",
    "adapters",
    "turbo",
    "lag",
    "rollouts",
    "decoder",
    "judges",
    "recipe",
)


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"avdit: {message}\n")


def build_parser() -> Parser:
    parser = Parser(prog="python -m avdit", description="Joint video and audio generation with AV-DiT.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, run: Any, text: str, *, json_output: bool = True) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if json_output:
            sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return sub

    def model(sub: Parser) -> None:
        sub.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="pipeline folder")
        sub.add_argument("--device", default="cpu")

    def joint_guidance(sub: Parser) -> None:
        sub.add_argument("--joint-guidance", type=float, default=5.0, help="of picture and sound by each other")

    def features(sub: Parser) -> None:
        for name, text in (("video", "I3D as TorchScript"), ("audio", "AudioCLIP, VGGish or TorchScript")):
            sub.add_argument(f"--{name}-features", type=Path, metavar="FILE", help=f"{text}; our own by default")

    model(command("info", run_info, "components, parameters, classes, geometry and the weights' hash"))

    sub = command("generate", run_generate, "make one clip")
    model(sub)
    sub.add_argument("--class", dest="class_label", required=True, metavar="NAME")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, default=12)
    sub.add_argument("--guidance", type=float, default=Request.guidance)
    sub.add_argument("--audio-guidance", type=float, help="as --guidance where it is left out")
    joint_guidance(sub)
    sub.add_argument("--sampler", default="ddim", help="ddim, dpm++, unipc, or turbo: few steps without guidance")
    sub.add_argument("--seconds", type=float, default=1.6)
    sub.add_argument("--out", type=Path, required=True, metavar="CLIP.mp4")
    sub.add_argument("--offload", action="store_true", help="on the GPU only what works at the moment: less memory")
    for name, text in (("video", "make the sound of"), ("audio", "make the picture of"), ("image", "start from")):
        sub.add_argument(f"--{name}", metavar="FILE", help=f"{text} this file")

    sub = command("render", run_render, "render procedural clips as mp4 with sound")
    sub.add_argument("--class", dest="class_label", default="all", metavar="NAME")
    sub.add_argument("--clips", type=int, default=1, help="clips of each class")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = command("evaluate", run_evaluate, "measure a checkpoint on held-out seeds")
    model(sub)
    sub.add_argument("--pack", metavar="NAME", help="whose classes are measured; the checkpoint's first by default")
    sub.add_argument("--clips", type=int, default=4, help="clips of each class")
    sub.add_argument("--part", choices=("all", "codecs", "quality", "sync", "copies"), default="all")
    sub.add_argument("--task", default="joint", help="joint, v2a, a2v, image or continuation")
    sub.add_argument("--windows", type=int, default=2, help="of a continuation, whose last window is measured")
    sub.add_argument("--steps", type=int, default=12)
    sub.add_argument("--guidance", type=float, default=Request.guidance)
    joint_guidance(sub)
    sub.add_argument("--sampler", default="ddim", help="ddim, dpm++, unipc or turbo")
    sub.add_argument("--batch", type=int, default=4, help="clips that are made at a time")
    sub.add_argument("--training-clips", type=int, default=16, help="of each class, among which to look for copies")
    sub.add_argument("--judges", type=Path, metavar="DIR", help="judges other than those in checkpoints/judges")
    features(sub)

    sub = command("samples", run_samples, "make many clips for the distances, by any number of processes")
    model(sub)
    sub.set_defaults(device=None)
    sub.add_argument("--clips", type=int, default=2048, help="of all classes together")
    sub.add_argument("--classes", help="landscape, dance, or names with commas between; all of the model's by default")
    sub.add_argument("--steps", type=int, default=50)
    sub.add_argument("--guidance", type=float, default=Request.guidance)
    joint_guidance(sub)
    sub.add_argument("--sampler", default="ddim", help="ddim, dpm++ or unipc")
    sub.add_argument("--batch", type=int, default=8, help="clips that are made at a time")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="what is there already is kept")

    sub = command("distances", run_distances, "FVD, KVD and FAD of a folder of clips against a folder of real ones")
    for name, text in (("real", "mp4 files"), ("made", "mp4 files, or what samples wrote")):
        sub.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    sub.add_argument("--real-list", type=Path, metavar="FILE", help="names of the real files to take, one a line")
    sub.add_argument("--clips", type=int, help="at most so many of each, fairly drawn; all by default")
    sub.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="pixels a side of the pictures")
    features(sub)
    sub.add_argument("--device", default="cpu")

    sub = command("bench", run_bench, "time the making of a clip on this machine")
    model(sub)
    sub.add_argument("--class", dest="class_label", metavar="NAME", help="what the clip shows; the first by default")
    sub.add_argument("--runs", type=int, default=5)
    sub.add_argument("--steps", type=int, default=12)

    sub = command("train", run_train, "train one of the stages", json_output=False)
    sub.add_argument("--dry-run", action="store_true", help="time one step, count the memory, write nothing")
    sub.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object on stdout")
    sub.add_argument("stage", choices=STAGES)
    sub.add_argument("--config", type=Path, help="JSON file with settings that differ from the stage's defaults")
    sub.add_argument("--out", type=Path, help="folder of state, log and result; runs/STAGE by default")
    sub.add_argument("--resume", action="store_true", help="go on from the last save in --out")

    sub = command("convert-dit", run_convert, "convert DiT weights of another layout", json_output=False)
    sub.add_argument("source", type=Path, help="hub name, diffusers folder, .safetensors or the original .pt")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--accept-licences", action="store_true", help="download what is not here yet")

    sub = command("assemble-xl", run_assemble, "put published DiT-XL/2, SD and AudioLDM weights into one pipeline")
    for name in ("dit", "vae", "audio-vae", "vocoder"):
        sub.add_argument(f"--{name}", metavar="SOURCE", help="hub name, folder or, for the DiT, file")
    sub.add_argument("--classes", default="landscape", help="landscape, dance, or names with commas between")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    sizes = ("temporal-width", "lora-rank", "interaction-rank", "interaction-every", "interaction-pool")
    for name in (*sizes, "exchange-features", "anchor-rank", "neighbour-rank", "temporal-rank", "image-rank"):
        sub.add_argument(f"--{name}", type=int, metavar="N", help="size of the adapters")
    sub.add_argument("--shared-noise", type=float, metavar="X", help="of the noise, that all frames have alike")
    sub.add_argument("--accept-licences", action="store_true", help="download what is not here yet")
    return parser


def report(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Print ``values`` as JSON or as lines."""
    if args.json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        if name == "components":
            width = max(map(len, value))
            value = "".join(f"\n  {part:{width}} {count:>13,}" for part, count in value.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        print(f"{name:16} {value}")


def parameters(model: AVDiT) -> dict[str, Any]:
    """Parameters of the joint model, in all and by component."""
    table = model.parameter_table()
    total, tunable = sum(table.values()), sum(table.values()) - table["backbone"]
    counted = {"total": total, "tunable": tunable, "tunable_share": round(tunable / total, 4)}
    return {"parameters": counted, "components": table}


def loaded(args: argparse.Namespace, offload: bool = False) -> AVDiTPipeline:
    """The pipeline that the arguments name, in the number format that its device is fast in."""
    return load_pipeline(args.checkpoint, args.device, offload, fast_dtype(usable_device(args.device)))


def run_info(args: argparse.Namespace) -> None:
    pipe = load_pipeline(args.checkpoint, args.device)
    counted = parameters(pipe.transformer)
    codecs = {name: getattr(pipe, name) for name in ("video_codec", "audio_codec")}
    components = {name: sum(p.numel() for p in module.parameters()) for name, module in codecs.items()}
    report(
        args,
        {
            "name": args.checkpoint.resolve().name,
            "classes": list(pipe.classes),
            "packs": list(pipe.packs),
            "parameters": counted["parameters"],
            "components": {**counted["components"], **components},
            "geometry": pipe.geometry.as_dict(),
            "weights_sha256": weights_sha256(args.checkpoint),
        },
    )


def run_generate(args: argparse.Namespace) -> None:
    request = Request(
        class_label=args.class_label,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        audio_guidance=args.audio_guidance,
        joint_guidance=args.joint_guidance,
        sampler=args.sampler,
        seconds=args.seconds,
        video=args.video,
        audio=args.audio,
        image=args.image,
    )
    if not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: the folder {args.out.resolve().parent} does not exist")
    pipe = loaded(args, args.offload)
    with fast_precision(pipe._execution_device):
        result = generate(pipe, request)
    result.save(args.out)
    report(
        args,
        {
            "out": str(args.out),
            "seed": args.seed,
            "class": args.class_label,
            "steps": result.recipe["steps"],
            "seconds": len(result.frames) / result.fps,
            "wall_s": round(result.wall_s, 3),
            "frames": len(result.frames),
            "fps": result.fps,
            "sampling_rate": result.sampling_rate,
        },
    )


def run_render(args: argparse.Namespace) -> None:
    from avdit.data.scenes import ALL_CLASSES, render_clip
    from avdit.geometry import ClipGeometry
    from avdit.media import write_clip

    names = list(ALL_CLASSES) if args.class_label == "all" else [args.class_label]
    if args.class_label not in ("all", *ALL_CLASSES):
        raise ValueError(f"unknown class {args.class_label!r}: choose all or one of {', '.join(ALL_CLASSES)}")
    if args.clips < 1:
        raise ValueError(f"--clips {args.clips} must be 1 or more")
    if args.seed < 0:
        raise ValueError(f"seed {args.seed} must be 0 or more")
    clip, written = ClipGeometry(), []
    for name in names:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(args.seed, args.seed + args.clips):
            made = render_clip(name, seed, clip)
            path = folder / f"{name.replace(' ', '-')}-{seed}.mp4"
            rates = {"fps": clip.fps, "sampling_rate": clip.sampling_rate}
            write_clip(path, made.frames.numpy(), made.audio.numpy(), metadata={"class": name, "seed": seed}, **rates)
            written.append(str(path))
    report(args, {"out": str(args.out), "clips": len(written), "files": written})


def run_evaluate(args: argparse.Namespace) -> None:
    from avdit.evaluation.report import PARTS, Settings, evaluate, table
    from avdit.evaluation.tasks import Sampling

    settings = Settings(
        clips=args.clips,
        pack=args.pack,
        parts=PARTS if args.part == "all" else (args.part,),
        sampling=Sampling(
            args.task, args.steps, args.guidance, args.joint_guidance, args.sampler, args.windows, args.batch
        ),
        training_clips=args.training_clips,
        judges=args.judges,
        video_features=args.video_features,
        audio_features=args.audio_features,
    )
    values = evaluate(loaded(args), settings)
    print(json.dumps(values) if args.json else table(values))


def run_samples(args: argparse.Namespace) -> None:
    from avdit.evaluation.samples import write_samples
    from avdit.evaluation.tasks import Sampling
    from avdit.training.data import my_share
    from avdit.xl import class_names

    share, state = my_share()
    pipe = load_pipeline(args.checkpoint, args.device or str(state.device))
    sampling = Sampling("joint", args.steps, args.guidance, args.joint_guidance, args.sampler, batch=args.batch)
    classes = class_names(args.classes) if args.classes else None
    with fast_precision(pipe.device):
        told = write_samples(pipe, args.out, args.clips, sampling, classes, share)
    state.wait_for_everyone()
    if state.is_main_process:
        report(args, {"out": str(args.out), **told})


def run_distances(args: argparse.Namespace) -> None:
    from avdit.evaluation.distances import ClipSet, Tools, distances, table

    device = usable_device(args.device)
    tools = Tools.of(args.video_features, args.audio_features, tuple(args.sizes), device)
    values = distances(ClipSet(args.real, args.real_list), ClipSet(args.made), tools, args.clips)
    print(json.dumps(values) if args.json else table(values))


def run_bench(args: argparse.Namespace) -> None:
    from avdit.benchmark import bench

    pipe = loaded(args)
    with fast_precision(pipe.device):
        values = bench(pipe, args.runs, args.steps, args.class_label)
    report(args, values)


def run_train(args: argparse.Namespace) -> None:
    config = {}
    if args.config is not None:
        try:
            config = json.loads(args.config.read_text())
        except FileNotFoundError:
            raise ValueError(f"--config {args.config} does not exist") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {args.config} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"--config {args.config} must hold one JSON object with the settings")
    stage = importlib.import_module(f"avdit.training.{args.stage}")
    cost = stage.run(config, args.out or Path("runs") / args.stage, args.resume, args.dry_run)
    if args.dry_run:
        note = "parameters and memory by kind are counted; time and peak are measured over one step"
        report(args, {"stage": args.stage, "how": note, **cost})


def run_convert(args: argparse.Namespace) -> None:
    from avdit.models.convert import load_dit

    load_dit(args.source, accept_licences=args.accept_licences).save_pretrained(args.out)


def run_assemble(args: argparse.Namespace) -> None:
    import torch

    from avdit.xl import SOURCES, XL_ADAPTERS, assemble, class_names

    def given(names: Any) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(args, name)) is not None}

    model = assemble(
        args.out,
        given(SOURCES),
        class_names(args.classes),
        args.accept_licences,
        getattr(torch, args.dtype),
        given(XL_ADAPTERS),
    )
    report(args, {"out": str(args.out), **parameters(model)})


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        if torch.distributed.is_initialized():  # by a command that several processes share
            importlib.import_module("avdit.training.trainer").end_processes()
    except ValueError as error:
        print(f"avdit: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"avdit: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0
