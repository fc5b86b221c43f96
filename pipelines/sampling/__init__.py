"""Unlabelled training sets and labelled episodes as functions of (seed, index)."""
