"""Objective, freezing, optimiser, train step, loop and checkpoints."""
