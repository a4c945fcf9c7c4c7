"""One readable procedure for each command."""
