"""What a run leaves for people: metrics.jsonl, progress, wandb if asked for, plots and report.md."""
