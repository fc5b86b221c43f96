"""Beginning of presets of a small model, a TOML text whose `name` is to be filled in."""

SMALL = """
name = "{name}"
[model]
channels = 4
width = 8
heads = 2
latent = 4
layers = 1
[adapt]
samples = 2
iterations = 2
"""
