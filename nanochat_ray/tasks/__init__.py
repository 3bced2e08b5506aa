"""Data sets: what a model is finetuned on and graded with. Plain Python."""
