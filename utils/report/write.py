"""Writes a report: Markdown, CSV files, the page and its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from utils.errors import doing
from utils.files import refuse_to_replace, write_bytes
from utils.run_folder.read import Run

TABLES = ("report.md", "results.csv", "runs.csv")
PAGE, FIGURES, LATEX = "report.html", "figures", "results.tex"
TITLE = "Spot-adaptive distillation: report"
_SHOWN = re.compile(rf"!\[\]\(({FIGURES}/[a-z0-9.-]+\.png)\)")


def write_report(
    runs: Sequence[Run],
    out: Path,
    *,
    with_images: bool = True,
    with_plots: bool = True,
    latex: bool = False,
) -> None:
    """Print the tables; write them as Markdown and CSV, the page and its figures to `out`.

    Args:
        with_images: load the data sets.
        with_plots: write the page and its figures.
        latex: write the tables of results as LaTeX, too.

    Raises:
        UserError: `out` has files of these names that no report wrote, or cannot be written to.
    """
    from utils.report import build, page, tables  # bring Matplotlib, for which a grid need not wait at its start
    from utils.report.groups import grouped

    refuse_to_replace([out / name for name in (*TABLES, PAGE, LATEX)], out / TABLES[0], build.RUNS)
    groups = grouped(runs)
    of_dataset = {run.dataset: [g for g in groups if g.first.dataset == run.dataset] for run in runs}
    results = [build.result_section(dataset, members) for dataset, members in of_dataset.items()]
    records = tables.run_records(groups)
    all_runs = build.run_section(groups, records, out)
    heading = build.heading(runs)
    summary = "\n\n".join([*heading, *(section.markdown() for section in results)])
    print(summary if build.distilled(groups) else f"{summary}\n\n{all_runs.markdown()}")
    texts = {TABLES[0]: f"# {TITLE}\n\n{summary}\n\n{all_runs.markdown()}\n"}
    texts[TABLES[1]] = tables.result_records(build.distilled(groups)).to_csv(index=False)
    texts[TABLES[2]] = records.to_csv(index=False)
    if latex:
        texts[LATEX] = "\n".join(section.latex() for section in results)
    sections = []
    if with_plots:
        for section, (dataset, members) in zip(results, of_dataset.items()):
            section.figures = build.cost_figures(dataset, members)
            sections += [section, *(build.student_sections(dataset, members) if with_images else [])]
            sections += build.figure_sections(dataset, members)
        sections += [*build.detail_sections(runs, out, with_images), all_runs]
        texts[PAGE] = page.render(TITLE, heading, sections)
    files = {name: text.encode(errors="surrogateescape") for name, text in texts.items()}
    files |= {f"{FIGURES}/{figure.name}.png": figure.data for section in sections for figure in section.figures}
    publish(out, files)
    print(f"\n{out}: {', '.join([*texts, f'{FIGURES}/'] if sections else texts)}")


def publish(out: Path, files: dict[str, bytes]) -> None:
    """Write `files` to `out` and delete what else an earlier report has written there."""
    report = out / TABLES[0]
    with doing(f"writing to {out}"):
        earlier = [PAGE, LATEX, *_SHOWN.findall(report.read_text(errors="replace"))] if report.exists() else []
        for name in set(earlier).difference(files):
            (out / name).unlink(missing_ok=True)
        figures = "".join(f"\n![]({name})\n" for name in files if name.startswith(FIGURES))
        files[report.name] += figures.encode()
        for name, content in files.items():  # the report first: a kill leaves no figure unnamed
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out / name, content)
