"""Hyper-parameter sweeps with Ray Tune and Optuna."""
