"""Checks for what is wrong with a run, or with its data and labels, why it matters, and what to do."""
