"""From a validated config to a finished run."""

from __future__ import annotations

import inspect
from contextlib import closing
from pathlib import Path

import torch
import yaml

from datasets import Data, build_data
from datasets.decode import naming_dead_workers
from distillers import DISTILLERS
from distillers.base import Distiller, Setting
from distillers.pretraining import Pretraining
from distillers.spot_adaptive import SpotAdaptiveDistillation
from models import StagedModel, get_model
from utils.checkpoint import load_weights
from utils.config import Config, ModelConfig
from utils.config.changes import differences
from utils.cuda_graph import refuse_impossible
from utils.device import choose_device, keep_freed_memory, place_task, set_up
from utils.distributed import from_main, is_main, process_group, rank, world_size
from utils.engine import Engine, Phase, evaluate
from utils.errors import UserError
from utils.files import write_text
from utils.optim import make_optimizers
from utils.reporter import log, log_to_console
from utils.run_dir import RunDir
from utils.task import Classification, Task


@naming_dead_workers()
def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run what `config` describes, a single network or a distillation, and say where the result is.

    Args:
        config: validated.
        resume: go on from the checkpoint in the run's folder.
        overwrite: drop the run that is there.

    Returns:
        what is written to ``result.json``.

    Raises:
        UserError: anything that the user can put right; nothing is written before everything is built.
    """
    log_to_console()
    run = RunDir(config.run_dir)
    if not (resume or overwrite):
        run.refuse_if_taken()
    device = choose_device(config.training.device)
    keep_freed_memory(device)
    set_up(config)
    with process_group(device), closing(load_data(config, device)) as data, closing(run):
        try:
            log.info(describe(config, data, device))
            phases, result = (build_distillation if config.kd else build_single)(config, data, device)
            refuse_impossible(config.training.cuda_graph, device, [phase.task for phase in phases])
            checkpoint = open_run(run, config, resume=resume, overwrite=overwrite)
            result |= Engine(phases, data, run, config, device, checkpoint).fit()
            if is_main():
                run.write_result(result)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{device}: out of memory; a smaller training.batch_size or training.precision=bf16 takes less"
            ) from error
    log.info(farewell(config, result))
    return result


def open_run(run: RunDir, config: Config, *, resume: bool, overwrite: bool) -> dict | None:
    """Take the folder and put the config there, which the first process does for all. The checkpoint to go on from."""
    checkpoint = None
    if is_main():
        checkpoint = run.open(resume=resume, overwrite=overwrite)
        if checkpoint is not None:
            check_unchanged(checkpoint, config)
        write_text(run.config, yaml.safe_dump(config.to_dict(), sort_keys=False))
    return from_main(checkpoint)


def check_unchanged(checkpoint: dict, config: Config) -> None:
    """Say which settings of a resumed run have changed; in the middle of an epoch its batches must not.

    Raises:
        UserError: the batch size is another one and the epoch is not at its end.
    """
    match checkpoint:
        case {"config": dict(before), "progress": {"step": int(step)}}:
            changes = differences(before, config.to_dict())
        case _:  # no checkpoint of a run; the engine is about to say so
            return
    for key, (old, new) in changes.items():
        log.info(f"resumed with {key} {new}, which was {old}")
    if step and "training.batch_size" in changes:
        old, new = changes["training.batch_size"]
        raise UserError(
            f"training.batch_size: found {new}, but the run was stopped in the middle of an epoch of batches of {old}; "
            f"resume with training.batch_size={old}"
        )


def load_data(config: Config, device: torch.device) -> Data:
    """Both loaders of the config's data set, on `device`."""
    training, validation = config.training, config.validation
    return build_data(
        config.dataset,
        batch_size=training.batch_size,
        val_batch_size=validation.batch_size,
        num_workers=training.num_workers,
        val_num_workers=validation.num_workers,
        seed=training.seed,
        device=device,
        shard=(rank(), world_size()),
    )


def build_single(config: Config, data: Data, device: torch.device) -> tuple[list[Phase], dict]:
    """One network under cross-entropy."""
    model = build_network(config.model, data)
    if config.model.checkpoint:
        load_weights(model, Path(config.model.checkpoint), new_head=config.model.new_head, name=config.model.name)
    task = synchronize_batchnorm(place_task(Classification(model), config, device, data.image_size), config, device)
    return [make_phase("train", task, config.training.epochs, config)], {}


def build_distillation(config: Config, data: Data, device: torch.device) -> tuple[list[Phase], dict]:
    """A student under a teacher, after the distiller's own phase if it has one; also the teacher's accuracy."""
    kd = config.kd
    # The student comes first: it starts from the same weights whatever the distiller and the selection are.
    student = build_network(kd.student, data)
    if kd.student.checkpoint:
        load_weights(student, Path(kd.student.checkpoint), new_head=kd.student.new_head, name=kd.student.name)
    teacher = build_network(kd.teacher, data)
    load_weights(teacher, find_teacher(config), name=f"the teacher {kd.teacher.name}")
    task = place_task(assemble(config, student, teacher, data), config, device, data.image_size)
    task = synchronize_batchnorm(task, config, device)
    accuracy = evaluate(task.teacher, data.val, device, lambda: torch.autocast(device.type, enabled=False))
    log.info(f"teacher {kd.teacher.name}: val {accuracy['top1']:.2f}% top-5 {accuracy['top5']:.2f}%")
    phases = [make_phase("train", task, config.training.epochs, config)]
    if task.distiller.pretraining_parameters(task.student):
        pretraining = Pretraining(task.student, task.teacher, task.distiller)
        phases.insert(0, make_phase("pretrain", pretraining, config.pretrain.epochs, config))
    return phases, {"teacher_top1": accuracy["top1"]}


