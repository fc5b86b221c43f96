"""Hyper-parameter sweeps: trials read, ranked, explained and drawn."""
