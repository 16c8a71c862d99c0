from distillers.task import Pretraining  # noqa: F401  the old name, until 2027-06
