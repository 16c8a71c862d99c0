"""Which small network to ship, what it gains by a teacher, and what it costs: trains candidates and compares them.

Students are trained alone, and distilled by several distillers, with and without a policy. The same command goes on
with what was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from utils.advise.advice import DEFAULT_DISTILLERS, DEFAULT_SELECTIONS, advise
from utils.command import Parser, guarded, positive, whole_number
from utils.grid.command import EXIT_FAILED, add_run_arguments, split_overrides
from utils.run_folder import read


def main(arguments: Sequence[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    options = vars(_parser().parse_args(words)) | {"overrides": overrides}
    table = advise(teacher_overrides=options.pop("teacher_arg"), **options)
    return EXIT_FAILED if table.attrs.get("failed") else 0


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.advise", description=__doc__)
    parser.add_argument("--dataset", required=True, help="folder below configs/, e.g. imagefolder or digits")
    parser.add_argument(
        "--teacher", required=True, metavar="NETWORK", help="trained first unless kd.teacher.checkpoint=FILE is given"
    )
    parser.add_argument("--students", required=True, nargs="+", metavar="NETWORK", help="e.g. resnet8 resnet20")
    parser.add_argument("--hours", type=positive(), metavar="H", help="fit candidates, seeds and epochs into them")
    parser.add_argument(
        "--distillers",
        nargs="+",
        default=DEFAULT_DISTILLERS,
        metavar="NAME",
        help=f"default: {' '.join(DEFAULT_DISTILLERS)}",
    )
    parser.add_argument(
        "--selections",
        nargs="+",
        choices=list(read.SELECTIONS),
        default=DEFAULT_SELECTIONS,
        metavar="NAME",
        help=f"of {' '.join(read.SELECTIONS)}; default: {' '.join(DEFAULT_SELECTIONS)}",
    )
    parser.add_argument("--seeds", nargs="+", type=whole_number(0), metavar="N", help="default: 1029 1030 1031")
    parser.add_argument("--anyway", action="store_true", help="go on under a teacher that is no better than a student")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long, and end")
    add_run_arguments(parser)
    return parser


if __name__ == "__main__":
    guarded(main, trains=True)
