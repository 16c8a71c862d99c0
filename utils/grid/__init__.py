"""``python -m utils.grid``: many runs of one data set, one after another or several at once."""
