"""What came out of the runs: one table, a sentence for each student, and a picture."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from utils import evaluate
from utils.errors import UserError
from utils.files import write_bytes, write_text
from utils.grid.plan import Job
from utils.report.gain import answer, best_run, tradeoff_figure
from utils.report.groups import TEACHER, Group, grouped
from utils.report.statistics import mean_text
from utils.report.style import png
from utils.report.table import markdown
from utils.run_folder.layout import Layout
from utils.run_folder.read import SELECTIONS, SINGLE, Run, read_run
from utils.training.facts import name_of
from utils.training.restore import restore
from utils.training.trust import is_known_builder

TABLE, PICTURE = "advice.csv", "advice.png"
KINDS = (*SELECTIONS, SINGLE)  # of training a student, which may be best alone


def finished(jobs: Iterable[Job]) -> list[Run]:
    runs = [read_run(job.folder) for job in jobs]
    return [run for run in runs if run is not None and run.is_finished]


def conclude(jobs: Sequence[Job], root: Path) -> pd.DataFrame:
    """Measure the networks; print the table and a sentence for each student; write the table and the picture.

    Raises:
        UserError: no distilled run is finished.
    """
    groups = [group for group in grouped(finished(jobs)) if not group.first.is_single]
    if not groups:
        raise UserError(f"{root}: no distilled run is finished; {root / 'grid'} has what they printed")
    students = {group.first.student: [g for g in groups if g.first.student == group.first.student] for group in groups}
    costs: dict[str, evaluate.Cost] = {}
    for of_student in students.values():
        restored = restore(Layout(of_student[0].first.path).best, trust=True)
        results = evaluate.measure_networks(restored)
        evaluate.write(evaluate.default_folder(restored.path), results, restored)
        costs |= {name: cost for name, (_, cost) in results.items()}
    table = result_table(groups, costs)
    write_text(root / TABLE, table.to_csv(index=False))
    if figure := tradeoff_figure(groups):
        write_bytes(root / PICTURE, png(figure))
    show(table, root / PICTURE)
    print(f"latency: one image on {name_of(restored.device)}")
    for student, of_student in students.items():
        run, cost = best_run(of_student, KINDS), costs[student]
        print(*answer(of_student), f"{student}: {cost.megabytes:.2f} MB, {cost.milliseconds[1]:.2f} ms an image.")
        network = (run.config.get("model") or run.config["kd"]["student"])["name"]
        trust = "" if is_known_builder(network) else " --trust"  # it is the user's own
        print(f"next: python -m utils.export {shlex.quote(str(run.path))}{trust}")
    print(f"{root}: {TABLE}, {PICTURE}; python -m utils.report {root} shows more")
    table.attrs["best"] = str(best_run(groups, KINDS).path)
    return table


def result_table(groups: Sequence[Group], costs: dict[str, evaluate.Cost]) -> pd.DataFrame:
    """A row of text for each network and way of training, the best first.

    Args:
        costs: by the names that `evaluate.measure_networks` gives.
    """
    rows = {}
    for group in groups:
        first = group.first
        for kind in (TEACHER, SINGLE, *SELECTIONS):
            if (top1 := group.top1(kind)).empty:
                continue
            network = first.teacher if kind == TEACHER else first.student
            how = ", ".join(filter(None, (first.distiller, kind, group.settings)))
            how = {TEACHER: "teacher", SINGLE: "alone"}.get(kind, how)
            rows[network, how] = {
                "mean": top1.mean(),
                "network": network,
                "training": how,
                "top-1 (%)": f"{top1.mean():.2f}" if kind == TEACHER else mean_text(top1),
                "gain over alone": str(group.difference(kind, SINGLE) or "") if kind in SELECTIONS else "",
                **_cost(costs[f"{network} (teacher)" if kind == TEACHER else network]),
            }
    return pd.DataFrame(rows.values()).sort_values("mean", ascending=False, ignore_index=True).drop(columns="mean")


def _cost(cost: evaluate.Cost) -> dict[str, str]:
    return {
        "parameters": f"{cost.parameters:,}",
        "weights (MB)": f"{cost.megabytes:.2f}",
        "latency (ms)": f"{cost.milliseconds[1]:.2f}",
    }


def show(table: pd.DataFrame, picture: Path) -> None:
    """On a terminal the table; in a notebook, where the returned table is shown, the picture."""
    if "IPython" not in sys.modules or not sys.modules["IPython"].get_ipython():
        print(f"\n{markdown(table)}\n")
    elif picture.exists():
        from IPython.display import Image, display

        display(Image(str(picture)))
