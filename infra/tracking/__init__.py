"""Upload of a run folder to MLflow."""
