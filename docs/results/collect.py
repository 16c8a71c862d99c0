"""From the run folders to the lines of runs.csv and shares.csv, for build.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.report.tables import command_of
from utils.run_folder.read import Run, find_runs

SHARE_EPOCHS = (1, 2, 3, 4, 5, 6, 8, *range(10, 60, 5), *range(60, 241, 10))


def run_line(run: Run) -> dict[str, Any]:
    """A line of runs.csv; accuracies in percent, ``train_top1`` on the augmented images of the last epoch."""
    known, data = run.settings, run.config["dataset"]
    policy = known if run.has_policy else {}
    return {
        "root": run.config["run"]["root"],
        "dataset": run.dataset,
        "images": run.data,
        "pixels": f"{data['img_h']}x{data['img_w']}" if data["img_h"] else "",  # else those of the data set
        "teacher": run.teacher,
        "teacher_weights": run.teacher_weights,
        "student": run.student,
        "distiller": run.distiller,
        "selection": run.selection,
        "seed": run.seed,
        "homo": str(known.get("kd_loss.homo", "")).lower(),
        "gamma": policy.get("kd.loss_weights.classify_weight", ""),
        "routing_share": policy.get("kd.routing_share", ""),
        "precision": run.config["training"]["precision"],
        "epochs": run.epochs,
        "last_top1": round(run.last_top1, 2),
        "best_top1": round(run.best_top1, 2),
        "teacher_top1": "" if run.teacher_top1 is None else f"{run.teacher_top1:.2f}",
        "train_top1": round(run.curve("train.top1").iloc[-1], 2),
        "no_choice": run.no_choice or "",
        "minutes": round(run.seconds / 60, 1),
        "device": run.facts.get("device", ""),
        "command": command_of(run),
    }


def share_lines(run: Run) -> list[dict[str, Any]]:
    """The lines of shares.csv of a run with a policy."""
    named = {"root": run.config["run"]["root"], "distiller": run.distiller}
    named |= {"selection": run.selection, "seed": run.seed}
    kept = [epoch for epoch in run.curve("epoch").index if epoch in (*SHARE_EPOCHS, run.epochs)]
    curves = {spot: (100 * run.curve(f"train.gate/{spot}")).round(1)[kept] for spot in run.gate_labels}
    return [named | {"spot": spot} | {str(epoch): curve[epoch] for epoch in kept} for spot, curve in curves.items()]


def collect(folders: Sequence[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """runs.csv and shares.csv of all finished runs below `folders`.

    Raises:
        UserError: there is no finished run.
    """
    runs = find_runs(folders)
    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise UserError(f"{', '.join(map(str, folders))}: no finished run")
    print(f"{len(finished)} runs, {len(runs) - len(finished)} more are not finished")
    shares = pd.DataFrame([line for run in finished if run.has_policy for line in share_lines(run)])
    epochs = sorted((name for name in shares if name.isdigit()), key=int)
    return pd.DataFrame(map(run_line, finished)), shares[[*(n for n in shares if n not in epochs), *epochs]]
