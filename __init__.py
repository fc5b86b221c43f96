"""Unsupervised meta-learning with Meta-GMVAE: the public Python API, imported on first use."""
