"""The MLflow model registry: versions, aliases, promotion, serving."""
