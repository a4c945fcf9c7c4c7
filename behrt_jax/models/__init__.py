"""BEHRT in plain Flax Linen: no adapters, no training, no data in here."""
