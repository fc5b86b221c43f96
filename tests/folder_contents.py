"""The files of a folder, for comparisons byte by byte."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Content of each file by its path relative to the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
