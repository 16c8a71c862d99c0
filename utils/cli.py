"""The command line shared by the three entry points.

What takes long to import is imported by the functions that need it: they run under `utils.command.guarded`, where a
signal is answered in one line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.command import Parser, whole_number
from utils.errors import UserError
from utils.registry import names_in_source

if TYPE_CHECKING:
    from utils.config import Config

# Of the shell scripts train_single.sh, train.sh and train_anti.sh.
VARIABLES = ("seed", "dataset", "num_classes", "model", "net1", "net2", "distiller", "teacher_args", "nproc", "nnodes")


def main_single(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `train_single.py`."""
    parser = _parser("Train one network with cross-entropy: a teacher, or a student on its own.")
    parser.add_argument("--model", help="network, e.g. vgg13")
    options = parser.parse_intermixed_args(arguments)
    config = _load(options, parser, {"model": options.model})
    return _train(config, options)


def main_distill(selection: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Entry point of `train.py`, and with ``selection="anti"`` of `train_anti.py`."""
    parser = _parser(
        "Distil where the policy says not to (anti-SAKD)."
        if selection == "anti"
        else "Train a student by spot-adaptive knowledge distillation (kd.selection: adaptive, anti, fixed, random)."
    )
    parser.add_argument("--net1", "--teacher", dest="teacher", help="teacher network, e.g. vgg13")
    parser.add_argument("--net2", "--student", dest="student", help="student network, e.g. vgg8")
    parser.add_argument("--distiller", help=f"what to distil: {' '.join(names_in_source('distillers', 'distiller'))}")
    parser.add_argument(
        "--teacher-arg",
        dest="teacher_args",
        action="append",
        default=[],
        metavar="key=value",
        help="a config key of the teacher, which is trained first if it is missing; may be given several times",
    )
    options = parser.parse_intermixed_args(arguments)
    if selection:
        options.overrides.append(f"kd.selection={selection}")
    names = {"teacher": options.teacher, "student": options.student, "distiller": options.distiller}
    config = _load(options, parser, names)
    return _train(config, options, teacher_args=options.teacher_args)


def _parser(description: str) -> Parser:
    parser = Parser(
        description=description,
        epilog="Every key of the config can be set: python -m utils.config lists them. The launchers train_single.sh, "
        "train.sh and train_anti.sh take these names from variables: seed, dataset, num_classes (dataset.num_classes), "
        "model, or net1, net2 and distiller; nproc is the number of processes, nnodes that of machines, and each "
        "blank-separated word of teacher_args is a --teacher-arg. Many runs are usually faster as one per GPU "
        "(python -m utils.grid) than with nproc. Exit code: 0 done, 2 wrong input, 75 stopped by SIGTERM, SIGUSR1 or "
        "Ctrl-C (saved, if there was anything to save), or another machine was lost, 130 stopped by a second Ctrl-C.",
    )
    source = parser.add_argument_group("what to run: a file, or names from which the file is found or composed")
    source.add_argument("--config", metavar="FILE", help="a config file")
    source.add_argument("--dataset", help="folder below configs/, e.g. cifar-100 or digits")
    source.add_argument("--seed", type=whole_number(0), default=1029, help="default 1029")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run that is there")
    existing.add_argument("--overwrite", action="store_true", help="drop the run that is there")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys, e.g. training.epochs=10 dataset.root=data"
    )
    return parser


def _load(options: argparse.Namespace, parser: Parser, names: dict[str, str | None]) -> Config:
    from utils.config import find_config, load_config
    from utils.training.log import log, log_to_console

    for word in options.overrides:
        name, _, value = word.partition("=")
        is_section = name in ("model", "dataset") and not re.fullmatch(r"(?!null$)\w[\w./-]*", value)
        if name in VARIABLES and not is_section:
            raise UserError(
                f"command line: {word}: {name} is a variable, which comes before sh ({word} sh train.sh); of Python's "
                "entry points it is an option (--help)"
            )
    if options.config:
        return load_config(options.config, options.overrides)
    missing = [name for name, value in {"dataset": options.dataset, **names}.items() if value is None]
    if missing:
        parser.error(f"give --config FILE, or all of --dataset {' '.join('--' + name for name in names)}")
    composed = find_config(options.dataset, options.seed, **names)
    config = composed.load(options.overrides)
    log_to_console()
    log.info(f"config: {composed.note}")
    return config


def _train(config: Config, options: argparse.Namespace, **more: Sequence[str]) -> int:
    from utils.training.run import train  # PyTorch takes seconds to import; --help and a bad config do not wait for it

    train(config, resume=options.resume, overwrite=options.overwrite, **more)
    return 0
