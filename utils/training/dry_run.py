"""``--dry-run``: what a run would do, and how long it would take. Nothing is written."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from datasets import Data
from models import StagedModel
from utils.config import Config
from utils.config.yaml_text import dump_yaml
from utils.run_folder.folder import RunDir
from utils.training.build import load_teacher
from utils.training.facts import flops_without_computing
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.precision import autocast
from utils.training.run import opened, prepare
from utils.training.step import EagerStep, Phase

WARM_UP, TIMED = 3, 5  # steps; libraries choose their kernels in the first ones


def dry_run(config: Config, teacher_args: Sequence[str] = (), *, resume: bool = False, overwrite: bool = False) -> None:
    """Print the settings of a run, what it is made of, and the time and memory of a few of its steps.

    Args:
        config: validated.
        teacher_args: ``key=value`` words for the training of a missing teacher.
        resume: the run would go on with the one that is there.
        overwrite: it would take its place.

    Raises:
        UserError: what the run itself would raise before its first step.
    """
    print(dump_yaml(config.to_dict()))
    with ExitStack() as stack:
        device, source, task, missing = stack.enter_context(opened(config, teacher_args))
        if config.kd and missing is None:
            load_teacher(task.teacher, config, source)
        networks = {"student": task.student, "teacher": task.teacher} if config.kd else {"network": task.student}
        for role, network in networks.items():
            print(f"{role}: {describe_network(network, source.image_size)}")
        if missing:
            print(f"the teacher is trained first, {missing.config.training.epochs} epochs that are not counted here")
        if config.kd:
            print(f"spots: {', '.join(task.gate_labels)}")
        data, phases = prepare(stack, config, source, task, device)
        total = 0.0
        for phase in phases:
            print(f"{phase.name}: {'; '.join(describe_optimizers(phase))}")
            step = step_seconds(phase, data, config, device)
            total += step * len(data.train) * phase.epochs
            print(f"{phase.name}: {1000 * step:.1f} ms a step, {len(data.train)} steps an epoch, {phase.epochs} epochs")
    print(f"in all about {tqdm.format_interval(total)} without validation, {peak_gigabytes(device):.2f} GB at most")
    run = RunDir(config.run_dir)
    if resume and not missing:
        run.refuse_if_new()
    elif not (resume or overwrite):
        run.refuse_if_taken(config)


def describe_network(network: StagedModel, size: tuple[int, int]) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    flops = flops_without_computing(network, size)
    cost = "unknown FLOPs" if flops is None else f"{flops / 1e6:,.1f} MFLOPs an image"
    shapes = ("x".join(map(str, shape)) for shape in network.feature_shapes(*size))
    return f"{parameters:,} parameters, {cost}, features {' '.join(shapes)}"


def describe_optimizers(phase: Phase) -> Iterator[str]:
    for name, scheduled in phase.optimizers.items():
        count = sum(parameter.numel() for parameter in scheduled.group["params"])
        yield f"{type(scheduled.optimizer).__name__} of {name}, learning rate {scheduled.lr:g}, {count:,} parameters"


def step_seconds(phase: Phase, data: Data, config: Config, device: torch.device) -> float:
    """Mean time of a training step, its batch included. It is not captured as a CUDA graph, so a run may be faster."""
    labels = list(phase.task.gate_labels)
    gates = GateRecorder(labels, data.source.num_classes, data.train.num_samples, device)
    phase.task.train()
    step = EagerStep(phase, Meter(device), gates, autocast(device, config.training.precision))
    batches = itertools.chain.from_iterable(map(data.train.epoch, itertools.count(1)))
    timer = Timer(
        "step(next(batches))", globals={"step": step, "batches": batches}, num_threads=torch.get_num_threads()
    )
    timer.timeit(WARM_UP)
    return timer.timeit(TIMED).mean


def peak_gigabytes(device: torch.device) -> float:
    """Peak memory of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
