"""What a checkpoint holds of a run: written here, and put back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from utils.config.changes import deciding_changes
from utils.errors import UserError, reason
from utils.processes.group import is_main, rank
from utils.run_folder.networks import refuse_other_classes
from utils.run_folder.resume import FORMAT, Progress, refuse_other_images
from utils.training.device import set_rng_state

if TYPE_CHECKING:
    from utils.training.engine import Engine


def state_of(engine: Engine, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that a run needs to go on from the step that the engine has just taken.

    Args:
        engine: of the first process.
        processes: of each process its generators, ``rng``, and its `Meter`, ``meter``.
    """
    state = {
        "format": FORMAT,
        "model": {name: value.contiguous() for name, value in engine.task.student.state_dict().items()},
        "extra": engine.task.extra_state(),
        "optimizers": {name: item.state_dict() for name, item in engine.phase.optimizers.items()},
        "processes": processes,
        "progress": asdict(engine.progress),
        "gates": engine.gates.state_dict(),
        "val": engine.val,
        "best": engine.best,
        "threads": torch.get_num_threads(),
        "data": engine.data.source.describe(),
        "config": engine.config.to_dict(),
    }
    return state | ({"ema": engine.phase.average.state_dict()} if engine.phase.average else {})


def restore_state(engine: Engine, checkpoint: dict[str, Any]) -> None:
    """Put `engine` back to where the checkpoint was written.

    Raises:
        UserError: the checkpoint is of other data or of another configuration.
    """
    what = f"{engine.run.path}: its checkpoint"
    refuse_other_classes(checkpoint, engine.data.source, what)
    refuse_other_images(checkpoint, engine.data.train.num_samples, what)
    try:
        engine.progress = Progress(**checkpoint["progress"])
        engine.task.student.load_state_dict(checkpoint["model"])
        engine.task.load_extra_state(checkpoint["extra"])
        if engine.phase.average:  # which may be asked for as late as now
            engine.phase.average.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
        for name, item in engine.phase.optimizers.items():
            item.load_state_dict(checkpoint["optimizers"][name])
        if is_main():
            engine.gates.load_state_dict(checkpoint["gates"])
        engine.val, engine.best = dict(checkpoint["val"]), dict(checkpoint["best"])
        engine.meter.load_state_dicts([process["meter"] for process in checkpoint["processes"]])
        for process in checkpoint["processes"][rank() : rank() + 1]:  # none if there are more now
            set_rng_state(process["rng"], engine.device)
    except Exception as error:
        why = deciding_changes(checkpoint.get("config"), engine.config.to_dict()) or reason(error)
        raise UserError(f"{what} is not of this configuration ({why})") from error
