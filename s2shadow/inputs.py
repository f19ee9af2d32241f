"""Files that somebody named, opened to be read: what has no end is refused."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

__all__ = ["open_input", "read_input"]


def open_input(file: str | os.PathLike[str]) -> BinaryIO:
    """The binary stream of a file or pipe; ``OSError`` for a device such as /dev/zero, but for a terminal."""
    stream = open(file, "rb")
    if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not stream.isatty():
        stream.close()
        raise OSError(errno.EINVAL, "it is a device")
    return stream


def read_input(stream: BinaryIO, most: int) -> bytes:
    """All of a stream; ``ValueError`` if that is more than ``most`` bytes."""
    data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data
