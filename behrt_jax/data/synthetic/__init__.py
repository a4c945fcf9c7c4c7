"""Generators that make MEDS-shaped events."""
