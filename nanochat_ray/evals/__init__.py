"""Ray actors for evaluations."""
