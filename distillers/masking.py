"""The name under which users' own distillers import `distillers.ops.masking`."""

from distillers.ops.masking import chosen_count, masked_mean, masked_pair_mean

__all__ = ["chosen_count", "masked_mean", "masked_pair_mean"]
