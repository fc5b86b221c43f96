"""Command line, Ray, MLflow and deployment: what runs the work and keeps its records."""

import os

# Under `uv run`, Ray would send the project folder to every worker and build its environment there, or refuse a folder
# that is too large. Ray reads this when it is imported, so it is set before any module of this package can do that.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