def assemble(config: Config, student: StagedModel, teacher: StagedModel, data: Data) -> SpotAdaptiveDistillation:
    """Join the networks by the config's distiller and selection."""
    kd, options = config.kd, config.kd_loss
    student_shapes = student.feature_shapes(*data.image_size)
    teacher_shapes = teacher.feature_shapes(*data.image_size)
    setting = Setting(
        student=student_shapes,
        teacher=teacher_shapes,
        labels=data.train.labels,
        spots=options.spots,
        feat_dim=options.feat_dim,
        pair=f"{kd.teacher.name}-{kd.student.name}",
    )
    distiller = make_distiller(options.name, setting, options.options)
    beta = kd.loss_weights.other_kd
    return SpotAdaptiveDistillation(
        student,
        teacher,
        distiller,
        student_shapes,
        teacher_shapes,
        selection=kd.selection,
        homogeneous=options.homo,
        alpha=kd.loss_weights.kd_weight,
        beta=distiller.default_weight if beta is None else beta,
        gamma=kd.loss_weights.classify_weight,
        temperature=options.KD_T,
        gate_temperature=kd.gate_temperature,
    )


def make_distiller(name: str, setting: Setting, options: dict) -> Distiller:
    """The distiller called `name`, built with `options`; an option that it does not have is a UserError."""
    kind = DISTILLERS.get(name)
    known = [key for key in inspect.signature(kind).parameters if key != "setting"]
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"kd_loss.options: {name} has no option {key!r}; {has}")
    return kind(setting, **options)


def build_network(config: ModelConfig, data: Data) -> StagedModel:
    return get_model(
        config.name, data.num_classes, stages=config.stages, kwargs=config.kwargs, image_size=data.image_size
    )


def synchronize_batchnorm(task: Task, config: Config, device: torch.device) -> Task:
    """With ``training.sync_bn``, let every BatchNorm layer normalise by the statistics of all processes together.

    Parameters and buffers stay the same tensors, so optimisers and the student's frozen twin need not know.
    """
    if not config.training.sync_bn:
        return task
    if device.type != "cuda":
        raise UserError(f"training.sync_bn: needs GPUs, PyTorch has it for no other device, and this is the {device}")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(task) if world_size() > 1 else task


def make_phase(name: str, task: Task, epochs: int, config: Config) -> Phase:
    return Phase(name, task, epochs, make_optimizers(task.parameter_groups(), config))


def find_teacher(config: Config) -> Path:
    """Where the teacher's weights are.

    Raises:
        UserError: they are not there; the line says how to get them.
    """
    path = config.teacher_checkpoint
    if not path.exists():
        raise UserError(
            f"{path}: no such teacher checkpoint; dataset={config.dataset.label} seed={config.training.seed} "
            f"model={config.kd.teacher.name} sh train_single.sh trains it, kd.teacher.checkpoint=<file> names another"
        )
    return path


def describe(config: Config, data: Data, device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if world_size() > 1:
        where = f"{world_size()} processes, each on {where}"
    what = (
        config.model.name
        if config.model
        else (f"{config.kd_loss.name}, {config.kd.selection}, {config.kd.teacher.name} -> {config.kd.student.name}")
    )
    return (
        f"{config.dataset.label} ({data.train.num_samples} train, {data.val.num_samples} val images, "
        f"{data.num_classes} classes) | {what} | {where} | {config.run_dir}"
    )


def farewell(config: Config, result: dict) -> str:
    """The last lines of a run: accuracies, the checkpoint, and what one might run next."""
    label, seed = config.dataset.label, config.training.seed
    lines = [
        f"best val {result['best_top1']:.2f}% (epoch {result['best_epoch']}), last {result['last_top1']:.2f}%"
        + (f", teacher {result['teacher_top1']:.2f}%" if "teacher_top1" in result else ""),
        f"checkpoint: {result['checkpoint']}",
    ]
    if config.model:
        lines.append(
            f"next: dataset={label} seed={seed} net1={config.model.name} net2=<student> distiller=at sh train.sh"
        )
    else:
        pair = f"net1={config.kd.teacher.name} net2={config.kd.student.name} distiller={config.kd_loss.name}"
        other = "train.sh kd.selection=fixed" if config.kd.selection == "anti" else "train_anti.sh"
        lines.append(f"next: dataset={label} seed={seed} {pair} sh {other}")
    lines.append(f"curves: tensorboard --logdir {config.run.root}")
    return "\n".join(lines)
