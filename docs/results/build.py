"""Make the tables of the documents, and the figures, from the CSV files beside this one.

    python docs/results/build.py             # tables and figures of the CSV files
    python docs/results/build.py run         # first add all finished runs below these folders to the CSV files

A table stands between ``<!-- results: its name -->`` and ``<!-- end -->``; what is between them is replaced. A line of
runs.csv is a run; one of shares.csv has the percentage of samples that one run distilled at one spot, by epoch.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from scipy.special import stdtr

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from collect import collect  # noqa: E402

from utils.command import Parser, guarded  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.files import write_bytes, write_text  # noqa: E402
from utils.report.statistics import mean_text, paired_difference  # noqa: E402
from utils.report.style import SELECTION_COLORS, figure_legend, mark, png, styled  # noqa: E402
from utils.report.table import markdown  # noqa: E402
from utils.report.tables import without_empty  # noqa: E402
from utils.run_folder.read import SINGLE  # noqa: E402

RUNS, SHARES = HERE / "runs.csv", HERE / "shares.csv"
# What tells a line from every other one of its file.
KEYS = {RUNS: ["root", "student", "distiller", "selection", "seed"]}
KEYS[SHARES] = ["root", "distiller", "selection", "seed", "spot"]

# What repetitions have in common; they differ in their seed.
SETTINGS = ["dataset", "images", "pixels", "teacher_weights", "homo", "gamma", "routing_share", "precision"]
SETTINGS += ["epochs"]

# The folders of the runs (``run.root``) by their teacher; the student is resnet8. A folder of the first two ends in
# "-apart" where the gates begin undecided, which is the rule for the last two.
TEACHERS = {
    "run/all": "resnet20, 50,000 images",
    "run/long": "resnet20, 5,000 memorised",
    "run/wide": "wrn_16_2, 50,000 images",
    "run/wide-long": "wrn_16_2, 5,000 memorised",
}
# Runs of further machines lie below folders of their own, under teachers that were trained there. Only runs of one
# machine are compared with each other, since its teachers and its bits are its own.
MACHINES = ("run", "run/amd", "run/zen")
RUN = ("fixed", "random", "anti", "adaptive")  # selections
OWN_COLORS = {"homo: false": "#000000", "balanced": "#E69F00"}  # further columns of the main table
DISTILLERS = {"at": "AT", "sp": "SP", "crd": "CRD"}
LOGITS = {"dkd": "DKD", "dist": "DIST", "nkd": "NKD", "wttm": "WTTM"}  # losses at the logits alone
NEWER = {"vid": "VID", "reviewkd": "ReviewKD"}

PLAIN, WARM, KD = "plain distiller", "plain distiller, warm-up", "KD alone"
OPEN, UNDECIDED, UNDECIDED_WARM = "policy, open gates", "policy, undecided gates", "policy, undecided gates, warm-up"
ONCE, QUARTER = "policy", "policy, 1/4 of the batch"
BALANCED, STANDARD = "plain distiller, balanced", "KD alone, standardised logits"
TIGHT, LOOSE = "plain distiller, balanced, 0.25", "plain distiller, balanced, 1"
SMALL, LARGE = "16x16", "32x32"

# Students to compare: pixels; what one is, its folder and selection; the same of the other; the distillers.
COMPARISONS = [
    (SMALL, UNDECIDED, "run/all-apart adaptive", PLAIN, "run/all fixed", ("at", "sp", "crd")),
    (SMALL, UNDECIDED, "run/long-apart adaptive", PLAIN, "run/long fixed", ("at",)),
    (SMALL, WARM, "run/all-warm fixed", PLAIN, "run/all fixed", ("at", "sp", "crd")),
    (SMALL, WARM, "run/wide-warm fixed", PLAIN, "run/wide fixed", ("sp",)),
    (SMALL, WARM, "run/all-warm fixed", UNDECIDED, "run/all-apart adaptive", ("at",)),
    (SMALL, WARM, "run/wide-warm fixed", UNDECIDED, "run/wide adaptive", ("sp",)),
    (SMALL, UNDECIDED_WARM, "run/all-apart-warm adaptive", WARM, "run/all-warm fixed", ("at",)),
    (SMALL, UNDECIDED_WARM, "run/wide-warm adaptive", WARM, "run/wide-warm fixed", ("sp",)),
    (SMALL, PLAIN, "run/all fixed", KD, "run/all fixed kd", ("at", "sp", "crd", "reviewkd", *LOGITS)),
    (SMALL, STANDARD, "run/all-standardized fixed kd", KD, "run/all fixed kd", ("kd",)),
    (SMALL, BALANCED, "run/all-balanced fixed", KD, "run/all fixed kd", ("at", "sp", "crd")),
    (SMALL, LOOSE, "run/all-balanced-1 fixed", BALANCED, "run/all-balanced fixed", ("at", "sp")),
    (SMALL, TIGHT, "run/all-balanced-0.25 fixed", BALANCED, "run/all-balanced fixed", ("at", "sp")),
    (SMALL, LOOSE, "run/wide-balanced-1 fixed", BALANCED, "run/wide-balanced fixed", ("at", "sp")),
    (SMALL, TIGHT, "run/wide-balanced-0.25 fixed", BALANCED, "run/wide-balanced fixed", ("at", "sp")),
    (SMALL, "anti", "run/wide anti", "student alone", "run single alone", ("at", "sp")),
    (SMALL, QUARTER, "run/all-quarter adaptive", ONCE, "run/all adaptive", ("at", "sp", "crd")),
    (SMALL, f"{UNDECIDED}, 1/4", "run/all-apart-quarter adaptive", UNDECIDED, "run/all-apart adaptive", ("at",)),
    (SMALL, QUARTER, "run/long-quarter adaptive", ONCE, "run/long adaptive", ("at", "sp")),
    (SMALL, QUARTER, "run/wide-quarter adaptive", ONCE, "run/wide adaptive", ("at", "sp", "crd")),
    (SMALL, QUARTER, "run/wide-long-quarter adaptive", ONCE, "run/wide-long adaptive", ("at", "sp")),
    (SMALL, "policy, bf16", "run/all adaptive", "policy, fp32", "run/fp32 adaptive", ("sp",)),
    (LARGE, OPEN, "run/pixels-32 adaptive", PLAIN, "run/pixels-32 fixed", ("at",)),
    (LARGE, UNDECIDED, "run/pixels-32-apart adaptive", PLAIN, "run/pixels-32 fixed", ("at",)),
    (LARGE, WARM, "run/pixels-32-warm fixed", PLAIN, "run/pixels-32 fixed", ("at", "sp")),
    (LARGE, PLAIN, "run/pixels-32 fixed", KD, "run/pixels-32 fixed kd", ("at",)),
]

# What is tried against a distiller that is too strong, and to tell the choice of samples from their number: ending of
# the folder, and selection. Under wrn_16_2, gates begin undecided without the word "-apart".
ARMS = {
    "fixed": ("", "fixed"),
    "warm-up": ("-warm", "fixed"),
    "balanced": ("-balanced", "fixed"),
    "c 0.25": ("-balanced-0.25", "fixed"),
    "c 1": ("-balanced-1", "fixed"),
    "undecided": ("-apart", "adaptive"),
    "shuffled": ("-apart", "shuffled"),
    "balanced, undecided": ("-balanced-apart", "adaptive"),
}
ARM_TEACHERS = {"run/all": SMALL, "run/wide": SMALL, "run/pixels-32": LARGE}
# Stated before the runs were looked at. The p-values of the cells of one question are corrected together.
QUESTIONS = [
    ("balanced", "fixed"),
    ("balanced", "warm-up"),
    ("undecided", "shuffled"),
    ("balanced, undecided", "balanced"),
]


Cells = dict[tuple[str, str, str], pd.Series]


def by_cell(runs: pd.DataFrame) -> Cells:
    """Top-1 of resnet8 after the last epoch by seed, for each root, selection and distiller.

    Raises:
        UserError: the runs of one differ in more than their seed, so they are no repetitions of one experiment.
    """
    found = {}
    for cell, repetitions in runs[runs["student"] == "resnet8"].groupby(["root", "selection", "distiller"]):
        for name in SETTINGS:
            if repetitions[name].nunique() > 1:
                raise UserError(f"{RUNS}: runs of {cell} differ in {name}; each experiment needs a root of its own")
        if repetitions["seed"].duplicated().any():
            raise UserError(f"{RUNS}: runs of {cell} have the same seed")
        found[cell] = repetitions.set_index("seed")["last_top1"]
    return found


def last(runs: Cells, root: str, selection: str, distiller: str) -> pd.Series:
    """Top-1 after the last epoch by machine and seed."""
    roots = {machine: root.replace("run", machine, 1) for machine in MACHINES}
    no_runs = pd.Series(dtype=float, index=pd.Index([], dtype=int, name="seed"))
    return pd.concat({machine: runs.get((there, selection, distiller), no_runs) for machine, there in roots.items()})


def difference(ours: pd.Series, base: pd.Series) -> str:
    """In bold if its interval does not contain 0."""
    found = paired_difference(ours, base)
    return f"**{found}**" if found and found.is_significant else str(found or "")


def cells(runs: Cells) -> list[tuple[str, str, dict[str, pd.Series]]]:
    """Teacher, distiller, and top-1 by seed of every column of the main table."""
    found, alone = [], last(runs, "run", SINGLE, "alone")
    for root, teacher in TEACHERS.items():
        for name, distiller in DISTILLERS.items():
            columns = {selection: last(runs, root, selection, name) for selection in RUN}
            columns["homo: false"] = last(runs, f"{root}-apart", "adaptive", name)
            columns["balanced"] = last(runs, f"{root}-balanced", "fixed", name)
            if any(len(values) for values in columns.values()):
                found.append((teacher, distiller, {"alone": alone} | columns))
    return found


def main_table(runs: Cells) -> pd.DataFrame:
    """Top-1 of every selection under each teacher, and what the policy gains over distilling everywhere."""
    return pd.DataFrame(
        {"teacher": teacher, "distiller": distiller}
        | {name: mean_text(values, " ± ") for name, values in columns.items()}
        | {"adaptive - fixed": difference(columns["adaptive"], columns["fixed"])}
        for teacher, distiller, columns in cells(runs)
    )


def comparison_table(runs: Cells) -> pd.DataFrame:
    """Paired differences of further students."""
    rows = []
    for pixels, ours, our_place, base, base_place, distillers in COMPARISONS:
        root = our_place.split()[0]
        teacher = next((t for r, t in reversed(TEACHERS.items()) if root.startswith(r)), TEACHERS["run/all"])
        for name in distillers:
            first, second = (last(runs, *(*place.split(), name)[:3]) for place in (our_place, base_place))
            distiller = (DISTILLERS | NEWER | LOGITS).get(name, "KD")
            row = {"student": ours, "compared with": base, "distiller": distiller, "teacher": teacher}
            rows.append(row | {"pixels": pixels, "difference": difference(first, second)})
    return pd.DataFrame(rows)


def arms(runs: Cells) -> list[tuple[dict[str, str], dict[str, pd.Series]]]:
    """Of every teacher and distiller that was balanced: which it is, and top-1 by seed of each of the `ARMS`."""
    found = []
    for root, pixels in ARM_TEACHERS.items():
        for name, distiller in (DISTILLERS | NEWER).items():
            values = {}
            for arm, (ending, selection) in ARMS.items():
                folder = f"{root}{ending}"
                values[arm] = last(runs, folder.replace("-apart", "") if "wide" in root else folder, selection, name)
            if len(values["balanced"]):
                teacher = TEACHERS.get(root, TEACHERS["run/all"])
                found.append(({"teacher": teacher, "pixels": pixels, "distiller": distiller}, values))
    return found


def arm_table(runs: Cells) -> pd.DataFrame:
    """Top-1 of every one of the `ARMS`."""
    rows = [cell | {arm: mean_text(values, " ± ") for arm, values in columns.items()} for cell, columns in arms(runs)]
    return without_empty(pd.DataFrame(rows))


def question_table(runs: Cells) -> pd.DataFrame:
    """Paired differences for the `QUESTIONS`; p of Student's t by Holm's correction, in bold below 0.05.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    parts, of_cells = [], arms(runs)
    for ours, base in QUESTIONS:
        rows = []
        for cell, columns in of_cells:
            found = (columns[ours] - columns[base]).dropna()
            if len(found) > 1:
                p = 2 * stdtr(len(found) - 1, -abs(found.mean() / found.sem()))
                row = {"question": f"{ours} - {base}", **cell, "p": p}
                rows.append(row | {"difference": str(paired_difference(columns[ours], columns[base]))})
        part = pd.DataFrame(rows, columns=["question", "teacher", "pixels", "distiller", "difference", "p"])
        order = part["p"].sort_values()
        corrected = (order * list(range(len(order), 0, -1))).cummax().clip(upper=1)
        part["p (Holm)"] = corrected.map(
            lambda p: "**< 0.001**" if p < 0.001 else f"**{p:.3f}**" if p < 0.05 else f"{p:.3f}"
        )
        parts.append(part.drop(columns="p"))
    return pd.concat(parts)


