"""The command line shared by the three entry points."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from utils.config import Config, find_config, load_config
from utils.errors import UserError
from utils.interrupt import EXIT_INTERRUPTED, Interrupted

EXIT_USER_ERROR = 2
EXIT_TEACHER_MISSING = 3
EXIT_TEACHER_UNFINISHED = 4


def guarded(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: errors meant for the user are one line on standard error and exit code 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


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
    parser.add_argument("--distiller", help="what to distil: kd at fitnet sp rkd cc vid pkt ft fsp nst crd")
    parser.add_argument(
        "--check-teacher",
        action="store_true",
        help=f"train nothing; exit with 0 if the teacher is there, {EXIT_TEACHER_MISSING} if not, "
        f"{EXIT_TEACHER_UNFINISHED} if its training was interrupted",
    )
    options = parser.parse_intermixed_args(arguments)
    if selection:
        options.overrides.append(f"kd.selection={selection}")
    names = {"teacher": options.teacher, "student": options.student, "distiller": options.distiller}
    config = _load(options, parser, names)
    if options.check_teacher:
        return teacher_status(config)
    return _train(config, options)


def teacher_status(config: Config) -> int:
    """0, `EXIT_TEACHER_MISSING` or `EXIT_TEACHER_UNFINISHED`."""
    checkpoint = config.teacher_checkpoint
    ours = config.kd.teacher.checkpoint is None
    last = checkpoint.with_name("last.pth")
    if ours and last.exists() and not (checkpoint.parent.parent / "result.json").exists():
        return EXIT_TEACHER_UNFINISHED
    return 0 if checkpoint.exists() or not ours else EXIT_TEACHER_MISSING


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog="Every key of the config can be set: python -m utils.config lists them."
    )
    source = parser.add_argument_group("what to run: a file, or names from which the file is found or composed")
    source.add_argument("--config", metavar="FILE", help="a config file")
    source.add_argument("--dataset", help="folder below configs/, e.g. cifar-100 or digits")
    source.add_argument("--seed", type=int, default=1029, help="default 1029")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run that is there")
    existing.add_argument("--overwrite", action="store_true", help="drop the run that is there")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys, e.g. training.epochs=10 dataset.root=data"
    )
    return parser


def _load(options: argparse.Namespace, parser: argparse.ArgumentParser, names: dict[str, str | None]) -> Config:
    if options.config:
        return load_config(options.config, options.overrides)
    missing = [name for name, value in {"dataset": options.dataset, **names}.items() if value is None]
    if missing:
        parser.error(f"give --config FILE, or all of --dataset {' '.join('--' + name for name in names)}")
    composed = find_config(options.dataset, options.seed, **names)
    config = composed.load(options.overrides)
    print(f"config: {composed.note}", flush=True)
    return config


def _train(config: Config, options: argparse.Namespace) -> int:
    from utils.runs import train  # PyTorch takes seconds to import; --help and a bad config do not wait for it

    train(config, resume=options.resume, overwrite=options.overwrite)
    return 0
