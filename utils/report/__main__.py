"""Tables, plots and one HTML page of any set of runs, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.command import Parser, guarded
from utils.report.write import write_report
from utils.run_folder.read import find_runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", default=["run"], metavar="FOLDER", help="run folders, or any above them (default: run)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: report/ in the first FOLDER)")
    parser.add_argument("--no-images", action="store_true", help="do not load data sets: no gallery, no class names")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--latex", action="store_true", help="write the tables of results as LaTeX, too")
    options = parser.parse_args(arguments)
    write_report(
        find_runs([Path(folder) for folder in options.folders]),
        Path(options.out or Path(options.folders[0], "report")),
        with_images=not options.no_images,
        with_plots=not options.no_plots,
        latex=options.latex,
    )
    return 0


if __name__ == "__main__":
    guarded(main)
