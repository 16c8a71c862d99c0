"""The tables of docs/results.md, out of the lines of runs.csv and shares.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import nan
from statistics import fmean

from experiments import (
    ALL_DISTILLERS,
    BY_HEART,
    CHOICES,
    DIGITS,
    DISTILLERS,
    GAMMA,
    LARGE,
    MANY,
    OTHER_FAMILY,
    QUARTER,
    SELECTIONS,
    TEACHERS,
    UNDECIDED,
    WARM,
    WHOLE,
    alone,
)
from result_lines import Lines, Shares, last, where

from utils.report.statistics import paired_difference, summarise

Rows = list[dict[str, str]]


def main_rows(lines: Lines) -> Rows:
    """Accuracy of every selection under each teacher, and what the policy gains over distilling everywhere."""
    return [
        {
            "teacher": teacher,
            "distiller": DISTILLERS[distiller],
            **{name: _mean(values) for name, values in found.items()},
            "adaptive - fixed": _difference(found["adaptive"], found["fixed"]),
        }
        for teacher, distiller, found in _cells(lines)
    ]


def difference_rows(lines: Lines) -> Rows:
    """Further paired differences of the same cells."""
    pairs = (
        ("fixed", "alone"),
        ("adaptive", "alone"),
        ("adaptive", "random"),
        ("adaptive", "anti"),
        ("anti", "alone"),
        ("homo: false", "fixed"),
    )
    return [
        {
            "teacher": teacher,
            "distiller": DISTILLERS[distiller],
            **{f"{ours} - {base}": _difference(found[ours], found[base]) for ours, base in pairs},
        }
        for teacher, distiller, found in _cells(lines)
    ]


def _cells(lines: Lines) -> Iterator[tuple[str, str, dict[str, dict[int, float]]]]:
    """Teacher, distiller, and the accuracies by seed of every column."""
    for root, teacher in TEACHERS.items():
        for distiller in DISTILLERS:
            selections = {name: last(lines, root=root, distiller=distiller, selection=name) for name in SELECTIONS}
            undecided = {"homo: false": last(lines, root=root + UNDECIDED, distiller=distiller, selection="adaptive")}
            if any(selections.values()):
                yield teacher, distiller, {"alone": alone(lines)} | selections | undecided


def _mean(values: dict[int, float]) -> str:
    summary = summarise(values.values())
    if summary is None:
        return ""
    return f"{summary.mean:.2f}" + ("" if summary.std is None else f" ± {summary.std:.2f} ({summary.n})")


def _difference(ours: dict[int, float], base: dict[int, float]) -> str:
    """In bold if its interval does not contain 0."""
    difference = paired_difference(ours, base)
    if difference is None:
        return ""
    text = str(difference)
    return f"**{text}**" if difference.half_width is not None and abs(difference.mean) > difference.half_width else text


def large_rows(lines: Lines) -> Rows:
    """AT under the better resnet20 on small and on large images."""
    rows = []
    for root, base in (("run/all", "run"), (LARGE, LARGE)):
        runs = where(lines, root=root, distiller="at")
        if runs:
            single = alone(lines, base)
            fixed, adaptive = (last(runs, selection=selection) for selection in ("fixed", "adaptive"))
            kd = last(lines, root=root, distiller="kd", selection="fixed")
            undecided, warm = (last(lines, root=root + end, distiller="at") for end in (UNDECIDED, WARM))
            rows.append(
                {
                    "pixels": runs[0].pixels,
                    "alone": _mean(single),
                    "KD": _mean(kd),
                    "fixed": _mean(fixed),
                    "adaptive": _mean(adaptive),
                    "homo: false": _mean(undecided),
                    "fixed, warm-up": _mean(warm),
                    "fixed - KD": _difference(fixed, kd),
                    "adaptive - fixed": _difference(adaptive, fixed),
                    "homo: false - fixed": _difference(undecided, fixed),
                    "(fixed, warm-up) - fixed": _difference(warm, fixed),
                }
            )
    return rows


def share_rows(lines: Lines) -> Rows:
    """A policy that routes a quarter of the batch beside one that routes all of it."""
    rows = []
    for root, teacher in TEACHERS.items():
        for start in (root, root + UNDECIDED):
            for distiller, title in DISTILLERS.items():
                cell = {"distiller": distiller, "selection": "adaptive"}
                whole, quarter = where(lines, root=start, **cell), where(lines, root=start + QUARTER, **cell)
                if quarter:
                    rows.append(
                        {
                            "teacher": teacher,
                            "distiller": title,
                            "homo": quarter[0].homo,
                            "fixed": _mean(last(lines, root=root, distiller=distiller, selection="fixed")),
                            "all": _mean(last(whole)),
                            "1/4": _mean(last(quarter)),
                            "1/4 - all": _difference(last(quarter), last(whole)),
                        }
                    )
    return rows


def distiller_rows(lines: Lines) -> Rows:
    """All distillers beside KD, which all but DKD and DIST contain, under the better resnet20."""
    kd = last(lines, root="run/all", distiller="kd", selection="fixed")
    rows = []
    for distiller, title in ALL_DISTILLERS.items():
        fixed, adaptive = (
            last(lines, root="run/all", distiller=distiller, selection=selection) for selection in ("fixed", "adaptive")
        )
        if fixed:
            rows.append(
                {
                    "distiller": title,
                    "fixed": _mean(fixed),
                    "adaptive": _mean(adaptive),
                    "fixed - alone": _difference(fixed, alone(lines)),
                    "fixed - KD": "" if fixed == kd else _difference(fixed, kd),
                    "adaptive - fixed": _difference(adaptive, fixed),
                }
            )
    return rows


def warm_rows(lines: Lines) -> Rows:
    """Full weights from the start, and weights that grow over five epochs: the plain distiller, and undecided gates."""
    rows = []
    for root, teacher in TEACHERS.items():
        for distiller in DISTILLERS:
            fixed, warm_fixed = (
                last(lines, root=root + end, distiller=distiller, selection="fixed") for end in ("", WARM)
            )
            gates, warm_gates = (_undecided(lines, root, distiller, end) for end in ("", WARM))
            if warm_fixed:
                rows.append(
                    {
                        "teacher": teacher,
                        "distiller": ALL_DISTILLERS[distiller],
                        "fixed": _mean(fixed),
                        "undecided": _mean(gates),
                        "fixed, warm-up": _mean(warm_fixed),
                        "undecided, warm-up": _mean(warm_gates),
                        "(fixed, warm-up) - fixed": _difference(warm_fixed, fixed),
                        "(fixed, warm-up) - undecided": _difference(warm_fixed, gates),
                        "(undecided - fixed), warm-up": _difference(warm_gates, warm_fixed),
                    }
                )
    return rows


def _undecided(lines: Lines, root: str, distiller: str, end: str = "") -> dict[int, float]:
    """The accuracies of the policy whose gates begin undecided: by itself for a pair of two families."""
    roots = (root + end, root + UNDECIDED + end)
    return last(
        [line for line in where(lines, distiller=distiller, homo="false") if line.root in roots], selection="adaptive"
    )


def precision_rows(lines: Lines) -> Rows:
    """The same cell in float32 and bfloat16."""
    fp32 = where(lines, root="run/fp32")
    cells = {(line.distiller, line.selection): None for line in fp32}
    rows = []
    for distiller, selection in cells:
        cell = {"distiller": distiller, "selection": selection}
        full, half = last(fp32, **cell), last(lines, root="run/all", **cell)
        rows.append(
            {
                "distiller": ALL_DISTILLERS[distiller],
                "selection": selection,
                "fp32": _mean(full),
                "bf16": _mean(half),
                "bf16 - fp32": _difference(half, full),
            }
        )
    return rows


def choice_rows(lines: Lines, shares: Sequence[Shares]) -> Rows:
    """What the policy distils at each spot in its first, fifth and last epoch, means over the seeds in percent."""
    rows = []
    ends = [start + gamma for gamma in ("", GAMMA) for start in ("", UNDECIDED)]
    titles = CHOICES | {WHOLE: BY_HEART, LARGE: f"{MANY}, 32x32"}
    for root, title in [(root + end, title) for root, title in titles.items() for end in ends]:
        for distiller in dict.fromkeys(entry.distiller for entry in shares if entry.root == root):
            entries = [e for e in shares if (e.root, e.distiller, e.selection) == (root, distiller, "adaptive")]
            runs = where(lines, root=root, distiller=distiller, selection="adaptive")
            if not runs:
                continue
            rows.append(
                {
                    "teacher": title,
                    "distiller": ALL_DISTILLERS[distiller],
                    "homo": runs[0].homo,
                    "gamma": runs[0].gamma.removesuffix(".0"),
                    "epochs": str(runs[0].epochs),
                    "seeds": str(len(runs)),
                    **{f"epoch {n}": _shares_in(entries, n) for n in (1, 5)},
                    "last epoch": _shares_in(entries, runs[0].epochs),
                    "top-1": _mean(last(runs)),
                    "no choice since epoch": ", ".join(line.no_choice.rpartition(" ")[2] or "-" for line in runs),
                }
            )
    return rows


def _shares_in(entries: Sequence[Shares], epoch: int) -> str:
    """``"f1 97 f2 100 logits 100"``."""
    spots = dict.fromkeys(entry.spot for entry in entries)
    means = {spot: fmean(entry.by_epoch.get(epoch, nan) for entry in entries if entry.spot == spot) for spot in spots}
    return " ".join(f"{spot} {mean:.0f}" for spot, mean in means.items())


def digits_rows(lines: Lines, shares: Sequence[Shares]) -> Rows:
    """The default run, and the same without a policy, by seed."""
    rows = []
    for line in where(lines, root=DIGITS, selection="adaptive"):
        entries = [e for e in shares if (e.root, e.selection, e.seed) == (DIGITS, "adaptive", line.seed)]
        rows.append(
            {
                "seed": str(line.seed),
                "teacher": line.teacher_top1,
                "fixed": _mean(last(lines, root=DIGITS, selection="fixed", seed=line.seed)),
                "adaptive": _mean({line.seed: line.last_top1}),
                "distilled in epoch 1": _shares_in(entries, 1),
                "epoch 5": _shares_in(entries, 5),
                "epoch 20": _shares_in(entries, 20),
            }
        )
    return rows


def readme_rows(lines: Lines) -> Rows:
    """The rows of the main table under the two better teachers."""
    return [row for row in main_rows(lines) if row["teacher"] in (MANY, OTHER_FAMILY)]


TABLES = {
    "main": lambda lines, _: main_rows(lines),
    "readme": lambda lines, _: readme_rows(lines),
    "differences": lambda lines, _: difference_rows(lines),
    "large": lambda lines, _: large_rows(lines),
    "share": lambda lines, _: share_rows(lines),
    "warm": lambda lines, _: warm_rows(lines),
    "distillers": lambda lines, _: distiller_rows(lines),
    "precision": lambda lines, _: precision_rows(lines),
    "choices": choice_rows,
    "digits": digits_rows,
}
