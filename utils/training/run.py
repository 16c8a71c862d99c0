"""From a validated config to a finished run: open the data, build, train a missing teacher, load, resume, train."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext

import torch

from datasets import Data, Source, open_data
from distillers.spot_adaptive.balance import excessive_beta
from distillers.task import Task
from models import find_builder
from utils.config import Config
from utils.config.changes import differences
from utils.config.related import Command, SingleRun, next_command, remembered, teacher_run
from utils.config.yaml_text import dump_yaml
from utils.errors import UserError
from utils.files import write_text
from utils.processes.group import from_main, gather_objects, is_main, process_group
from utils.processes.stopping import Interrupted, StopRequest
from utils.run_folder.choice import no_choice
from utils.run_folder.folder import RunDir
from utils.run_folder.layout import Layout
from utils.run_folder.records import read_epochs
from utils.training.accuracy import evaluate
from utils.training.build import (
    build,
    load_data,
    load_split,
    load_teacher,
    make_phases,
    teacher_accuracy,
)
from utils.training.device import choose_device, explaining_limits, keep_freed_memory, set_backends
from utils.training.doubts import leaked_images, other_images, poor_teacher, uneven_classes, wide_interval
from utils.training.engine import Engine
from utils.training.facts import facts_of, name_of
from utils.training.log import log, log_to_console, log_to_file, set_aside
from utils.training.precision import autocast, place_task, precision_advice
from utils.training.step import Phase


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    teacher_args: Sequence[str] = (),
    command: Command | None = None,
) -> dict:
    """Run what `config` describes, a single network or a distillation, and say where the result is.

    A teacher whose training is missing or unfinished is trained first, unless the config names its checkpoint.

    Args:
        config: validated.
        resume: go on from the checkpoint in the run's folder.
        overwrite: drop the run that is there.
        teacher_args: ``key=value`` words for the teacher's training.
        command: how the run was started, which it remembers; None: not by a launcher.

    Returns:
        what is written to ``result.json``.

    Raises:
        UserError: anything that the user can put right; nothing is written before everything is built.
        Interrupted: a stop signal arrived, and what there was is saved.
    """
    log_to_console()
    run = RunDir(config.run_dir)
    if not (overwrite or (resume and run.begun)):
        run.refuse_if_taken(config)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        with stop.at_once():
            device, source, task, teacher = stack.enter_context(opened(config, teacher_args))
            if teacher_args and not teacher:
                log.info("teacher_args (--teacher-arg) changes nothing: no teacher is to be trained")
        if teacher:
            generators = [device] if device.type == "cuda" else []
            # The student goes on from the generators that it was built with, and its own lines are for its own log.
            with torch.random.fork_rng(generators), set_aside():
                train_teacher(teacher, source if teacher.config.dataset == config.dataset else None, device, stop)
            resume = resume and run.begun
        elif resume:
            run.refuse_if_new()
        result = fit(config, source, task, device, stop, resume=resume, overwrite=overwrite, command=command)
        stop.too_late = True
        if is_main():
            with log_to_file(run.log):
                log.info(f"next: {next_command(config, command)}")
                log.info(f"curves: tensorboard --logdir {shlex.quote(config.run.root)}")
        return result


@contextmanager
def opened(
    config: Config, teacher_args: Sequence[str]
) -> Iterator[tuple[torch.device, Source, Task, SingleRun | None]]:
    """The device, on which errors are explained, what is made of the config, see `build`, and a missing teacher."""
    device = choose_device(config.training.device)
    keep_freed_memory(device)
    with process_group(device), explaining_limits(device):
        for network in filter(None, (config.student, config.kd and config.kd.teacher)):
            find_builder(network.name)  # refuses an unknown name before data is downloaded
        source, teacher = open_data(config.dataset), find_missing_teacher(config, teacher_args)
        task, source = build(config, source, device)
        yield device, source, task, teacher


def find_missing_teacher(config: Config, overrides: Sequence[str]) -> SingleRun | None:
    """The run that has to come before that of `config`; None if the teacher is there, or its file is named.

    Raises:
        UserError: it is missing, but no config can be found for it.
    """
    if config.kd is None or config.kd.teacher.checkpoint:
        return None
    there = Layout(config.teacher_checkpoint.parents[1])
    if there.best.exists() and (there.result.exists() or not there.begun):  # weights alone may be from elsewhere
        return None
    try:
        return teacher_run(config, overrides)
    except UserError as error:
        raise UserError(
            f"{config.teacher_checkpoint}: no such teacher checkpoint, and training one is not possible: {error}; "
            "kd.teacher.checkpoint=<file> names another"
        ) from error


def train_teacher(teacher: SingleRun, source: Source | None, device: torch.device, stop: StopRequest) -> None:
    """Train a teacher, or go on training it, within the processes of its student.

    Args:
        source: its data set; None if that has to be opened.

    Raises:
        Interrupted: a signal arrived, also if the training had ended by then.
    """
    config, run = teacher.config, Layout(teacher.config.run_dir)
    state = "unfinished: going on with it" if run.begun else "missing: training it first"
    log.info(
        f"teacher {config.title} is {state}, with training.epochs={config.training.epochs}; "
        "teacher_args=training.epochs=<number> changes that (train.py: --teacher-arg)"
    )
    log.info(f"config: {teacher.note}")
    with stop.at_once():
        task, source = build(config, source or open_data(config.dataset), device)
    fit(config, source, task, device, stop, resume=run.begun, command=teacher.command)
    del task
    gc.collect()  # the student needs the memory of the GPU that the engine took
    if any(gather_objects(stop.requested)):
        raise Interrupted(
            f"stopped after the training of the teacher, which is in {run.path}; the same command goes on"
        )


def fit(
    config: Config,
    source: Source,
    task: Task,
    device: torch.device,
    stop: StopRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: Command | None = None,
) -> dict:
    """Train what `build` made of `config` to the end, see `train`.

    The result does not depend on what was trained before in this process.

    Args:
        source: the config's data set, without images that cannot be read.
        task: on the host, with random weights where the teacher's go.
        device: where to train.
        stop: ends the training.
        command: see `train`.
    """
    run = RunDir(config.run_dir)
    with ExitStack() as stack:
        stack.enter_context(closing(run))
        with stop.at_once():
            if config.kd:
                load_teacher(task.teacher, config, source)
            data, phases = prepare(stack, config, source, task, device)
            result = {"teacher_top1": teacher_accuracy(task, config, data, device)} if config.kd else {}
            if config.kd:
                warn([*other_images(config), *poor_teacher(result["teacher_top1"], data.val.labels, config)])
        checkpoint = from_main(run.open(resume=resume, overwrite=overwrite) if is_main() else None)
        engine = Engine(phases, data, run, config, device, checkpoint)
        stack.enter_context(log_to_file(run.log) if is_main() else nullcontext())
        if checkpoint is not None:
            for key, (old, new) in differences(checkpoint["config"], config.to_dict()).items():
                log.info(f"resumed with {key} {new}, which was {old}")
        if is_main():
            write_text(run.config, dump_yaml(config.to_dict()))
            facts = facts_of(task, data, device) | {"command": remembered(config, command)}
            write_text(run.facts, json.dumps(facts, indent=2) + "\n")
        result |= engine.fit(stop)
        if source.test is not None:
            result |= test_best(engine, source)
        if is_main():
            run.write_result(result)
            warn(wide_interval(result["last_top1"], data.val.num_samples))
            log.info(describe_result(config, result, run, task))
    return result


def prepare(
    stack: ExitStack, config: Config, source: Source, task: Task, device: torch.device
) -> tuple[Data, list[Phase]]:
    """The loaders, which `stack` closes, and what is trained, on the device; the log says what they are."""
    set_backends(config)
    data = stack.enter_context(closing(load_data(source, config, device)))
    log.info(
        f"{config.dataset.label} ({data.train.num_samples} train, {data.val.num_samples} val images, "
        f"{source.num_classes} classes) | {config.title} | {name_of(device)} | {config.run_dir}"
    )
    warn(uneven_classes(source, config))
    warn(leaked_images(source) if is_main() else ())  # it reads files
    if advice := precision_advice(device, config.training.precision):
        log.info(advice)
    return data, make_phases(place_task(task, config, device, source.image_size), config)


def test_best(engine: Engine, source: Source) -> dict[str, float]:
    """Accuracies of the best epoch's student on the test images, which nothing was chosen by, in percent."""
    config, device = engine.config, engine.device
    with closing(load_split(source, config, device, "test")) as images:
        found = evaluate(engine.best_student(), images, device, autocast(device, config.training.precision))
    return {f"test_{name}": found[name] for name in ("top1", "top5", "class_mean") if name in found}


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        log.warning(line)


def describe_result(config: Config, result: dict, run: Layout, task: Task) -> str:
    """What came out of a run, in a few lines: accuracies, whether its policy chose, the checkpoint."""
    lines = [
        f"best val {result['best_top1']:.2f}% (epoch {result['best_epoch']}), last {result['last_top1']:.2f}%"
        + (f", EMA {result['ema_last_top1']:.2f}%" if "ema_last_top1" in result else "")
        + (f", teacher {result['teacher_top1']:.2f}%" if "teacher_top1" in result else "")
        + (f", test {result['test_top1']:.2f}% (best epoch)" if "test_top1" in result else ""),
    ]
    if config.kd and (records := read_epochs(run.metrics, "train")):
        if constant := no_choice(config.kd.selection, records):
            where, _, epoch = constant.partition(" since ")
            lines.append(f"no choice: from epoch {epoch} on the student was distilled {where}, whatever the sample")
        lines += excessive_beta(records[-1]["train"], task.beta * task.beta_part.item())
    lines.append(f"checkpoint: {result['checkpoint']}")
    return "\n".join(lines)
