"""Label tables made of prepared data, for those who have no labels: one task a module."""
