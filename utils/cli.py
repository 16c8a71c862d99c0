"""The command line shared by the three entry points.

What takes long to import is imported by the functions that need it: they run under `utils.command.guarded`, where a
signal is answered in one line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.command import Parser, whole_number
from utils.errors import UserError
from utils.registry import fold, names_in_source

if TYPE_CHECKING:
    from utils.config import Config

DEFAULTS = {"dataset": "cifar-100", "seed": 1029, "model": "vgg13", "net1": "vgg13", "net2": "vgg8", "distiller": "at"}
SMALL = {"model": "resnet20", "net1": "resnet20", "net2": "resnet8"}  # of digits: they take minutes on a CPU
MACHINES = ("nproc", "nnodes")
# Of the shell scripts train_single.sh, train.sh and train_anti.sh.
VARIABLES = (*DEFAULTS, *MACHINES, "num_classes", "teacher_args")
# Keys that come with others, which a variable chooses: a distiller's weight, a network's learning rate.
CHOSEN = {"model.name": "model", "kd.teacher.name": "net1", "kd.student.name": "net2", "kd_loss.name": "distiller"}


def main_single(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `train_single.py`."""
    parser = _parser("Train one network with cross-entropy: a teacher, or a student on its own.")
    parser.add_argument("--model", help=f"network (default {DEFAULTS['model']}; of digits {SMALL['model']})")
    options = parser.parse_intermixed_args(arguments)
    return _train(options, ("dataset", "seed", "model"), "train_single.sh")


def main_distill(selection: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Entry point of `train.py`, and with ``selection="anti"`` of `train_anti.py`."""
    parser = _parser(
        "Distil where the policy says not to (anti-SAKD)."
        if selection == "anti"
        else "Train a student by spot-adaptive knowledge distillation (kd.selection chooses other ways)."
    )
    for option, alias in (("net1", "teacher"), ("net2", "student")):
        usual = f"default {DEFAULTS[option]}; of digits {SMALL[option]}"
        parser.add_argument(f"--{option}", f"--{alias}", help=f"{alias} network ({usual})")
    parser.add_argument(
        "--distiller",
        help=f"what to distil, default {DEFAULTS['distiller']}: {' '.join(names_in_source('distillers', 'distiller'))}",
    )
    parser.add_argument(
        "--teacher-arg",
        dest="teacher_args",
        action="append",
        default=[],
        metavar="key=value",
        help="a config key of the teacher, which is trained first if it is missing; may be given several times",
    )
    options = parser.parse_intermixed_args(arguments)
    names = ("dataset", "seed", "net1", "net2", "distiller")
    return _train(options, names, "train_anti.sh" if selection == "anti" else "train.sh")


def _parser(description: str) -> Parser:
    parser = Parser(
        description=description,
        epilog="Every key of the config can be set: python -m utils.config lists them. The launchers train_single.sh, "
        "train.sh and train_anti.sh take these names from variables: seed, dataset, num_classes (dataset.num_classes), "
        "model, or net1, net2 and distiller; nproc is the number of processes, nnodes that of machines, and each "
        "blank-separated word of teacher_args is a --teacher-arg. Many runs are usually faster as one per GPU "
        "(python -m utils.grid) than with nproc. Exit code: 0 done, 1 unexpected error, 2 wrong input, 75 stopped by "
        "SIGTERM, SIGUSR1, SIGHUP or Ctrl-C (saved, if there was anything to save), or another machine was lost, 130 "
        "stopped by a second Ctrl-C.",
    )
    source = parser.add_argument_group("what to run: a file, or names from which the file is found or composed")
    source.add_argument("--config", metavar="FILE", help="a config file")
    source.add_argument("--dataset", help=f"folder below configs/, e.g. digits (default {DEFAULTS['dataset']})")
    source.add_argument("--seed", type=whole_number(0), help=f"default {DEFAULTS['seed']}")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run that is there")
    existing.add_argument("--overwrite", action="store_true", help="drop the run that is there")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the run would do, with time and memory of a few steps; write no run",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys, e.g. training.epochs=10 dataset.root=data"
    )
    return parser


def _train(options: argparse.Namespace, names: Sequence[str], script: str) -> int:
    """Find the config that the options ask for, and train it.

    Args:
        names: the options that say which config, unless a file does.
        script: the launcher that does the same.
    """
    from utils.config.related import Command

    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    words, teacher_args = list(options.overrides), getattr(options, "teacher_args", [])
    config = _load(options.config, given, names, ["kd.selection=anti"] * (script == "train_anti.sh") + words)
    # PyTorch takes seconds to import; --help and a bad config do not wait for it.
    if options.dry_run:
        from utils.training.dry_run import dry_run

        dry_run(config, teacher_args, resume=options.resume, overwrite=options.overwrite)
        return 0
    from utils.training.run import train

    machines = {name: os.environ[name] for name in MACHINES if os.environ.get(name)}
    typed = ["--config", options.config] if options.config else []
    typed += [part for word in teacher_args for part in ("--teacher-arg", word)]
    command = Command(script, given | machines, (*typed, *words))
    train(config, resume=options.resume, overwrite=options.overwrite, teacher_args=teacher_args, command=command)
    return 0


def _load(file: str | None, given: dict[str, Any], names: Sequence[str], words: Sequence[str]) -> Config:
    """The config of `file`, or the one found by the `given` of `names` and the defaults of the others."""
    from utils.config import find_config, load_config
    from utils.training.log import log, log_to_console

    log_to_console()
    for word in words:
        name, _, value = word.partition("=")
        if name in VARIABLES and not value.lstrip().startswith("{"):  # model and dataset are sections of a config, too
            raise UserError(
                f"command line: {word}: {name} is a variable, which comes before sh ({word} sh train.sh); of Python's "
                "entry points it is an option (--help)"
            )
        if name in CHOSEN and not file:
            raise UserError(
                f"command line: {word}: {CHOSEN[name]}={value} before sh chooses it, with what goes with it"
            )
    if file and given:
        raise UserError(
            f"command line: {', '.join(given)} beside --config, whose file says what to run; "
            "keys change that, e.g. training.seed=7"
        )
    if file:
        return load_config(file, words)
    usual = DEFAULTS | (SMALL if fold(given.get("dataset", "")) == "digits" else {})
    chosen = {name: given.get(name, usual[name]) for name in names}
    renamed = {"net1": "teacher", "net2": "student"}
    composed = find_config(**{renamed.get(name, name): value for name, value in chosen.items()})
    config = composed.load(words)
    log.info(f"config: {composed.note}")
    return config
