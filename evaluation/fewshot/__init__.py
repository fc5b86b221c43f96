"""Few-shot prediction, episodes, baselines and metrics."""
