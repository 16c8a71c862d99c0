"""What every term of a run's training loss adds to the total."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from utils.report.style import REFERENCE, epoch_axis, log_axis, panels, styled
from utils.run_folder.read import Run

_NOT_WEIGHTED = ("loss/total", "loss/ce", "loss/routed_ce", "loss/policy")
ROUTED = "routed cross-entropy,\nthe policy's, not in the total"


def contributions(run: Run) -> pd.DataFrame:
    """Of every term, what it adds to the total in each epoch, its weights (alpha or beta, balance) included.

    The weights are those that the run wrote down; the terms of an older run, which did not, are without them.

    Returns:
        a column for each term by its name in ``metrics.jsonl``, e.g. ``"loss/f1"``; total and cross-entropy are first.
    """
    weights = run.facts.get("weights", {})
    named = [name for name in run.records[-1]["train"] if name.startswith("loss/") and name not in _NOT_WEIGHTED]
    terms = {name: run.curve(f"train.{name}").fillna(0.0) for name in ("loss/total", "loss/ce", *named)}
    for name in named:
        weight, ramp = weights.get(name, (1.0, 0))
        balance = run.curve(name.replace("loss/", "train.weight/", 1)).fillna(1.0)
        terms[name] *= balance * weight * np.minimum(1.0, terms[name].index / max(ramp, 1))
    return pd.DataFrame(terms)


@styled()
def loss_figure(run: Run) -> Figure:
    """The contributions over epochs."""
    terms = contributions(run)
    figure, (panel,) = panels(1)
    for name, values in terms.items():
        spot = name.removeprefix("loss/")
        marker = "o" if len(values) == 1 else ""
        color = REFERENCE if spot == "total" else None
        panel.plot(values, label=_label(spot, run), color=color, marker=marker, ms=4)
    if (routed := run.curve("train.loss/routed_ce")).notna().any():
        panel.plot(routed, label=ROUTED, ls="--")
    if terms.min(axis=None) > 0:
        log_axis(panel)
    epoch_axis(panel, run.epochs)
    panel.set(title=run.title, ylabel="part of the training loss, epoch mean")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _label(term: str, run: Run) -> str:
    if term in run.gate_labels[:-1]:
        return f"beta * distiller at {term}"
    named = {"total": "total", "ce": "cross-entropy", "kl": "alpha * KL at the logits"}
    return named.get(term, "alpha * loss at the logits")
