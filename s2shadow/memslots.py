"""Memory slots: which guest addresses (IPA) a host address (HVA) stands for, in which VM and at what time.

MMU notifiers speak of a process's addresses. ``Memslots`` turns them into the ranges of every VM that has them mapped:
from a capture's memslots.json, from the probe ``memslot`` in a trace, or from what a user says (``parse_memslot``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from s2shadow.capture import CaptureError, Fields, one_line
from s2shadow.events import EVENT_DTYPE, RAW_ROW, UNKNOWN, EventKind, Events

__all__ = ["HVA_KINDS", "PIECE_DTYPE", "Memslot", "Memslots", "Piece", "parse_memslot"]

FOREVER = (1 << 64) - 1
PAGE = 4096
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
HVA_KINDS = tuple(map(int, (EventKind.UNMAP_HVA, EventKind.AGE_HVA, EventKind.TEST_AGE_HVA, EventKind.MN_START,
                            EventKind.MN_END)))

PIECE_DTYPE = np.dtype([("row", "u8"), ("start", "u8"), ("end", "u8"), ("vm", "u2")])


class Memslot(NamedTuple):
    """``size`` bytes at ``gpa`` of VM ``vm``, backed by the host's ``hva``, in [``since``, ``until``) (ns)."""

    gpa: int
    hva: int
    size: int
    vm: int = 0
    since: int = 0
    until: int = FOREVER


class Piece(NamedTuple):
    """The part of an HVA range that one slot holds, as IPAs of its VM."""

    vm: int
    start: int
    end: int


def parse_memslot(text: str) -> Memslot:
    """``gpa=ADDRESS,hva=ADDRESS,size=BYTES[,vm=N]`` as a user types it; sizes may end in K, M, G or T.

    Raises ``ValueError`` that names what is wrong.
    """
    values: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in ("gpa", "hva", "size", "vm"):
            raise ValueError(f"a memory slot is gpa=,hva=,size=[,vm=], got {part!r} in {text!r}")
        if name in values:
            raise ValueError(f"{name} appears twice in {text!r}")
        values[name] = parse_number(name, value, text)
    for name in ("gpa", "hva", "size"):
        if name not in values:
            raise ValueError(f"{name}= is missing in {text!r}")
    return checked(Memslot(**values), repr(text))


def parse_number(name: str, value: str, text: str) -> int:
    unit = UNITS.get(value[-1:].upper(), 0) if name == "size" else 0
    try:
        return int(value[:-1] if unit else value, 0) << unit
    except ValueError:
        raise ValueError(f"{name} is not a number: {value!r} in {text!r}") from None


def checked(slot: Memslot, where: str) -> Memslot:
    for name in ("gpa", "hva", "size"):
        value = getattr(slot, name)
        if value < 0 or value % PAGE:
            raise ValueError(f"{name} must be a multiple of {PAGE}, got {value:#x} in {where}")
    if slot.size == 0:
        raise ValueError(f"size is 0 in {where}")
    if slot.gpa + slot.size > 1 << 52:
        raise ValueError(f"gpa + size is beyond 52 bits in {where}")
    if slot.hva + slot.size > 1 << 64:
        raise ValueError(f"hva + size is beyond 64 bits in {where}")
    if not 0 <= slot.vm < UNKNOWN:
        raise ValueError(f"vm must be between 0 and {UNKNOWN - 1}, got {slot.vm} in {where}")
    return slot


