"""Time and memory of spot-adaptive distillation, as ratios to plain KD of the same run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distillers import DISTILLERS
from utils.benchmark.cases import Conditions, Pair
from utils.benchmark.suite import LoaderResult, Result, measure_loaders, measure_pair
from utils.command import Parser, guarded, whole_number
from utils.errors import UserError
from utils.files import write_text
from utils.report.tables import Table
from utils.training.device import choose_device, keep_freed_memory, set_precision
from utils.training.reporter import log_to_console

PAIRS = "vgg13-vgg8,resnet110-resnet32,wrn_40_2-wrn_16_2,resnet32x4-resnet8x4,ResNet50-MobileNetV2"
DISTILLER_NAMES = "sp,cc,rkd,pkt,ft,fitnet,crd,at,vid,fsp,nst"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_console()
    device = choose_device(options.device)
    keep_freed_memory(device)  # as a run does
    set_precision(options.precision)
    pairs = [Pair.parse(text) for text in options.pairs.split(",")]
    distillers = [DISTILLERS.canonical(name) for name in options.distillers.split(",")]
    conditions = Conditions(device, options.precision, options.batch_size, options.size, samples=options.samples)
    overrides = (f"training.cuda_graph={options.cuda_graph}", f"training.channels_last={options.channels_last}")
    machine = describe_machine(device)
    print(
        f"{machine['processor']}, PyTorch {machine['torch']}; {conditions.precision}, batch {conditions.batch_size}, "
        f"{conditions.size}x{conditions.size} pixels, median of {options.rounds} steps\n"
    )
    loaders = measure_loaders(conditions)
    print(f"{loader_line(loaders)}\n", flush=True)
    results: list[Result] = []
    for pair in pairs:
        found = measure_pair(pair, distillers, conditions, options.rounds, overrides)
        print(f"{pair}\n{pair_table(found).markdown()}\n", flush=True)
        results += found
    print(f"adaptive step / plain KD step\n{summary_table(results, 'time_ratio').markdown()}\n")
    print(f"peak memory, adaptive / plain KD\n{summary_table(results, 'memory_ratio').markdown()}\n")
    if options.json:
        write_json(Path(options.json), machine, conditions, results, loaders)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.benchmark", description=__doc__)
    parser.add_argument("pairs", nargs="?", default=PAIRS, help=f"teacher-student, with commas (default: {PAIRS})")
    parser.add_argument("distillers", nargs="?", default=DISTILLER_NAMES, help=f"default: {DISTILLER_NAMES}")
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
    parser.add_argument("--json", metavar="FILE", help="also write every figure there")
    return parser


def pair_table(results: Iterable[Result]) -> Table:
    """One line per distiller and selection."""
    phases = ["data", "teacher", "student", "routing", "backward", "optimisers", "rest"]
    header = ["", "ms", "images/s", "x KD", "MiB", "x KD", *(f"{name} %" for name in phases)]
    rows = [
        [
            f"{result.distiller} {result.selection}",
            f"{1000 * result.seconds:.0f}",
            f"{result.images_per_second:.0f}",
            f"{result.time_ratio:.2f}",
            f"{result.bytes / 2**20:.0f}",
            f"{result.memory_ratio:.2f}",
            *(f"{100 * result.phases[name]:.1f}" if name in result.phases else "" for name in phases),
        ]
        for result in results
    ]
    return Table(header, rows)


def summary_table(results: Sequence[Result], ratio: str) -> Table:
    """One ratio of the adaptive steps: distillers by pairs, and the median over the pairs."""
    pairs = list(dict.fromkeys(result.pair for result in results))
    found = {(r.distiller, r.pair): getattr(r, ratio) for r in results if r.selection == "adaptive"}
    rows = []
    for distiller in dict.fromkeys(name for name, _ in found):
        values = [found.get((distiller, pair)) for pair in pairs]
        middle = median(value for value in values if value is not None)
        rows.append([distiller, *("" if value is None else f"{value:.2f}" for value in values), f"{middle:.2f}"])
    return Table(["", *pairs, "median"], rows)


def loader_line(loaders: LoaderResult) -> str:
    return (
        f"in-memory loader, crop and flip: {loaders.memory:,.0f} images/s per core, {loaders.ratio:.0f} times the "
        f"{loaders.per_image:,.0f} of torchvision's transforms of one image at a time"
    )


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


def write_json(
    path: Path, machine: dict[str, Any], conditions: Conditions, results: Sequence[Result], loaders: LoaderResult
) -> None:
    """Write every figure."""
    figures = {
        "machine": machine,
        "conditions": asdict(conditions) | {"device": str(conditions.device)},
        "results": [asdict(result) for result in results],
        "loaders": asdict(loaders),
    }
    try:
        write_text(path, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); --json <file> names another") from error


if __name__ == "__main__":
    guarded(main)
