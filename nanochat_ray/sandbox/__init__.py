"""Running Python that nobody has read: what it does stays inside."""
