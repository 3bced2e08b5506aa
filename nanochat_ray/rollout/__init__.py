"""Ray actors that sample and score rollouts."""
