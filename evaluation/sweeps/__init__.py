"""Hyper-parameter sweeps: read, rank, analyse and plot trials."""
