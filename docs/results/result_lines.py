"""What docs/results.md is made of: a line for each run, and the shares of samples that its policy distilled."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from utils.report.run_table import command_of
from utils.run_folder.read import Run, find_runs

HERE = Path(__file__).parent
RUNS, SHARES = HERE / "runs.csv", HERE / "shares.csv"
SHARE_EPOCHS = (1, 2, 3, 4, 5, 6, 8, *range(10, 60, 5), *range(60, 241, 10))


@dataclass(frozen=True)
class Line:
    """A run of results.csv, all of it read off its folder; accuracies in percent.

    Attributes:
        root: the folder of the experiment, ``run.root``.
        teacher_weights: the checkpoint; empty for the best of the teacher's run beside it.
        train_top1: running accuracy on the augmented training images in the last epoch.
        no_choice: where all samples are distilled by a policy that treats them alike, and since which epoch.
        minutes: of all epochs, on the one thread of `device`.
    """

    root: str
    dataset: str
    images: str
    teacher: str
    teacher_weights: str
    student: str
    distiller: str
    selection: str
    seed: int
    homo: str
    gamma: str
    routing_share: str
    precision: str
    epochs: int
    last_top1: float
    best_top1: float
    teacher_top1: str
    train_top1: float
    no_choice: str
    minutes: float
    device: str
    command: str

    @classmethod
    def of(cls, run: Run) -> Line:
        kd, loss = run.config.get("kd") or {}, run.config.get("kd_loss") or {}
        return cls(
            root=run.config["run"]["root"],
            dataset=run.dataset,
            images=run.config["dataset"]["root"],
            teacher=run.teacher,
            teacher_weights=kd["teacher"]["checkpoint"] or "" if kd else "",
            student=run.student,
            distiller=run.distiller,
            selection=run.selection,
            seed=run.seed,
            homo=str(loss.get("homo", "")).lower(),
            gamma=str(kd["loss_weights"]["classify_weight"]) if run.has_policy else "",
            routing_share=str(kd["routing_share"]) if run.has_policy else "",
            precision=run.config["training"]["precision"],
            epochs=run.epochs,
            last_top1=round(run.last_top1, 2),
            best_top1=round(run.best_top1, 2),
            teacher_top1="" if run.teacher_top1 is None else f"{run.teacher_top1:.2f}",
            train_top1=round(run.records[-1]["train"]["top1"], 2),
            no_choice=run.no_choice.short if run.no_choice else "",
            minutes=round(run.seconds / 60, 1),
            device=run.facts["device"],
            command=command_of(run),
        )


@dataclass(frozen=True)
class Shares:
    """A line of results-shares.csv: the share of samples that one run distilled at one spot, percent by epoch."""

    root: str
    distiller: str
    selection: str
    seed: int
    spot: str
    by_epoch: dict[int, float]

    @classmethod
    def of(cls, run: Run) -> list[Shares]:
        """Those of a run with a policy, at all its spots."""
        return [
            cls(
                run.config["run"]["root"],
                run.distiller,
                run.selection,
                run.seed,
                spot,
                {r["epoch"]: round(100 * r["train"][f"gate/{spot}"], 1) for r in run.records if _is_kept(r["epoch"])},
            )
            for spot in run.gate_labels
        ]


def _is_kept(epoch: int) -> bool:
    return epoch in SHARE_EPOCHS


Lines = Sequence[Line]


def where(lines: Lines, **values: Any) -> list[Line]:
    """The lines that have these values."""
    return [line for line in lines if all(getattr(line, name) == value for name, value in values.items())]


def last(lines: Lines, **values: Any) -> dict[int, float]:
    """Accuracy after the last epoch by seed, of the lines that have these values."""
    return {line.seed: line.last_top1 for line in where(lines, **values)}


def read_lines() -> list[Line]:
    numbers = {"seed": int, "epochs": int} | dict.fromkeys(("last_top1", "best_top1", "train_top1", "minutes"), float)
    return [Line(**{name: numbers.get(name, str)(text) for name, text in record.items()}) for record in _read_csv(RUNS)]


def read_shares() -> list[Shares]:
    found = []
    for record in _read_csv(SHARES):
        by_epoch = {int(name): float(text) for name, text in record.items() if name.isdigit() and text}
        texts = {field.name: record[field.name] for field in fields(Shares) if field.name in record}
        found.append(Shares(**texts | {"seed": int(record["seed"])}, by_epoch=by_epoch))
    return found


def collect(folders: Sequence[Path]) -> None:
    """Write the CSV files of all finished runs below `folders`."""
    runs = [run for run in find_runs(folders) if run.status == "finished"]
    _write_csv(RUNS, [asdict(Line.of(run)) for run in runs])
    shares = []
    for entry in (entry for run in runs if run.has_policy for entry in Shares.of(run)):
        record = asdict(entry)
        by_epoch = record.pop("by_epoch")
        shares.append(record | {str(epoch): by_epoch.get(epoch, "") for epoch in SHARE_EPOCHS})
    _write_csv(SHARES, shares)


def _read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _write_csv(file: Path, records: Sequence[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
