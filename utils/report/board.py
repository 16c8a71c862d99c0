"""The report's figures of one run, for TensorBoard."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.tensorboard import SummaryWriter

from utils.report.build import load_source
from utils.report.collect import read_gate_samples, read_gate_shares, read_run
from utils.report.gallery import class_names_of, gallery_figure, matches
from utils.report.gate_plots import class_heatmap, share_figures
from utils.run_folder.folder import RunDir


def add_figures(board: SummaryWriter, run: RunDir, step: int) -> None:
    """Add the gate shares over epochs, the classes' heatmap and the gallery, as far as the run has recorded them.

    Args:
        step: the epoch to file them under, phases counted together.
    """
    gates = read_gate_shares(run.gates)
    record = read_run(run.path) if run.config.exists() else None
    if gates is None or record is None or not record.has_policy:
        return
    record = replace(record, status="finished")  # it still holds the lock
    source = load_source(record)
    for figure in share_figures([record]):
        board.add_figure("gates/over epochs", figure, step)
    board.add_figure(
        "gates/by class", class_heatmap(gates, class_names_of(source, len(gates.shares)), record.title), step
    )
    samples = read_gate_samples(run.gate_samples)
    if samples is not None and source is not None and matches(samples, source):
        board.add_figure("gates/most and least distilled images", gallery_figure(samples, source, record.title), step)
