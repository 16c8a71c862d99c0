"""What the benchmark prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from utils.benchmark.cases import PLAIN_KD
from utils.benchmark.suite import LoaderResult, Result
from utils.report.table import Table

PHASES = ("data", "teacher", "student", "routing", "backward", "optimisers", "rest")


def pair_table(results: Sequence[Result]) -> Table:
    """One line per kind of steps."""
    columns: dict[str, Callable[[Result], str]] = {
        "": row_label,
        "ms": lambda r: milliseconds(r.seconds),
        "x KD": lambda r: f"{r.time_ratio:.2f}",
        "MiB": lambda r: f"{r.bytes / 2**20:.0f}",
        "MiB x KD": lambda r: f"{r.memory_ratio:.2f}",
    }
    if any(r.published_seconds for r in results):
        columns["published code, ms"] = lambda r: milliseconds(r.published_seconds) if r.published_seconds else ""
        columns["x ours"] = lambda r: f"{r.published_seconds / r.seconds:.2f}" if r.published_seconds else ""
    if any(r.captured for r in results):
        columns["steps"] = lambda r: "captured" if r.captured else "eager"
    for name in PHASES if any(r.phases for r in results) else ():
        columns[f"{name} %"] = lambda r, name=name: f"{100 * r.phases[name]:.1f}" if name in r.phases else ""
    return Table(list(columns), [[text(result) for text in columns.values()] for result in results])


def price_table(results: Sequence[Result]) -> Table:
    """One line per distiller: its adaptive steps in units of plain KD's. With several shares, one figure each.

    The columns are every pair's time, and over the pairs the median time, that of the plain distiller, the median of
    the peak memory, and the largest ratio of the peak memory to the plain distiller's.
    """
    found = {(r.distiller, r.selection, r.share, r.pair): r for r in results}
    pairs = list(dict.fromkeys(r.pair for r in results))
    shares = list(dict.fromkeys(r.share for r in results if r.selection == "adaptive"))

    def figures(values: Iterable[float | None]) -> str:
        return " → ".join("-" if value is None else f"{value:.2f}" for value in values)

    def over_pairs(name: str, of: Callable, value: Callable[[Result], float]) -> str:
        rows = ([found.get((name, "adaptive", share, pair)) for pair in pairs] for share in shares)
        known = ([value(r) for r in row if r] for row in rows)
        return figures(of(values) if values else None for values in known)

    def to_fixed(r: Result) -> float:
        return r.bytes / found[r.distiller, "fixed", "1", r.pair].bytes

    plain = (found[PLAIN_KD.distiller, PLAIN_KD.selection, "1", pair] for pair in pairs)
    rows = [["kd", *(f"{r.seconds:.2f} s, {r.bytes / 2**20:.0f} MiB" for r in plain), *[""] * 4]]
    for name in dict.fromkeys(r.distiller for r in results if r.selection == "adaptive"):
        cells = ([found.get((name, "adaptive", share, pair)) for share in shares] for pair in pairs)
        fixed = [r.time_ratio for r in results if (r.distiller, r.selection) == (name, "fixed")]
        rows.append(
            [
                name,
                *(figures(r and r.time_ratio for r in cell) if any(cell) else "-" for cell in cells),
                over_pairs(name, median, lambda r: r.time_ratio),
                f"{median(fixed):.2f}",
                over_pairs(name, median, lambda r: r.memory_ratio),
                over_pairs(name, max, to_fixed),
            ]
        )
    return Table(["", *pairs, "median", "fixed", "memory", "memory to fixed, most"], rows)


def summary_table(results: Sequence[Result], value: Callable[[Result], float | None]) -> Table:
    """One ratio: kinds of steps by pairs, and the median over the pairs; without those that have no value."""
    pairs = list(dict.fromkeys(result.pair for result in results))
    found = {(row_label(r), r.pair): value(r) for r in results if value(r) is not None}
    rows = []
    for label in dict.fromkeys(label for label, _ in found):
        values = [found.get((label, pair)) for pair in pairs]
        middle = median(value for value in values if value is not None)
        rows.append([label, *("" if value is None else f"{value:.2f}" for value in values), f"{middle:.2f}"])
    return Table(["", *pairs, "median"], rows)


def summaries(results: Sequence[Result], earlier: Sequence[Result] = ()) -> dict[str, Table]:
    """Every ratio to other code or to another time that there is something for, by title.

    Args:
        results: what was measured now.
        earlier: what was measured before, to compare with.
    """
    before = {(r.pair, row_label(r)): r for r in earlier}

    def to_earlier(value: Callable[[Result], float]) -> Callable[[Result], float | None]:
        return lambda r: value(r) / value(then) if (then := before.get((r.pair, row_label(r)))) else None

    ratios = {
        "time of a step, published code / ours": lambda r: r.published_seconds and r.published_seconds / r.seconds,
        "time of a step, now / then": to_earlier(lambda r: r.seconds),
        "peak memory, now / then": to_earlier(lambda r: r.bytes),
    }
    tables = {title: summary_table(results, value) for title, value in ratios.items()}
    return {title: table for title, table in tables.items() if table.rows}


def row_label(result: Result) -> str:
    """``"at adaptive 1/4"``; a share of 1 is not named."""
    return f"{result.distiller} {result.selection}" + ("" if result.share == "1" else f" {result.share}")


def milliseconds(seconds: float) -> str:
    """Three digits or more."""
    number = 1000 * seconds
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def loader_line(loaders: LoaderResult) -> str:
    return (
        f"in-memory loader, crop and flip: {milliseconds(loaders.batch_seconds)} ms a batch; on one CPU core "
        f"{loaders.memory:,.0f} images/s, {loaders.memory / loaders.per_image:.0f} times the {loaders.per_image:,.0f} "
        "of torchvision's transforms of one image at a time"
    )
