"""Ray's metrics: a stage's numbers as Prometheus gauges, beside Ray's own on every node's metrics port."""
