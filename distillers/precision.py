from distillers.ops import at_least  # noqa: F401  the old name, until 2027-06
