"""What docs/results.md is made of: a line for each run, and the shares of samples that its policy distilled.

CSV files beside this one hold both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from utils.errors import UserError
from utils.files import write_text
from utils.report.run_table import command_of
from utils.run_folder.read import Run, find_runs

HERE = Path(__file__).parent
RUNS, SHARES = HERE / "runs.csv", HERE / "shares.csv"
SHARE_EPOCHS = (1, 2, 3, 4, 5, 6, 8, *range(10, 60, 5), *range(60, 241, 10))


@dataclass(frozen=True)
class Line:
    """A run of runs.csv, all of it read off its folder; accuracies in percent.

    Attributes:
        root: the folder of the experiment, ``run.root``.
        pixels: height and width of the images, as ``16x16``; empty for the size of the data set.
        teacher_weights: the checkpoint; empty for the best of the teacher's run beside it.
        train_top1: running accuracy on the augmented training images in the last epoch.
        no_choice: where all samples are distilled by a policy that treats them alike, and since which epoch.
        minutes: of all epochs, on the one thread of `device`.
    """

    root: str
    dataset: str
    images: str
    pixels: str
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
            pixels=pixels(run.config["dataset"]),
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
            device=(run.facts or {}).get("device", ""),
            command=command_of(run),
        )


@dataclass(frozen=True)
class Shares:
    """A line of shares.csv: the share of samples that one run distilled at one spot, percent by epoch."""

    root: str
    distiller: str
    selection: str
    seed: int
    spot: str
    by_epoch: dict[int, float]

    @classmethod
    def of(cls, run: Run) -> list[Shares]:
        """Those of a run with a policy, at all its spots, in the epochs that are kept and the last one."""
        kept = [record for record in run.records if record["epoch"] in (*SHARE_EPOCHS, run.epochs)]
        return [
            cls(
                root=run.config["run"]["root"],
                distiller=run.distiller,
                selection=run.selection,
                seed=run.seed,
                spot=spot,
                by_epoch={record["epoch"]: round(100 * record["train"][f"gate/{spot}"], 1) for record in kept},
            )
            for spot in run.gate_labels
        ]


def pixels(dataset: dict[str, Any]) -> str:
    """What `Line.pixels` says of a config's ``dataset``."""
    return f"{dataset['img_h']}x{dataset['img_w']}" if dataset["img_h"] else ""


Lines = Sequence[Line]
Kind = TypeVar("Kind")


def where(lines: Lines, **values: Any) -> list[Line]:
    """The lines that have these values."""
    return [line for line in lines if all(getattr(line, name) == value for name, value in values.items())]


def last(lines: Lines, **values: Any) -> dict[int, float]:
    """Accuracy after the last epoch by seed, of the lines that have these values.

    Raises:
        UserError: they differ in more than their seed, so they are no repetitions of one experiment.
    """
    found = where(lines, **values)
    settings = (
        "dataset",
        "images",
        "pixels",
        "teacher_weights",
        "student",
        "homo",
        "gamma",
        "routing_share",
        "precision",
        "epochs",
    )
    for name in settings:
        if len({getattr(line, name) for line in found}) > 1:
            raise UserError(
                f"{RUNS}: runs with {values} differ in {name}; those of one experiment need a root of their own"
            )
    if len({line.seed for line in found}) < len(found):
        raise UserError(f"{RUNS}: runs with {values} have the same seed")
    return {line.seed: line.last_top1 for line in found}


def read_lines() -> list[Line]:
    return _validated(Line, RUNS, _read_csv(RUNS))


def read_shares() -> list[Shares]:
    records = _read_csv(SHARES)
    by_epoch = [{name: text for name, text in record.items() if name.isdigit() and text} for record in records]
    return _validated(Shares, SHARES, [record | {"by_epoch": of} for record, of in zip(records, by_epoch)])


def _read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _validated(kind: type[Kind], file: Path, records: Sequence[dict[str, Any]]) -> list[Kind]:
    try:
        return TypeAdapter(list[kind]).validate_python(records)
    except ValidationError as error:
        first = error.errors()[0]
        row, column = first["loc"][:2]
        raise UserError(f"{file}: line {row + 2}, {column}: {first['msg']}") from None


def collect(folders: Sequence[Path]) -> tuple[list[Line], list[Shares]]:
    """Read all finished runs below `folders`; say how many others are passed over.

    Raises:
        UserError: there is no finished run.
    """
    runs = find_runs(folders)
    finished = [run for run in runs if run.status == "finished"]
    if not finished:
        raise UserError(f"{', '.join(map(str, folders))}: no finished run")
    print(f"{len(finished)} runs, {len(runs) - len(finished)} more are not finished")
    return [Line.of(run) for run in finished], [entry for run in finished if run.has_policy for entry in Shares.of(run)]


def write_csv_files(lines: Lines, shares: Sequence[Shares]) -> None:
    """What `read_lines` and `read_shares` read."""
    epochs = sorted({epoch for entry in shares for epoch in entry.by_epoch})
    names = [field.name for field in fields(Shares) if field.name != "by_epoch"]
    records = [asdict(entry) | {str(epoch): entry.by_epoch.get(epoch, "") for epoch in epochs} for entry in shares]
    write_text(RUNS, _csv([field.name for field in fields(Line)], map(asdict, lines)))
    write_text(SHARES, _csv([*names, *map(str, epochs)], records))


def _csv(header: Sequence[str], records: Iterable[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, header, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
