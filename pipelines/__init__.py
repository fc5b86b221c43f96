"""Making datasets and reading them."""
