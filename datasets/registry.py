"""The names under which data sets are known."""

from utils.registry import Registry

DATASETS: Registry = Registry("dataset", "datasets")
register_dataset = DATASETS.register
