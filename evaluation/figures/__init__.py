"""Plots of one model: training curves, episodes, mixture modes."""
