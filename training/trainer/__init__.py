"""The training loop, its stages and steps, checkpoints and model packages."""
