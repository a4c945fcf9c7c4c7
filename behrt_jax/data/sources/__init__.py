"""Readers that turn a stored data set into MEDS-shaped events."""
