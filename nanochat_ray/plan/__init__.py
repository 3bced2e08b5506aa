"""What a run will take before it begins: memory, time, communication and cost."""
