"""Text to token ids and rows of them: the tokenizer, the chat format, the packer."""
