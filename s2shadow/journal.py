"""A journal: one JSON record per line, on disk before ``append`` returns.

A crash loses at most the line that was being written; opening the journal again cuts that line off. A checksum ends
each record, so that a flipped bit in a figure is damage and not another figure. One process at a time writes to a
journal.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

__all__ = ["Journal", "JournalError"]


class JournalError(RuntimeError):
    """The journal is not one of ours, is damaged before its end, or is in use; the text names the file."""


class Journal:
    """``records`` holds what the file holds, as dicts; a file that ends up with none is removed again.

    ``kind`` is written into the first line, so that no other file is taken for a journal. ``restart`` forgets what is
    there. ``OSError`` where the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, restart: bool = False):
        self.path = Path(path)
        self.heading = {"journal": kind, "schema": 1}
        self.records: list[dict[str, Any]] = []
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self.file).st_mode):
                raise JournalError(f"{self.path}: not a file")
            self.lock()
            self.read()
            if restart:
                self.records.clear()
            if not self.records:
                self.write_heading()
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.records:
            self.path.unlink(missing_ok=True)
        os.close(self.file)

    def lock(self) -> None:
        """Held until the file is closed, by the kernel even if this process dies."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self.path}: another process is writing to it") from None

    def read(self) -> None:
        with open(self.file, "rb", closefd=False) as stream:
            data = stream.read()
        whole = data.rfind(b"\n") + 1
        if whole == 0 and json.dumps(self.heading).encode().startswith(data):
            return                      # new, or its first line was being written
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            record = parse(line)
            if number == 1 and record != self.heading:
                raise JournalError(f"{self.path}: not a journal of a {self.heading['journal']}")
            if record is None:
                raise JournalError(f"{self.path}: line {number} is damaged")
            self.records.append(record)
        if whole == 0:
            raise JournalError(f"{self.path}: not a journal of a {self.heading['journal']}")
        del self.records[0]
        os.ftruncate(self.file, whole)
        os.lseek(self.file, whole, os.SEEK_SET)

    def reread(self) -> None:
        """Hold what the file holds, after an interrupt in the middle of anything."""
        os.lseek(self.file, 0, os.SEEK_SET)
        self.records.clear()
        self.read()

    def write_heading(self) -> None:
        os.ftruncate(self.file, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        self.write(json.dumps(self.heading).encode() + b"\n")

    def append(self, record: dict[str, Any]) -> None:
        """``OSError`` if it cannot be stored: the journal is then as it was."""
        self.write(sealed(json.dumps(record, allow_nan=False)))
        self.records.append(record)

    def write(self, line: bytes) -> None:
        start = os.lseek(self.file, 0, os.SEEK_CUR)
        try:
            while line:
                line = line[os.write(self.file, line):]
            os.fsync(self.file)
        except OSError:
            os.ftruncate(self.file, start)
            os.lseek(self.file, start, os.SEEK_SET)
            raise


def parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    seal = record.pop("crc32", None)        # older records have none
    return record if seal is None or line == sealed(json.dumps(record)).rstrip() else None


def sealed(text: str) -> bytes:
    """A record's line: its JSON object with the checksum of that in it."""
    start = f"{text[:-1]}, " if text != "{}" else "{"
    return f'{start}"crc32": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()
