"""Encoders by name, and classifiers on the features of an encoder alone."""
