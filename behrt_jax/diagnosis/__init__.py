"""What is wrong, why it matters and what to do about it."""
