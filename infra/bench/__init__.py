"""Speed benchmarks that need Ray or MLflow."""