class Memslots:
    """Slots of any number of VMs over time. ``slots`` may overlap: several VMs can share host memory."""

    def __init__(self, slots: Iterable[Memslot]):
        self.slots = tuple(checked(slot, str(slot)) for slot in slots if slot.since < slot.until)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Memslots:
        """Read a capture's memslots.json. Raises ``CaptureError``.

        Each entry of ``slots`` sets, moves or (size 0) deletes a slot of a VM: gpa, size and hva as integers or
        text, ``t_ns`` (ns) or ``t`` (s), by default from the start; ``vm``, by default 0; ``slot``, its number in
        the VM. Calls that failed (``rc``) changed nothing; ``vms`` says when a VM went (``vmdel``).
        """
        path = Path(file)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CaptureError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise CaptureError(f"{path} is not JSON: {one_line(error)}") from None
        fields = Fields(path, "", data)
        history = SlotHistory()
        steps = [(time_of(entry), entry) for entry in fields.list("slots")]
        gone = fields.list("vms") if fields.has("vms") else []
        steps += [(time_of(entry), entry) for entry in gone if entry.data.get("ev") == "vmdel"]
        for time, entry in sorted(steps, key=lambda step: step[0]):
            vm = entry.number("vm", UNKNOWN) if entry.has("vm") else 0
            if entry.data.get("ev") == "vmdel":
                history.end_vm(vm, time)
            elif not entry.data.get("rc"):
                name = entry.number("slot") if entry.has("slot") else None
                history.set(name, Memslot(entry.number("gpa"), entry.number("hva"), entry.number("size"), vm, time))
        try:
            return cls(history.slots())
        except ValueError as error:
            raise CaptureError(f"{path}: {error}") from None

    @classmethod
    def from_events(cls, events: Events) -> Memslots:
        """From the probe ``memslot`` on kvm_set_memory_region; rows whose VM is unknown count as VM 0.

        The probe sees calls, not whether they succeeded.
        """
        history = SlotHistory()
        for row in events[events["kind"] == int(EventKind.MEMSLOT)]:
            vm = int(row["vm"]) if row["vm"] != UNKNOWN else 0
            history.set(int(row["value"]), Memslot(int(row["start"]), int(row["va"]),
                                                   int(row["end"]) - int(row["start"]), vm, int(row["time"])))
        return cls(history.slots())

    def __len__(self) -> int:
        return len(self.slots)

    def __add__(self, other: Memslots) -> Memslots:
        return Memslots(self.slots + other.slots)

    def lookup(self, start: int, end: int, time: int = 0) -> list[Piece]:
        """The pieces of one HVA range [start, end) at ``time`` (ns): none where no slot holds it."""
        found = self.lookup_many(*(np.array([value], np.uint64) for value in (start, end, time)))
        return [Piece(int(piece["vm"]), int(piece["start"]), int(piece["end"])) for piece in found]

    def lookup_many(self, start: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64],
                    time: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
        """u64[n] each -> ``PIECE_DTYPE``[m], by ``row`` (index of the range), VM and IPA.

        An empty range is an address: its piece is empty too.
        """
        start, end, time = (np.asarray(values, np.uint64) for values in (start, end, time))
        last = np.maximum(end, start + np.uint64(1)) - np.uint64(1)     # closed, so that 2^64 - 1 is an address too
        found = [self.pieces_in(slot, start, end, last, time) for slot in self.slots]
        pieces = np.concatenate([np.zeros(0, PIECE_DTYPE), *found])
        return pieces[np.lexsort((pieces["start"], pieces["vm"], pieces["row"]))]

    @staticmethod
    def pieces_in(slot: Memslot, start: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64],
                  last: npt.NDArray[np.uint64], time: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
        low, high = np.uint64(slot.hva), np.uint64(slot.hva + slot.size - 1)
        rows = np.flatnonzero((start <= high) & (last >= low)
                              & (time >= np.uint64(slot.since)) & (time < np.uint64(slot.until)))
        pieces = np.zeros(len(rows), PIECE_DTYPE)
        if len(rows):
            moved = np.uint64((slot.gpa - slot.hva) % (1 << 64))
            empty = end[rows] <= start[rows]
            pieces["row"], pieces["vm"] = rows, slot.vm
            pieces["start"] = np.maximum(start[rows], low) + moved
            pieces["end"] = np.where(empty, pieces["start"], np.minimum(last[rows], high) + moved + np.uint64(1))
        return pieces

    def to_ipa(self, events: Events) -> Events:
        """The same events, with those on HVA (``HVA_KINDS``) turned into one row per VM and slot, ``vm`` filled.

        Ranges that no slot holds are left out: they are no guest memory.
        """
        is_hva = np.isin(events["kind"], HVA_KINDS)
        at = np.flatnonzero(is_hva)
        pieces = self.lookup_many(events["start"][at], events["end"][at], events["time"][at])
        times = np.ones(len(events), np.intp)
        times[at] = np.bincount(pieces["row"].astype(np.intp), minlength=len(at))
        rows = np.ascontiguousarray(events).view(RAW_ROW)[np.repeat(np.arange(len(events)), times)].view(EVENT_DTYPE)
        moved = np.repeat(is_hva, times)
        for name in ("start", "end", "vm"):
            rows[name][moved] = pieces[name]
        return rows


class SlotHistory:
    """Slots as they are set, moved and deleted, in the order of time."""

    def __init__(self) -> None:
        self.now: dict[tuple[int, object], Memslot] = {}
        self.past: list[Memslot] = []

    def set(self, name: int | None, slot: Memslot) -> None:
        key = (slot.vm, object() if name is None else name)
        self.end(key, slot.since)
        if slot.size:
            self.now[key] = slot

    def end(self, key: tuple[int, object], time: int) -> None:
        if (slot := self.now.pop(key, None)) is not None:
            self.past.append(slot._replace(until=time))

    def end_vm(self, vm: int, time: int) -> None:
        for key in [key for key in self.now if key[0] == vm]:
            self.end(key, time)

    def slots(self) -> list[Memslot]:
        return sorted([*self.past, *self.now.values()], key=lambda slot: slot.since)


def time_of(entry: Fields) -> int:
    if entry.has("t_ns"):
        return entry.number("t_ns")
    seconds = entry.data.get("t")
    if seconds is None:
        return 0
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < 1 << 33:
        raise CaptureError(f"{entry.file}: {entry.path('t')} must be seconds, got {seconds!r}")
    return round(seconds * 10**9)
