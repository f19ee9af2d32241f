"""What the host says about one block of L1's physical memory, and the ready-made populate policy."""

from __future__ import annotations

from dataclasses import dataclass

from s2shadow.constants import perm_text, size_text

MEMATTR_NAMES = {
    "device-nGnRnE": (0b0000, 0b0000),
    "device-nGnRE": (0b0001, 0b0001),
    "device-nGRE": (0b0010, 0b0010),
    "device-GRE": (0b0011, 0b0011),
    "nc": (0b0101, 0b0101),
    "normal": (0b1111, 0b0110),
    "normal-as-s1": (0b1111, 0b0111),
}


def memattr_code(memattr: str | int, fwb: bool) -> int:
    """MemAttr[3:0] of a name (or of a code, which is taken as it is)."""
    if isinstance(memattr, str):
        try:
            return MEMATTR_NAMES[memattr][bool(fwb)]
        except KeyError:
            raise ValueError(f"memattr must be one of {', '.join(MEMATTR_NAMES)} or 0-15, got {memattr!r}") from None
    if not hasattr(memattr, "__index__"):
        raise TypeError(f"memattr must be a name or 0-15, got {type(memattr).__name__}")
    if not 0 <= memattr <= 15:
        raise ValueError(f"memattr must be 0-15, got {memattr}")
    return memattr


def perm_mask(perm: str | int) -> int:
    """The permission mask of ``"rwx"`` (any letters of it, ``-`` for none) or of a mask of ``Access`` bits."""
    if isinstance(perm, str):
        if set(perm) - set("rwx-"):
            raise ValueError(f"perm must consist of r, w, x and -, got {perm!r}")
        return ("r" in perm) | ("w" in perm) << 1 | ("x" in perm) * 36
    if not hasattr(perm, "__index__"):
        raise TypeError(f"perm must be text or a mask, got {type(perm).__name__}")
    if int(perm) & ~39:
        raise ValueError(f"perm must be made of READ, WRITE, EXEC and EXEC_EL0, got {perm:#x}")
    return int(perm)


@dataclass(frozen=True, slots=True)
class HostMapping:
    """Host block of ``size`` bytes (a power of two) at ``pa``, aligned: the block of that size around the cIPA in
    question.

    ``perm`` is ``"rwx"`` text or a mask; ``memattr`` a name (``normal``, ``normal-as-s1``, ``nc``,
    ``device-nGnRnE``, ``device-nGnRE``, ``device-nGRE``, ``device-GRE``) or MemAttr[3:0]. ``ValueError`` or
    ``TypeError`` for anything else.
    """

    pa: int
    size: int
    perm: str | int = "rwx"
    memattr: str | int = "normal"

    def __post_init__(self):
        if self.size <= 0 or self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, got {self.size}")
        if self.pa < 0 or self.pa % self.size:
            raise ValueError(f"pa {self.pa:#x} is not aligned to size {self.size:#x}")
        perm_mask(self.perm)
        memattr_code(self.memattr, True)

    def __repr__(self):
        return f"HostMapping({self.pa:#x}, {size_text(self.size)}, {perm_text(perm_mask(self.perm))}, {self.memattr})"


@dataclass(frozen=True, slots=True)
class Linear:
    """Populate policy: pa = cipa + ``offset`` over the regions of the memory, in the largest blocks allowed.

    ``offset`` is a multiple of 4096, ``max_block`` bounds the block size in bytes (``ValueError`` for others).
    ``fresh`` gives every mapping a new PA instead, so that a stale leaf shows. Read-only regions are mapped without W;
    device regions are not mapped.
    """

    offset: int = 0
    max_block: int = 2 << 20
    fresh: bool = False

    def __post_init__(self):
        if self.offset % 4096:
            raise ValueError(f"offset {self.offset:#x} is not aligned to 4096")
        if self.max_block < 4096 or self.max_block & (self.max_block - 1):
            raise ValueError(f"max_block must be a power of two of at least 4096, got {self.max_block}")
