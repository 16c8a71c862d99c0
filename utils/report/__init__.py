"""``python -m utils.report run``: tables, plots and one HTML page of any set of runs."""
