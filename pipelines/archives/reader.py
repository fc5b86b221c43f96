"""Lists and reads the files of a folder, a zip file or a tar file, without unpacking archives to disk.

Archives are untrusted: members with names that point outside, and encrypted, duplicate or extremely compressed members
are refused before anything is read, and no member is unpacked beyond its stated size. The same files give the same
entries in a folder and in an archive.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from metagmvae.pipelines.archives.entries import Entry, FileTree, Kind, LeftOut, Listing
from metagmvae.pipelines.archives.folder import FolderFiles, is_hidden
from metagmvae.pipelines.archives.formats import TAR_SUFFIXES, archive_format
from metagmvae.pipelines.archives.tar import open_tar
from metagmvae.pipelines.archives.zip import ZipFiles
from metagmvae.pipelines.records import DataError

ARCHIVES = (".zip", *TAR_SUFFIXES)
"""Suffixes of archives, for sources that search for them; an archive that is given is recognised by its content."""
HIDDEN = "hidden"


def list_files(
    root: str | Path,
    suffixes: tuple[str, ...],
    recognise: Callable[[IO[bytes]], bool] | None = None,
    *,
    checksums: bool = True,
) -> Listing:
    """All files of a folder or an archive: those to read, and those that are left out, with reasons.

    Hidden files, `__MACOSX` and files that vanish while the folder is listed are left out. Symbolic links in folders
    are followed if their suffix is known.

    Args:
        root: folder or archive.
        suffixes: files with these suffixes (in lower case) are to be read.
        recognise: whether an opened file without a suffix is to be read; None leaves all of them out.
        checksums: False does not read the files of a folder: CRC-32 and size of its entries are 0.

    Raises:
        DataError: `root` does not exist or cannot be read, a file to read is a link in an archive or no regular file,
            or the archive is unsafe.
    """
    tree = _open_tree(Path(root))
    listing, in_folder = Listing(), Path(root).is_dir()
    entry = tree.entry if checksums or not in_folder else lambda name: Entry(name, 0, 0)
    for name, kind in tree.names():
        if any(map(is_hidden, PurePosixPath(name).parts)):
            listing.left_out.append(LeftOut(name, HIDDEN))
        elif kind == "folder":
            listing.folders.append(name)
        elif kind == "special file" and in_folder and not os.path.lexists(Path(root) / name):
            listing.left_out.append(LeftOut(name, "removed while the folder was listed"))
        elif name.lower().endswith(suffixes):
            _check_readable(root, name, kind)
            listing.entries.append(entry(name))
        elif kind != "file":
            listing.left_out.append(LeftOut(name, kind))
        elif not (suffix := _suffix(name)) and recognise and _is_text(name) and _recognised(tree, name, recognise):
            listing.entries.append(entry(name))
        else:
            listing.left_out.append(LeftOut(name, f"suffix {suffix}" if suffix else "no suffix"))
    listing.entries.sort()
    listing.left_out.sort(key=lambda file: file.name)
    return listing


def list_entries(root: str | Path, suffixes: tuple[str, ...]) -> list[Entry]:
    """Files with one of the suffixes (in lower case) in a folder or an archive, sorted by name; see `list_files`."""
    return list_files(root, suffixes).entries


def read_entry(root: str | Path, name: str) -> bytes:
    """Content of one file.

    Raises:
        DataError: the file is missing or damaged, or the archive is unsafe.
    """
    if not Path(root).exists():
        raise DataError(f"{root}: {name} cannot be read (no such file or folder)")
    try:
        return _open_tree(Path(root)).read(name)
    except KeyError as error:
        raise DataError(f"{root}: no member {name}") from error
    except OSError as error:
        raise DataError(f"{root}: {name} cannot be read ({error}); download the file again") from error


def _open_tree(root: Path) -> FileTree:
    if root.is_dir():
        return FolderFiles(root)
    if not root.is_file():
        raise DataError(f"{root}: no such file or folder; check the path")
    return ZipFiles(root) if archive_format(root) == "zip" else open_tar(root)


def _suffix(name: str) -> str:
    """Suffix in lower case; what follows the last dot of `0001.5` or `GO.0001` is none."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix[1:2].isalpha() else ""


def _recognised(tree: FileTree, name: str, recognise: Callable[[IO[bytes]], bool]) -> bool:
    try:
        with tree.open(name) as file:
            return recognise(file)
    except (PermissionError, FileNotFoundError):
        return False


def _check_readable(root: str | Path, name: str, kind: Kind) -> None:
    if Path(root).is_dir():
        if not (Path(root) / name).is_file():
            raise DataError(f"{Path(root) / name}: not a regular file; remove it")
    elif kind != "file":
        raise DataError(
            f"{root}: member {name!r} is a {kind}; pack the archive again with the files themselves "
            "(`tar --dereference`, `zip` without -y)"
        )
    if not _is_text(name):
        raise DataError(f"{root}: file name {name!r} is not one line of UTF-8; rename the file")


def _is_text(name: str) -> bool:
    """Whether a name is valid UTF-8 and one line; file systems also allow other names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return len(name.splitlines()) == 1 and "\0" not in name
