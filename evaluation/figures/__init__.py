"""Figures of one model: training curves, reconstructions, mixture modes, latent map, predictions."""
