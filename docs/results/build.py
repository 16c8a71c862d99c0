"""Make the tables and figures of docs/results.md, and the README's, out of the CSV files beside this one.

    python docs/results/build.py             # tables and figures out of the CSV files
    python docs/results/build.py run         # first make the CSV files anew, of all runs below these folders

A table stands between ``<!-- results: its name -->`` and ``<!-- end -->``; what is between them is replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from figures import accuracy_figure, share_figure  # noqa: E402
from result_lines import Lines, Shares, collect, read_lines, read_shares, write_csv_files  # noqa: E402
from result_tables import TABLES  # noqa: E402

from utils.command import Parser, guarded  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.files import write_bytes, write_text  # noqa: E402
from utils.report.style import png  # noqa: E402
from utils.report.table import Table  # noqa: E402


def filled(document: str, lines: Lines, shares: Sequence[Shares]) -> str:
    """The document with its tables made anew.

    Raises:
        UserError: it asks for a table that there is not, or whose runs there are not, or a mark is missing.
    """

    def table(found: re.Match) -> str:
        name = found[2]
        if name not in TABLES:
            raise UserError(f"results: {name}: no such table; there are {', '.join(TABLES)}")
        rows = TABLES[name](lines, shares)
        if not rows:
            raise UserError(f"results: {name}: there are no runs for this table")
        return f"{found[1]}{Table.of(rows).markdown()}\n{found[3]}"

    text, count = re.subn(
        r"(<!-- results: (\w+) -->\n)(?:(?!<!-- ).)*?(<!-- end -->)", table, document, flags=re.DOTALL
    )
    if count != document.count("<!-- results: "):
        raise UserError("results: a table has no <!-- end -->")
    return text


def main() -> None:
    parser = Parser(description="Make the tables and figures of docs/results.md out of the CSV files beside this one.")
    parser.add_argument("folders", nargs="*", type=Path, help="make the CSV files anew, of all runs below")
    folders = parser.parse_args().folders
    lines, shares = collect(folders) if folders else (read_lines(), read_shares())
    documents = (ROOT / "docs/results.md", ROOT / "README.md")
    texts = [filled(document.read_text(encoding="utf-8"), lines, shares) for document in documents]
    figures = {"accuracy.png": png(accuracy_figure(lines)), "shares.png": png(share_figure(shares))}
    # Whatever is wrong with the runs has been said by now.
    if folders:
        write_csv_files(lines, shares)
    for document, text in zip(documents, texts):
        write_text(document, text)
    for name, figure in figures.items():
        write_bytes(HERE / name, figure)


if __name__ == "__main__":
    guarded(main)