def choice_table(shares: pd.DataFrame) -> pd.DataFrame:
    """What the policy distils at each spot in its first and last epoch, in percent, means over the seeds."""
    rows = []
    for root, teacher in [(root + end, teacher) for root, teacher in TEACHERS.items() for end in ("", "-apart")]:
        for name, distiller in DISTILLERS.items():
            of_root = shares[(shares["root"] == root) & (shares["distiller"] == name)]
            means = of_root[of_root["selection"] == "adaptive"].groupby("spot", sort=False)[["1", "60"]].mean()
            undecided = root.endswith("-apart") or teacher.startswith("wrn")
            row = {"teacher": teacher, "distiller": distiller, "gates begin": "undecided" if undecided else "open"}
            texts = {epoch: " ".join(f"{spot} {share:.0f}" for spot, share in means[epoch].items()) for epoch in means}
            if len(means):
                rows.append(row | {"epoch 1": texts["1"], "epoch 60": texts["60"]})
    return pd.DataFrame(rows)


def tables(runs: Cells, shares: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All tables by name; the README's has the two better teachers, and no ablations."""
    main = main_table(runs)
    short = main[main["teacher"].str.endswith("50,000 images")].drop(columns=["random", "anti"])
    made = {"main": main, "readme": short, "comparisons": comparison_table(runs)}
    return made | {"choices": choice_table(shares), "arms": arm_table(runs), "questions": question_table(runs)}


def filled(document: str, made: dict[str, pd.DataFrame]) -> str:
    """The document with its tables made again.

    Raises:
        UserError: a mark is missing.
    """

    def table(found: re.Match) -> str:
        return f"{found[1]}{markdown(made[found[2]])}\n{found[3]}"

    pattern = r"(<!-- results: (\w+) -->\n)(?:(?!<!-- ).)*?(<!-- end -->)"
    text, count = re.subn(pattern, table, document, flags=re.DOTALL)
    if count != document.count("<!-- results: "):
        raise UserError("results: a table has no <!-- end -->")
    return text


@styled()
def accuracy_figure(runs: Cells) -> Figure:
    """Every run of the main table as a dot, the mean as a bar, a panel for each teacher."""
    colors = SELECTION_COLORS | OWN_COLORS | {"alone": SELECTION_COLORS[SINGLE]}
    figure = Figure(figsize=(8.4, 5.8), layout="constrained")
    axes = dict(zip(TEACHERS.values(), figure.subplots(2, 2, sharex=True, sharey=True).flat))
    heights = {distiller: row for row, distiller in enumerate(DISTILLERS.values())}
    for teacher, distiller, columns in cells(runs):
        panel = axes[teacher]
        panel.axvline(columns.pop("alone").mean(), color=colors["alone"], lw=1, ls="--")
        for place, (name, values) in enumerate(columns.items()):
            height = heights[distiller] + 0.14 * (place - 2.5)
            panel.plot(values, [height] * len(values), "o", ms=3.5, color=colors[name], alpha=0.5)
            panel.plot(values.mean(), height, "|", ms=9, mew=2, color=colors[name])
        panel.set_yticks(list(heights.values()), list(heights))
        panel.set(title=f"teacher: {teacher}", ylim=(len(heights) - 0.5, -0.5))
    figure.supxlabel("top-1 on the test images, last epoch (%)")
    dots = [mark(name, colors[name], marker="o", ls="", ms=4) for name in (*RUN, *OWN_COLORS)]
    figure_legend(figure, [*dots, mark("student alone, mean", colors["alone"], ls="--", lw=1)])
    return figure


@styled()
def share_figure(shares: pd.DataFrame) -> Figure:
    """Share of samples distilled at each spot under AT by epoch: a colour for each teacher, dashes: undecided gates."""
    colors = dict(zip(TEACHERS, ("#D55E00", "#0072B2", "#CC79A7", "#009E73")))
    figure = Figure(figsize=(9, 3), layout="constrained")
    of_policy = shares[(shares["distiller"] == "at") & (shares["selection"] == "adaptive")]
    spots = list(of_policy["spot"].unique())
    for panel, spot in zip(figure.subplots(1, len(spots), sharey=True), spots):
        for _, line in of_policy[of_policy["spot"] == spot].iterrows():
            root = line["root"].removesuffix("-apart")
            if root in colors:
                curve = pd.to_numeric(line["1":]).dropna()
                dash = "-" if line["root"] in ("run/all", "run/long") else "--"
                panel.plot(curve.index.astype(int), curve, color=colors[root], ls=dash, lw=1.1, alpha=0.8)
        panel.set(title=spot, ylim=(-3, 103), yticks=(0, 50, 100), xlabel="epoch", xscale="log")
        panel.set_xticks((1, 3, 10, 30), ("1", "3", "10", "30"))
    handles = [mark(f"teacher: {title}", colors[root]) for root, title in TEACHERS.items()]
    handles += [mark("gates begin open"), mark("gates begin undecided", ls="--")]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    figure.supylabel("distilled (%)", fontsize=9)
    return figure


def added(known: pd.DataFrame, new: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The lines of both; a new one takes the place of a known one with the same `key`.

    Raises:
        UserError: a new run has another result than a known one, so it is of another machine or of other code.
    """
    both = pd.concat([known, new])
    if "last_top1" in both:
        results = both.groupby(key)["last_top1"].nunique()
        if roots := sorted(set(results[results > 1].index.get_level_values("root"))):
            raise UserError(f"{RUNS}: has other results of runs in {', '.join(roots)}; put the new ones elsewhere")
    return both.drop_duplicates(key, keep="last")


def read_csv(file: Path | io.StringIO) -> pd.DataFrame:
    """Empty cells are empty texts, or NaN among numbers."""
    table = pd.read_csv(file, dtype=dict.fromkeys(("homo", "gamma", "routing_share", "teacher_top1"), str))
    texts = table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]
    return table.fillna(dict.fromkeys(texts, ""))


def main() -> None:
    parser = Parser(description="Make the tables of the documents and the figures from the CSV files beside this one.")
    parser.add_argument("folders", nargs="*", type=Path, help="first add all finished runs below to the CSV files")
    folders = parser.parse_args().folders
    files = (RUNS, SHARES)
    texts = [file.read_text(encoding="utf-8") for file in files]
    if folders:
        known = zip(files, texts, collect(folders))
        texts = [added(read_csv(io.StringIO(text)), new, KEYS[file]).to_csv(index=False) for file, text, new in known]
    runs, shares = (read_csv(io.StringIO(text)) for text in texts)
    of_cells = by_cell(runs)
    made = tables(of_cells, shares)
    documents = {path: filled(path.read_text(encoding="utf-8"), made) for path in DOCUMENTS}
    figures = {"accuracy.png": png(accuracy_figure(of_cells)), "shares.png": png(share_figure(shares))}
    # Whatever is wrong with the runs has been said by now.
    for document, text in (documents | dict(zip(files, texts))).items():
        write_text(document, text)
    for name, figure in figures.items():
        write_bytes(HERE / name, figure)


DOCUMENTS = (ROOT / "docs/results.md", HERE / "README.md", ROOT / "README.md")

if __name__ == "__main__":
    guarded(main)
