"""Tells whether a record in a folder was made in this folder, or came here with a copy of another one.

The inode of a folder stays when the folder is renamed or moved within a file system, and a copy has another one.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import BaseModel


class FolderIdentity(BaseModel, strict=True, frozen=True):
    """Place and inode of a folder, as a record in it holds them."""

    host: str
    path: str
    inode: int

    @classmethod
    def of(cls, folder: Path) -> FolderIdentity:
        """Return the identity of a folder now."""
        path = os.path.realpath(folder)
        return cls(host=socket.gethostname(), path=path, inode=os.stat(path).st_ino)

    def is_here(self, folder: Path) -> bool:
        """Return whether a record with this identity was made in `folder`, which may have been moved on its disk."""
        now = FolderIdentity.of(folder)
        same_host, same_path = self.host == now.host, self.path == now.path
        # The host name of a container changes, and the path in it; the inode of a folder mounted in it does not.
        return (self.inode == now.inode and (same_host or same_path)) or (same_host and same_path)

    def is_moved(self, folder: Path, name: str) -> bool:
        """Return whether `folder` was moved, not copied: the file `name` no longer exists where the record was made."""
        return self.host == socket.gethostname() and not os.path.lexists(os.path.join(self.path, name))
