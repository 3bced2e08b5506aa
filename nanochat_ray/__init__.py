"""nanochat-ray: from raw text to a chat model, on Ray."""

__version__ = "0.1.0"
