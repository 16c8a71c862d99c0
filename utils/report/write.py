"""Writes a report: Markdown, CSV files, the page and its figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import refuse_to_replace, write_bytes, write_text
from utils.run_folder.read import Run

DETAILS = 12
TABLES = ("report.md", "results.csv", "runs.csv")
PAGE = ("report.html", "figures")


def write_report(
    runs: Sequence[Run], out: Path, *, details: int = DETAILS, with_images: bool = True, with_plots: bool = True
) -> None:
    """Print the tables; write them as Markdown and CSV, the page and its figures to `out`."""
    from utils.report.build import subtitle, unfinished
    from utils.report.run_table import run_records, run_table
    from utils.report.tables import result_records, result_rows

    refuse_to_replace([out / name for name in (*TABLES, *PAGE)], out / TABLES[0])
    rows = result_rows(runs)
    texts = [subtitle(runs), unfinished(runs)]
    for dataset in dict.fromkeys(run.dataset for run in runs):
        texts += _result_texts(dataset, [run for run in runs if run.dataset == dataset])
    records = run_records(runs)
    table, same = run_table(runs, records)
    all_runs = "\n\n".join(filter(None, (same, table.markdown())))
    text = "\n\n".join(filter(None, texts))
    print(text if rows else f"{text}\n\n{all_runs}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / TABLES[0], f"# Report\n\n{text}\n\n## Runs\n\n{all_runs}\n")
        write_text(out / TABLES[1], _csv(result_records(rows)))
        write_text(out / TABLES[2], _csv(records))
        written = list(TABLES)
        if with_plots:
            _write_page(runs, records, out, details, with_images)
            written = [PAGE[0], *TABLES, f"{PAGE[1]}/"]
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror}); --out <folder> names another") from error
    print(f"\n{out}: {', '.join(written)}")


def _result_texts(dataset: str, runs: Sequence[Run]) -> list[str]:
    from utils.report.build import not_counted, notes, setting, without_choice
    from utils.report.tables import result_rows, result_tables

    rows = result_rows(runs)
    if not rows:
        return [setting(runs)]
    tables = [
        f"## {dataset}, {name}: validation top-1 (%)\n\n{table.markdown()}"
        for name, table in result_tables(rows).items()
    ]
    return [*tables, setting(runs), *not_counted(runs), *without_choice(runs), *notes(rows)]


def _write_page(runs: Sequence[Run], records: list[dict[str, Any]], out: Path, details: int, with_images: bool) -> None:
    from utils.report.build import build_sections, subtitle, unfinished
    from utils.report.page import render

    sections = list(build_sections(runs, records, out, details, with_images))
    page = render("Spot-adaptive distillation: report", subtitle(runs), unfinished(runs), sections)
    write_text(out / PAGE[0], page)
    folder = out / PAGE[1]
    folder.mkdir(exist_ok=True)
    figures = {folder / f"{figure.name}.png": figure.data for section in sections for figure in section.figures}
    for file, data in figures.items():
        write_bytes(file, data)
    for stale in set(folder.glob("*.png")) - set(figures):
        stale.unlink()


def _csv(records: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    if records:
        writer = csv.DictWriter(buffer, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return buffer.getvalue()
