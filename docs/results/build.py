"""Make the tables and figures of docs/results.md, and the README's, out of the CSV files beside this one.

    python docs/results/build.py             # tables and figures out of the CSV files
    python docs/results/build.py run         # first make the CSV files anew, of all runs below these folders

A table stands between ``<!-- results: its name -->`` and ``<!-- end -->``; what is between them is replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from result_lines import Lines, Shares, collect, last, read_lines, read_shares, where  # noqa: E402

from utils.command import Parser, guarded  # noqa: E402
from utils.report.statistics import paired_difference, summarise  # noqa: E402
from utils.report.style import SELECTION_COLORS, figure_legend, mark, png, styled  # noqa: E402
from utils.report.tables import Table  # noqa: E402
from utils.run_folder.read import SINGLE  # noqa: E402

# The folders of the runs (``run.root``), and how the teacher of each was trained.
MANY, END = "50,000 images", "the student's images"
TEACHERS = {"run/all": MANY, "run/long": END}
CHOICES = TEACHERS | {"run/young-20": f"{END}, 20 epochs", "run/young-5": f"{END}, 5 epochs"}
APART = "-apart"  # behind these: homo is false
VARIANTS = ("", APART, f"{APART}-gamma-1")
WHOLE = "run/whole-apart"  # END, a student of 240 epochs
DASHES = {"": "-", APART: "--"}
DIGITS = "run/digits-8"
ADAPTIVE = {"homo: false": APART, "share 1/4": "-quarter"}  # adaptive runs with another setting, by end of folder
NAMES = {"reviewkd": "ReviewKD"}  # of all others, the capitals
MAIN_DISTILLERS = ("at", "sp", "crd")
LOGIT_DISTILLERS = ("dkd", "dist", "reviewkd")
SELECTIONS = ("fixed", "random", "anti", "adaptive")


def main_table(lines: Lines) -> Table:
    """Accuracy of every selection under each teacher, and what the policy gains over distilling everywhere."""
    return Table.of(
        [
            {
                "teacher": teacher,
                "distiller": distiller.upper(),
                **{name: _mean(values) for name, values in found.items()},
                "adaptive - fixed": _difference(found["adaptive"], found["fixed"]),
            }
            for teacher, distiller, found in _rows(lines)
        ]
    )


def difference_table(lines: Lines) -> Table:
    """Further paired differences of the same cells."""
    pairs = (
        ("fixed", "alone"),
        ("adaptive", "alone"),
        ("adaptive", "random"),
        ("adaptive", "anti"),
        ("homo: false", "fixed"),
        ("share 1/4", "adaptive"),
    )
    return Table.of(
        [
            {
                "teacher": teacher,
                "distiller": distiller.upper(),
                **{f"{ours} - {base}": _difference(found[ours], found[base]) for ours, base in pairs},
            }
            for teacher, distiller, found in _rows(lines)
        ]
    )


def _rows(lines: Lines) -> Iterator[tuple[str, str, dict[str, dict[int, float]]]]:
    """Teacher, distiller, and the accuracies by seed of every column."""
    for root, teacher in TEACHERS.items():
        for distiller in MAIN_DISTILLERS:
            selections = {name: last(lines, root=root, distiller=distiller, selection=name) for name in SELECTIONS}
            variants = {name: last(lines, root=root + end, distiller=distiller) for name, end in ADAPTIVE.items()}
            if any(selections.values()):
                yield teacher, distiller, {"alone": last(lines, root="run", selection=SINGLE)} | selections | variants


def _mean(values: dict[int, float]) -> str:
    summary = summarise(values.values())
    if summary is None:
        return "-"
    return f"{summary.mean:.2f}" + ("" if summary.std is None else f" ± {summary.std:.2f}")


def _difference(ours: dict[int, float], base: dict[int, float]) -> str:
    """In bold if its interval does not contain 0."""
    difference = paired_difference(ours, base)
    if difference is None:
        return "-"
    text = str(difference)
    return f"**{text}**" if difference.half_width is not None and abs(difference.mean) > difference.half_width else text


def precision_table(lines: Lines) -> Table:
    """The same cell in float32 and bfloat16."""
    fp32 = where(lines, root="run/fp32")
    cells = {(line.distiller, line.selection): None for line in fp32}
    rows = []
    for distiller, selection in cells:
        cell = {"distiller": distiller, "selection": selection}
        full, half = last(fp32, **cell), last(lines, root="run/all", **cell)
        rows.append(
            {
                "distiller": distiller.upper(),
                "selection": selection,
                "fp32": _mean(full),
                "bf16": _mean(half),
                "bf16 - fp32": _difference(half, full),
            }
        )
    return Table.of(rows)


def newer_table(lines: Lines) -> Table:
    """DKD, DIST and ReviewKD everywhere and where the policy says."""
    rows = []
    for distiller in LOGIT_DISTILLERS:
        fixed, adaptive = (
            last(lines, root="run/all", distiller=distiller, selection=name) for name in ("fixed", "adaptive")
        )
        rows.append(
            {
                "distiller": NAMES.get(distiller, distiller.upper()),
                "fixed": _mean(fixed),
                "adaptive": _mean(adaptive),
                "adaptive - fixed": _difference(adaptive, fixed),
            }
        )
    return Table.of(rows)


def choice_table(lines: Lines, shares: Sequence[Shares]) -> Table:
    """What the policy distils at each spot in its first, fifth and last epoch, means over the seeds in percent."""
    rows = []
    folders = [(root + variant, title) for root, title in CHOICES.items() for variant in VARIANTS]
    for root, title in [*folders, (WHOLE, END)]:
        for distiller in dict.fromkeys(entry.distiller for entry in shares if entry.root == root):
            entries = [e for e in shares if (e.root, e.distiller, e.selection) == (root, distiller, "adaptive")]
            runs = where(lines, root=root, distiller=distiller, selection="adaptive")
            if not runs:
                continue
            rows.append(
                {
                    "teacher": title,
                    "distiller": NAMES.get(distiller, distiller.upper()),
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
    return Table.of(rows)


def _shares_in(entries: Sequence[Shares], epoch: int) -> str:
    """``"f1 97 f2 100 logits 100"``."""
    spots = dict.fromkeys(entry.spot for entry in entries)
    means = {spot: fmean(entry.by_epoch[epoch] for entry in entries if entry.spot == spot) for spot in spots}
    return " ".join(f"{spot} {mean:.0f}" for spot, mean in means.items())


def digits_table(lines: Lines, shares: Sequence[Shares]) -> Table:
    """The default run, and the same without a policy, by seed."""
    rows = []
    for line in where(lines, root=DIGITS, selection="adaptive"):
        entries = [entry for entry in shares if (entry.root, entry.seed) == (DIGITS, line.seed)]
        (fixed,) = where(lines, root=DIGITS, selection="fixed", seed=line.seed)
        rows.append(
            {
                "seed": str(line.seed),
                "teacher": line.teacher_top1,
                "fixed": f"{fixed.last_top1:.2f}",
                "adaptive": f"{line.last_top1:.2f}",
                "distilled in epoch 1": _shares_in(entries, 1),
                "epoch 5": _shares_in(entries, 5),
                "epoch 20": _shares_in(entries, 20),
            }
        )
    return Table.of(rows)


def readme_table(lines: Lines) -> Table:
    """The first rows of the main table."""
    table = main_table(lines)
    return Table(table.header, table.rows[: len(MAIN_DISTILLERS)])


TABLES = {
    "main": lambda lines, _: main_table(lines),
    "readme": lambda lines, _: readme_table(lines),
    "differences": lambda lines, _: difference_table(lines),
    "precision": lambda lines, _: precision_table(lines),
    "newer": lambda lines, _: newer_table(lines),
    "choices": choice_table,
    "digits": digits_table,
}


def filled(document: str, lines: Lines, shares: Sequence[Shares]) -> str:
    """The document with its tables made anew.

    Raises:
        KeyError: there is no table of a name that the document asks for.
    """
    marks = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{TABLES[found[2]](lines, shares).markdown()}\n{found[3]}", document)


def accuracy_figure(lines: Lines) -> Figure:
    """Every seed of every selection as a dot and their mean as a bar, a panel for each teacher."""
    with styled():
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        axes = figure.subplots(1, len(TEACHERS), sharex=True, sharey=True, squeeze=False)[0]
        alone = last(lines, root="run", selection=SINGLE)
        for panel, (root, title) in zip(axes, TEACHERS.items()):
            panel.axvline(fmean(alone.values()), color=SELECTION_COLORS[SINGLE], lw=1, ls="--")
            for row, distiller in enumerate(MAIN_DISTILLERS):
                for place, selection in enumerate(SELECTIONS):
                    values = last(lines, root=root, distiller=distiller, selection=selection)
                    if values:
                        height, color = row + 0.19 * (place - 1.5), SELECTION_COLORS[selection]
                        panel.plot(list(values.values()), [height] * len(values), "o", ms=3.5, color=color, alpha=0.5)
                        panel.plot(fmean(values.values()), height, "|", ms=9, mew=2, color=color)
            panel.set_yticks(range(len(MAIN_DISTILLERS)), [name.upper() for name in MAIN_DISTILLERS])
            panel.set_ylim(len(MAIN_DISTILLERS) - 0.5, -0.5)
            panel.grid(axis="y", visible=False)
            panel.set(title=f"teacher: {title}", xlabel="top-1 on the test images, last epoch (%)")
        handles = [mark(name, SELECTION_COLORS[name], marker="o", ls="", ms=4) for name in SELECTIONS]
        figure_legend(figure, [*handles, mark("student alone, mean", SELECTION_COLORS[SINGLE], ls="--", lw=1)])
    return figure


def share_figure(shares: Sequence[Shares]) -> Figure:
    """Share of samples distilled at each spot under AT, by epoch: a colour for each teacher, dashes without homo."""
    entries = [entry for entry in shares if (entry.distiller, entry.selection) == ("at", "adaptive")]
    colors = dict(zip(CHOICES, SELECTION_COLORS.values()))
    styles = {root + variant: (color, dash) for root, color in colors.items() for variant, dash in DASHES.items()}
    spots = list(dict.fromkeys(entry.spot for entry in entries if entry.root in styles))
    with styled():
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots(1, len(spots), sharey=True, squeeze=False)[0]
        for panel, spot in zip(axes, spots):
            for entry in entries:
                if entry.spot == spot and entry.root in styles:
                    color, dash = styles[entry.root]
                    panel.plot(*zip(*entry.by_epoch.items()), color=color, ls=dash, lw=1.1, alpha=0.8)
            panel.set(title=spot, ylim=(-3, 103), yticks=(0, 50, 100), xlabel="epoch", xscale="log")
            panel.set_xticks((1, 3, 10, 30, 60), ("1", "3", "10", "30", "60"))
        axes[0].set_ylabel("distilled (%)")
        handles = [mark(f"teacher: {title}", colors[root]) for root, title in CHOICES.items()]
        handles += [mark("homo: true", ls=DASHES[""]), mark("homo: false", ls=DASHES[APART])]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def main() -> None:
    parser = Parser(description="Make the tables and figures of docs/results.md out of the CSV files beside this one.")
    parser.add_argument("folders", nargs="*", type=Path, help="make the CSV files anew, of all runs below")
    if folders := parser.parse_args().folders:
        collect(folders)
    lines, shares = read_lines(), read_shares()
    for document in (ROOT / "docs/results.md", ROOT / "README.md"):
        document.write_text(filled(document.read_text(encoding="utf-8"), lines, shares), encoding="utf-8")
    (HERE / "accuracy.png").write_bytes(png(accuracy_figure(lines)))
    (HERE / "shares.png").write_bytes(png(share_figure(shares)))


if __name__ == "__main__":
    guarded(main)
