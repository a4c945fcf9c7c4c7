"""Models in forms that leave the project or come into it."""
