"""From a validated config to a finished run."""

from __future__ import annotations

from contextlib import closing

import torch
import yaml

from datasets import Data
from datasets.loading.decode import naming_dead_workers
from utils.config import Config
from utils.config.changes import differences
from utils.errors import UserError
from utils.files import write_text
from utils.processes.group import from_main, is_main, process_group, world_size
from utils.run_folder.folder import RunDir
from utils.run_folder.networks import refuse_run_of_others
from utils.training.build import build_distillation, build_single, load_data
from utils.training.cuda_graph import refuse_impossible
from utils.training.device import choose_device, keep_freed_memory, naming_exhausted_memory, set_up
from utils.training.engine import Engine
from utils.training.reporter import log, log_to_console


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
    if not overwrite:
        refuse_run_of_others(run.path, config)
    if not (resume or overwrite):
        run.refuse_if_taken()
    device = choose_device(config.training.device)
    keep_freed_memory(device)
    set_up(config)
    with (
        naming_exhausted_memory(device),
        process_group(device),
        closing(load_data(config, device)) as data,
        closing(run),
    ):
        log.info(describe(config, data, device))
        phases, result = (build_distillation if config.kd else build_single)(config, data, device)
        refuse_impossible(config.training.cuda_graph, device, [phase.task for phase in phases])
        checkpoint = open_run(run, config, resume=resume, overwrite=overwrite)
        result |= Engine(phases, data, run, config, device, checkpoint).fit()
        if is_main():
            run.write_result(result)
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


def describe(config: Config, data: Data, device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if world_size() > 1:
        where = f"{world_size()} processes, each on {where}"
    return (
        f"{config.dataset.label} ({data.train.num_samples} train, {data.val.num_samples} val images, "
        f"{data.num_classes} classes) | {config.title} | {where} | {config.run_dir}"
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
