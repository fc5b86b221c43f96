"""Speed benchmarks that need neither Ray nor MLflow."""
