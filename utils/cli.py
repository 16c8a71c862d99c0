"""The command line shared by the three entry points."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from utils.command import Parser, whole_number
from utils.config import Config, find_config, load_config
from utils.registry import names_in_source

EXIT_TEACHER_MISSING = 3
EXIT_TEACHER_UNFINISHED = 4


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
    parser.add_argument("--distiller", help=f"what to distil: {' '.join(names_in_source('distillers'))}")
    parser.add_argument(
        "--check-teacher",
        action="store_true",
        help=f"train nothing; exit with 0 if the teacher is there, else say what trains it and exit with "
        f"{EXIT_TEACHER_MISSING}, or {EXIT_TEACHER_UNFINISHED} if its training was interrupted",
    )
    options = parser.parse_intermixed_args(arguments)
    if selection:
        options.overrides.append(f"kd.selection={selection}")
    names = {"teacher": options.teacher, "student": options.student, "distiller": options.distiller}
    config = _load(options, parser, names)
    if options.check_teacher:
        status = teacher_status(config)
        print(*(teacher_arguments(config) if status else ()), sep="\n")
        return status
    return _train(config, options)


def teacher_status(config: Config) -> int:
    """0, `EXIT_TEACHER_MISSING` or `EXIT_TEACHER_UNFINISHED`."""
    checkpoint = config.teacher_checkpoint
    ours = config.kd.teacher.checkpoint is None
    last = checkpoint.with_name("last.pth")
    if ours and last.exists() and not (checkpoint.parent.parent / "result.json").exists():
        return EXIT_TEACHER_UNFINISHED
    return 0 if checkpoint.exists() or not ours else EXIT_TEACHER_MISSING


def teacher_arguments(config: Config) -> list[str]:
    """For `train.sh`: model, data set and seed of the teacher, and the keys that it shares with the student's run."""
    data = config.dataset
    # A label of one's own may stand in a file alone; the bases of the data set itself then serve the teacher.
    folder = data.label if Path("configs", data.label, "base.yml").exists() else data.name
    shared = {f"dataset.{key}": value for key, value in config.to_dict()["dataset"].items()}
    shared |= {"run.root": config.run.root}
    shared |= {f"training.{key}": getattr(config.training, key) for key in ("device", "precision")}
    given = [f"{key}={json.dumps(value)}" for key, value in shared.items() if value is not None]
    return [config.kd.teacher.name, folder, str(config.training.seed), *given]


def _parser(description: str) -> Parser:
    parser = Parser(
        description=description,
        epilog="Every key of the config can be set: python -m utils.config lists them. The launchers train_single.sh, "
        "train.sh and train_anti.sh take these names from variables: seed, dataset, num_classes (dataset.num_classes), "
        "model, or net1, net2 and distiller; nproc is the number of processes, and teacher_args holds arguments for "
        "the teacher that train.sh trains if it is missing.",
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
    if options.config:
        return load_config(options.config, options.overrides)
    missing = [name for name, value in {"dataset": options.dataset, **names}.items() if value is None]
    if missing:
        parser.error(f"give --config FILE, or all of --dataset {' '.join('--' + name for name in names)}")
    composed = find_config(options.dataset, options.seed, **names)
    config = composed.load(options.overrides)
    if not getattr(options, "check_teacher", False):
        print(f"config: {composed.note}", flush=True)
    return config


def _train(config: Config, options: argparse.Namespace) -> int:
    from utils.training.run import train  # PyTorch takes seconds to import; --help and a bad config do not wait for it

    train(config, resume=options.resume, overwrite=options.overwrite)
    return 0
