"""Ray Data glue: reads, tokenizes and packs in tasks, and deals the ordered rows to the training workers."""
