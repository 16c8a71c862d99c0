"""What every term of a run's training loss adds to the total."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.report.style import REFERENCE, SELECTION_COLORS, log_scale, panels, spot_colors, styled, whole_epochs
from utils.run_folder.read import Run

_NOT_WEIGHTED = ("loss/total", "loss/ce", "loss/routed_ce", "loss/policy")
ROUTED = "routed cross-entropy,\nthe policy's, not in the total"


def contributions(run: Run) -> dict[str, list[float]]:
    """Of every term, what it adds to the total in each epoch, its weight included: alpha or beta.

    The weights are those that the run wrote down. An older run did not; its alpha stands in its config, and its beta,
    which may be the distiller's own, follows from the total.

    Returns:
        by the term's name in ``metrics.jsonl``, e.g. ``"loss/f1"``; the total and the cross-entropy come first.
    """
    terms = {name: _series(run, name) for name in ("loss/total", "loss/ce")}
    weighted = {name: _series(run, name) for name in run.records[-1]["train"] if _is_weighted(name)}
    weights = (run.facts or {}).get("weights") or _implied_weights(run, terms, weighted)
    for name, values in weighted.items():
        weight, ramp = weights.get(name, (1.0, 0))
        terms[name] = [
            value * weight * min(1.0, record["epoch"] / max(ramp, 1)) for value, record in zip(values, run.records)
        ]
    return terms


def _implied_weights(
    run: Run, terms: dict[str, list[float]], weighted: dict[str, list[float]]
) -> dict[str, tuple[float, int]]:
    alpha = run.settings.get("kd.loss_weights.kd_weight", 1.0)
    spots = [f"loss/{spot}" for spot in run.gate_labels[:-1]]
    at_logits = [name for name in weighted if name not in spots]
    rest = terms["loss/total"][-1] - terms["loss/ce"][-1] - alpha * sum(weighted[name][-1] for name in at_logits)
    of_spots = sum(weighted[name][-1] for name in spots if name in weighted)
    beta = run.settings.get("kd.loss_weights.other_kd")
    if beta is None:
        beta = rest / of_spots if of_spots else 1.0
    return {name: (beta if name in spots else alpha, 0) for name in weighted}


def _is_weighted(name: str) -> bool:
    return name.startswith("loss/") and name not in _NOT_WEIGHTED


def _series(run: Run, name: str) -> list[float]:
    return [record["train"].get(name, 0.0) for record in run.records]


def loss_figure(run: Run) -> Figure:
    """The contributions over epochs; bars where there is a single epoch."""
    terms = contributions(run)
    shown = {_label(name, run): (values, _color(name, run)) for name, values in terms.items()}
    if "loss/routed_ce" in run.records[-1]["train"]:
        shown[ROUTED] = (_series(run, "loss/routed_ce"), SELECTION_COLORS["anti"])
    with styled():
        figure, (panel,) = panels(1)
        panel.set_title(run.title)
        (_bars if len(run.records) == 1 else _lines)(panel, run, shown)
    return figure


def _lines(panel: Axes, run: Run, shown: dict[str, tuple[Sequence[float], str]]) -> None:
    epochs = [record["epoch"] for record in run.records]
    for label, (values, color) in shown.items():
        panel.plot(epochs, values, color=color, label=label, ls="--" if label == ROUTED else "-")
    if min(min(values) for values, _ in shown.values()) > 0:
        log_scale(panel)
    panel.set(xlabel="epoch", ylabel="part of the training loss, epoch mean")
    whole_epochs(panel, run.epochs)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _bars(panel: Axes, run: Run, shown: dict[str, tuple[Sequence[float], str]]) -> None:
    values, colors = zip(*((values[0], color) for values, color in shown.values()))
    bars = panel.barh(list(shown), values, color=colors, height=0.6)
    panel.bar_label(bars, fmt="%.4g", padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(f"part of the training loss, mean of epoch {run.records[0]['epoch']}")


def _label(name: str, run: Run) -> str:
    name = name.removeprefix("loss/")
    if name in run.gate_labels[:-1]:
        return f"beta * distiller at {name}"
    named = {"total": "total", "ce": "cross-entropy", "kl": "alpha * KL at the logits"}
    return named.get(name, "alpha * loss at the logits")


def _color(name: str, run: Run) -> str:
    spots = [f"loss/{spot}" for spot in run.gate_labels[:-1]]
    colors = spot_colors(run.gate_labels)
    fixed = {"loss/total": REFERENCE, "loss/ce": SELECTION_COLORS["fixed"]}
    return fixed.get(name) or dict(zip(spots, colors)).get(name, colors[-1])
