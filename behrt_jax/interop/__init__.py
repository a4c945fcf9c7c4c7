"""BEHRT outside JAX."""
