import os
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt
from typing_extensions import Buffer

from s2shadow.capture import Capture

# numpy's stubs give arrays the buffer protocol only from Python 3.12 on
_BufferLike: TypeAlias = Buffer | npt.NDArray[Any]

PAGE: int
ADDRESS_LIMIT: int

class Region(NamedTuple):
    start: int
    size: int
    readonly: bool
    device: bool

class GuestMemory:
    def __init__(self) -> None: ...
    @property
    def regions(self) -> tuple[Region, ...]: ...
    def add(
        self,
        cipa: int,
        size: int | None = None,
        *,
        buffer: _BufferLike | None = None,
        readonly: bool = False,
        device: bool = False,
    ) -> None: ...
    def remove(self, cipa: int) -> None: ...
    def read(self, cipa: int, n: int) -> bytes: ...
    def write(self, cipa: int, data: _BufferLike) -> None: ...
    def read64(self, cipa: int) -> int: ...
    def write64(self, cipa: int, value: int) -> None: ...
    def load_tables(
        self, snapshot: str | os.PathLike[str], which: str = "auto"
    ) -> Capture: ...
