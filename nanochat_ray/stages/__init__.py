"""The stages: pretraining, SFT and later RL as visible loops, with World and Hooks passed in. No Ray."""
