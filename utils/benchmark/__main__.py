"""Time and memory of spot-adaptive distillation, as ratios to plain KD of the same run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from distillers import DISTILLERS
from utils.benchmark.cases import Conditions, Kind, Pair
from utils.benchmark.published import check_published
from utils.benchmark.suite import Result, measure_loaders, measure_pair
from utils.benchmark.tables import loader_line, pair_table, price_table, summaries
from utils.command import Parser, guarded, whole_number
from utils.errors import UserError
from utils.files import write_text
from utils.training.device import choose_device, keep_freed_memory
from utils.training.log import log_to_console

PAIRS = "vgg13-vgg8,resnet110-resnet32,wrn_40_2-wrn_16_2,resnet32x4-resnet8x4,ResNet50-MobileNetV2"
DISTILLER_NAMES = "sp,cc,rkd,pkt,ft,fitnet,crd,at,vid,fsp,nst,reviewkd,dkd,dist"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_console()
    device = choose_device(options.device)
    keep_freed_memory(device)  # as a run does
    pairs = [Pair.parse(text) for text in options.pairs.split(",")]
    distillers = [DISTILLERS.canonical(name) for name in options.distillers.split(",")]
    selections = [("fixed", Fraction(1)), *(("adaptive", share) for share in options.share)]
    kinds = [Kind(distiller, *selection) for distiller in distillers for selection in selections]
    settings = ("precision", "batch_size", "size", "samples", "rounds", "cuda_graph", "channels_last")
    conditions = Conditions(device, **{name: getattr(options, name) for name in settings})
    figures: dict[str, Any] = {
        "machine": describe_machine(device),
        "conditions": asdict(conditions) | {"device": str(device)},
    }
    if options.json and options.json.is_dir():  # which is to be known before anything is measured
        raise UserError(f"--json: {options.json}: is a folder, expected the name of a file")
    earlier = read_figures(options.compare) if options.compare else {"results": []}
    if options.published:
        check_published(options.published)
    print(
        f"{figures['machine']['processor']}, PyTorch {torch.__version__}; {options.precision}, "
        f"batch {options.batch_size}, {options.size}x{options.size} pixels, median of {options.rounds} steps"
    )
    loaders = measure_loaders(conditions)
    print(f"{loader_line(loaders)}\n", flush=True)
    results: list[Result] = []
    for pair in pairs:
        found = list(measure_pair(pair, kinds, conditions, loaders.batch_seconds, options.published))
        print(f"{pair}\n{pair_table(found).markdown()}\n", flush=True)
        results += found
    for part in ("machine", "conditions") if options.compare else ():
        for key in sorted(figures[part].keys() & earlier[part].keys()):
            now, then = figures[part][key], earlier[part][key]
            if now != then:
                print(f"{options.compare}: {key} was {then}, is {now}")
    shares = " → ".join(map(str, dict.fromkeys(options.share)))
    print(f"adaptive steps in units of plain KD's, kd.routing_share {shares}\n{price_table(results).markdown()}\n")
    for title, table in summaries(results, earlier["results"]).items():
        print(f"{title}\n{table.markdown()}\n")
    if options.json:
        write_figures(options.json, figures | {"results": [asdict(r) for r in results], "loaders": asdict(loaders)})
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.benchmark", description=__doc__)
    parser.add_argument("pairs", nargs="?", default=PAIRS, help=f"teacher-student, with commas (default: {PAIRS})")
    parser.add_argument("distillers", nargs="?", default=DISTILLER_NAMES, help=f"default: {DISTILLER_NAMES}")
    parser.add_argument("--share", type=_share, nargs="+", default=[Fraction(1)], help="kd.routing_share, e.g. 1 1/4")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--batch-size", type=whole_number(2), default=64, metavar="N", help="images per step")
    parser.add_argument("--size", type=whole_number(2), default=32, metavar="PIXELS", help="height and width of images")
    parser.add_argument("--rounds", type=whole_number(2), default=7, metavar="N", help="steps of each kind, in turn")
    parser.add_argument(
        "--samples", type=whole_number(2), default=50_000, metavar="N", help="training set (CRD's banks)"
    )
    for key in ("cuda-graph", "channels-last"):
        parser.add_argument(f"--{key}", default="auto", choices=["auto", "true", "false"], help="as in the config")
    parser.add_argument(
        "--published", type=Path, metavar="FOLDER", help="a checkout of the published code, to be measured as well"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what --json wrote earlier: show the ratios to it")
    return parser


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, must be a number above 0 and up to 1, e.g. 1/4")
    return share


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {"processor": processor, "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); --json <file> names another") from error


def read_figures(path: Path) -> dict[str, Any]:
    """What `write_figures` wrote, its results as `Result`.

    Raises:
        UserError: it is something else.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        figures["results"] = [Result(**result) for result in figures["results"]]
        for part in ("machine", "conditions"):
            figures[part] = dict(figures[part])
        return {part: figures[part] for part in ("machine", "conditions", "results")}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); --compare takes what --json wrote") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not what --json of this version wrote ({type(error).__name__}: {error})") from error


if __name__ == "__main__":
    guarded(main)
