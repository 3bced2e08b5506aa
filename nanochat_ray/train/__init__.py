"""Ray Train glue: launches the training stages on workers."""
