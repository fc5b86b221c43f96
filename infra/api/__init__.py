"""The Python API: the commands as functions with typed results."""
