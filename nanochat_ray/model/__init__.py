"""The network, its optimizer and schedules, scaling rules, precision and checkpoints: plain torch."""
