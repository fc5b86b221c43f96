"""Calibration of the probabilities, and queries of no labelled class."""
