"""Low-rank adapters as transforms of parameter trees."""
