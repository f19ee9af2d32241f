"""Names that users pass in and read out: access flags, fault kinds, HCR_EL2 bits, teardown policies."""

from enum import IntEnum, IntFlag

__all__ = ["Access", "Kind", "HCR_VM", "HCR_PTW", "HCR_DC", "HCR_CD", "HCR_FWB",
           "READ", "WRITE", "EXEC", "EL0", "PTW", "EXEC_EL0",
           "HIT", "MAPPED", "L1_FAULT", "HOST_FAULT", "MMIO", "RETRY", "NO_MEMORY", "MISS", "TEARDOWNS"]


class Access(IntFlag):
    """What an access does, and what a leaf permits: ``READ``, ``WRITE``, ``EXEC``.

    ``EL0`` (unprivileged) and ``PTW`` (a stage-1 table walk) qualify an access; ``EXEC_EL0`` appears only in
    permissions, where ``EXEC`` stands for EL1. Several of READ, WRITE and EXEC must all be allowed.
    """

    READ = 1
    WRITE = 2
    EXEC = 4
    EL0 = 8
    PTW = 16
    EXEC_EL0 = 32


class Kind(IntEnum):
    """How a fault was answered (``FAULT_DTYPE['kind']``).

    ``HIT``: a live entry allows it. ``MAPPED``: an entry was installed, replaced or relaxed. ``L1_FAULT``: L1's tables
    forbid it, and L1 gets the fault. ``HOST_FAULT``: the host has no leaf there, or one without the permission.
    ``MMIO``: outside RAM, or a write to read-only memory. ``RETRY``: an invalidation got in between. ``NO_MEMORY``: the
    allocator refused. ``MISS``: no entry that allows it; from ``translate`` only.
    """

    HIT = 0
    MAPPED = 1
    L1_FAULT = 2
    HOST_FAULT = 3
    MMIO = 4
    RETRY = 5
    NO_MEMORY = 6
    MISS = 7


READ, WRITE, EXEC, EL0, PTW, EXEC_EL0 = Access
HIT, MAPPED, L1_FAULT, HOST_FAULT, MMIO, RETRY, NO_MEMORY, MISS = Kind

HCR_VM = 1 << 0
HCR_PTW = 1 << 2
HCR_DC = 1 << 12
HCR_CD = 1 << 32
HCR_FWB = 1 << 46

# What ``NestedVM(teardown=…)`` and ``s2shadow storm --teardown`` accept.
TEARDOWNS = ("reverse-map", "interval-map", "blow-away", "blow-away-lean")


def perm_text(perm: int) -> str:
    """``rwx`` of a permission mask; a lone EL1 or EL0 execute shows as ``p`` or ``u``."""
    execute = {0: "-", 4: "p", 32: "u", 36: "x"}[perm & 36]
    return ("r" if perm & 1 else "-") + ("w" if perm & 2 else "-") + execute


def size_text(size: int) -> str:
    """A power of two of bytes as ``4K``, ``2M``, ``1G``."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >> shift and not size & ((1 << shift) - 1):
            return f"{size >> shift}{unit}"
    return str(size)
