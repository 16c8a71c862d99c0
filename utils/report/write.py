"""Writes a report: Markdown, CSV files, the page and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.files import refuse_to_replace, write_bytes, write_text
from utils.run_folder.read import Run

DETAILS = 12
TABLES = ("report.md", "results.csv", "runs.csv")
PAGE = ("report.html", "figures")
TITLE = "Spot-adaptive distillation: report"


def write_report(
    runs: Sequence[Run], out: Path, *, details: int = DETAILS, with_images: bool = True, with_plots: bool = True
) -> None:
    """Print the tables; write them as Markdown and CSV, the page and its figures to `out`."""
    from utils.report import build, page, tables  # bring Matplotlib, for which a grid need not wait at its start
    from utils.report.groups import grouped

    refuse_to_replace([out / name for name in (*TABLES, *PAGE)], out / TABLES[0])
    groups = grouped(runs)
    of_dataset = {run.dataset: [g for g in groups if g.first.dataset == run.dataset] for run in runs}
    results = [build.result_section(dataset, members) for dataset, members in of_dataset.items()]
    records = tables.run_records(groups)
    all_runs = build.run_section(groups, records, out)
    heading = [build.subtitle(runs), *build.unfinished(runs)]
    summary = "\n\n".join([*heading, *(section.markdown() for section in results)])
    print(summary if build.distilled(groups) else f"{summary}\n\n{all_runs.markdown()}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / TABLES[0], f"# Report\n\n{summary}\n\n{all_runs.markdown()}\n")
        write_text(out / TABLES[1], tables.result_records(build.distilled(groups)).to_csv(index=False))
        write_text(out / TABLES[2], records.to_csv(index=False))
        if with_plots:
            sections = []
            for section, (dataset, members) in zip(results, of_dataset.items()):
                section.figures = build.gain_figures(dataset, members)
                sections += [section, *build.figure_sections(dataset, members)]
            sections += [*build.detail_sections(runs, out, details, with_images), all_runs]
            write_text(out / PAGE[0], page.render(TITLE, heading, sections))
            _write_figures(out / PAGE[1], sections)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror}); --out <folder> names another") from error
    print(f"\n{out}: {', '.join([PAGE[0], *TABLES, f'{PAGE[1]}/'] if with_plots else TABLES)}")


def _write_figures(folder: Path, sections: Sequence) -> None:
    folder.mkdir(exist_ok=True)
    figures = {folder / f"{figure.name}.png": figure.data for section in sections for figure in section.figures}
    for file, data in figures.items():
        write_bytes(file, data)
    for stale in set(folder.glob("*.png")) - set(figures):
        stale.unlink()
