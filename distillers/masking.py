from distillers.ops import chosen_count, masked_mean, masked_pair_mean  # noqa: F401  the old name, until 2027-06
