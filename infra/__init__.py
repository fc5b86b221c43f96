"""Command line, Ray, MLflow and deployment: what runs the work and keeps its records."""
