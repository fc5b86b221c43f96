"""Unlabelled training sets and labelled episodes, each a function of (seed, index)."""
