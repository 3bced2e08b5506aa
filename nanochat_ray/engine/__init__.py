"""Generation: cache, sampling, tools. Plain torch."""
