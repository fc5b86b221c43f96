"""Making data sets and reading them."""
