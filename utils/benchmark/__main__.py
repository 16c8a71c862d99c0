"""Time and memory of training steps with spot-adaptive distillation, beside those of plain KD in the same run."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from distillers import DISTILLERS
from models import MODELS
from utils.benchmark.cases import PLAIN_KD, Case, Conditions, Kind, Pair
from utils.benchmark.measure import Result, measure_pair, warm_up
from utils.command import Parser, guarded, positive, whole_number
from utils.errors import UserError, doing
from utils.files import write_text
from utils.grid.plan import split_pair
from utils.training.device import choose_device, keep_freed_memory
from utils.training.facts import name_of
from utils.training.log import log_to_console
from utils.training.precision import precision_advice, refuse_precision

PAIRS = "vgg13-vgg8,wrn_40_2-wrn_16_2,resnet32x4-resnet8x4,resnet110-resnet32,ResNet50-MobileNetV2"
COLUMNS = {"pair": 22, "step": 20, "ms": 7, "x KD": 5, "MiB": 6, "x KD, MiB": 9, "steps are": 9}
THEN = {"ms, now / then": 14}
CASE_TO_PLAIN = 2.5  # an average kind, measured in turn with plain KD, takes this many times as long as plain KD alone


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    log_to_console()
    device = choose_device(options.device)
    refuse_precision(device, options.precision, "--precision")
    keep_freed_memory(device)  # as a run does
    pairs = [Pair(*map(MODELS.canonical, split_pair(text))) for text in options.pairs.split(",")]
    distillers = [DISTILLERS.canonical(name) for name in options.distillers.split(",")]
    selections = [("fixed", Fraction(1)), *(("adaptive", share) for share in options.share)]
    kinds = [Kind(distiller, *selection) for distiller in distillers for selection in selections]
    settings = ("precision", "batch_size", "size", "samples", "rounds", "cuda_graph", "channels_last")
    conditions = Conditions(device, **{name: getattr(options, name) for name in settings})
    if options.json and options.json.is_dir():  # refused before anything is measured
        raise UserError(f"--json: {options.json}: is a folder, expected the name of a file")
    then = read_times(options.compare) if options.compare else {}
    machine = f"{name_of(device)} ({platform.processor() or platform.machine()}), PyTorch {torch.__version__}"
    print(
        f"{machine}; {options.precision}, batch {options.batch_size}, {options.size}x{options.size} pixels, "
        f"kd.routing_share {', '.join(map(str, options.share))}"
    )
    if advice := precision_advice(device, options.precision):
        print(advice)
    results = measure(pairs, kinds, conditions, then)
    if options.json:
        figures = {"machine": machine, "conditions": asdict(conditions) | {"device": str(device)}}
        with doing(f"--json: writing {options.json}"):
            write_text(options.json, json.dumps(figures | {"results": [asdict(r) for r in results]}, indent=2) + "\n")
    return 0


def measure(pairs: Sequence[Pair], kinds: Sequence[Kind], conditions: Conditions, then: dict) -> list[Result]:
    """Measure everything, and print a row of the table as soon as it is known.

    Args:
        then: seconds of earlier steps, see `read_times`.
    """
    widths = COLUMNS | (THEN if then else {})
    results: list[Result] = []
    warm_up(Case(pairs[0], PLAIN_KD, conditions))  # starting a GPU takes seconds, which are not to be multiplied
    start = time.monotonic()
    for pair in pairs:
        for result in measure_pair(pair, kinds, conditions):
            if not results:
                rest = (time.monotonic() - start) * (1 + CASE_TO_PLAIN * len(kinds)) * len(pairs)
                print(f"about {tqdm.format_interval(rest)} for {len(pairs) * (len(kinds) + 1)} kinds of steps")
                print(row(widths, widths), row(widths, ["-" * width for width in widths.values()]), sep="\n")
            results.append(result)
            print(row(widths, cells(result, then)), flush=True)
    return results


def cells(result: Result, then: dict[tuple[str, str], float]) -> list[str]:
    """The texts of a row."""
    texts = [result.pair, result.kind, milliseconds(result.seconds), f"{result.time_ratio:.2f}"]
    texts += [f"{result.bytes / 2**20:.0f}", f"{result.memory_ratio:.2f}", "captured" if result.captured else "eager"]
    before = then.get((result.pair, result.kind))
    return texts + ([f"{result.seconds / before:.2f}" if before else ""] if then else [])


def row(widths: dict[str, int], texts: Sequence[str]) -> str:
    """A line of a Markdown table, aligned so that it reads well on a terminal too."""
    return "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths.values())) + " |"


def milliseconds(seconds: float) -> str:
    """Three digits or more."""
    number = 1000 * seconds
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.benchmark", description=__doc__)
    parser.add_argument("pairs", nargs="?", default=PAIRS, help=f"as of the grid, with commas (default: {PAIRS})")
    everything = ",".join(name for name in DISTILLERS if name != PLAIN_KD.distiller)
    parser.add_argument("distillers", nargs="?", default=everything, help=f"default: {everything}")
    parser.add_argument(
        "--share", type=positive(Fraction, 1), nargs="+", default=[1], help="kd.routing_share, e.g. 1 1/4"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--batch-size", type=whole_number(2), default=64, metavar="N", help="images per step")
    parser.add_argument("--size", type=whole_number(2), default=32, metavar="PIXELS", help="height and width of images")
    parser.add_argument("--rounds", type=whole_number(1), default=2, metavar="N", help="measurements of each kind")
    parser.add_argument(
        "--samples", type=whole_number(2), default=50_000, metavar="N", help="training set (CRD's banks)"
    )
    for key in ("cuda-graph", "channels-last"):
        parser.add_argument(f"--{key}", default="auto", choices=["auto", "true", "false"], help="as in the config")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what --json wrote earlier: show the ratio to it")
    return parser


def read_times(path: Path) -> dict[tuple[str, str], float]:
    """Seconds of a step by pair and kind, from a file that ``--json`` wrote."""
    with doing(f"--compare: reading {path}"):
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        return {(result["pair"], result["kind"]): float(result["seconds"]) for result in results}


if __name__ == "__main__":
    guarded(main)
