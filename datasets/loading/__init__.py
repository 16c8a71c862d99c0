"""Turning what a source holds into batches on the training device."""
