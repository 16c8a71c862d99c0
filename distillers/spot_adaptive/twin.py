from distillers.spot_adaptive.frozen import frozen_twin  # noqa: F401  the old name, until 2027-06
