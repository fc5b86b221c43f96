"""Mirroring a run folder to MLflow."""
