"""The same weights elsewhere: vLLM, Transformers, nanochat's own files."""
