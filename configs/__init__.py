"""Settings, presets and search spaces."""
