"""One order for two records of the same machine: a trace's text and the CSV of the instructions it executed.

The two have clocks of their own: the text's is the traced kernel's, the CSV's that of the machine that emulates it,
which goes on while the traced one is stopped for a snapshot. What ties them together are events that both saw:

``role="l1"``  the probes on KVM's TLB-flush functions, and the last TLBI of each flush. Every flush is one probe line
               and one run of instructions on the same CPU, so the n-th belongs to the n-th.
``role="l0"``  the probes on L0's handlers of L1's stage-2 TLBIs, and L1's instructions (they trap one by one).
neither        (a kernel whose flush code cannot be probed) the first time that each stage-2 table shows in both.

Rows of the CSV get the time of the text: those of a flush that of its line, those between two flushes the distance to
the one before, but never beyond the one after. Rows of one CPU keep their order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from s2shadow.events import EVENT_DTYPE, RAW_ROW, Events
from s2shadow.events import EventKind as K

__all__ = ["Merger", "merge"]

FLUSH_PROBES = tuple(map(int, (K.TLB_IPA, K.TLB_IPA_NSH, K.TLB_RANGE, K.TLB_VMID, K.TLB_CPU, K.TLB_ALL)))
# VMALLE1IS, VMALLE1, VMALLS12E1IS, VMALLS12E1, ALLE1IS, ALLE1, Rt left out: KVM ends each flush with one of them
FLUSH_ENDS = (0xD5088300, 0xD5088700, 0xD50C83C0, 0xD50C87C0, 0xD50C8380, 0xD50C8780)
RT = np.uint32(0x1F)
BADDR = np.uint64(0x0000_FFFF_FFFF_FFFE)
NEVER = np.int64(np.iinfo(np.int64).max)
LOOK_BACK = 1000            # rows in which the fault before a map is looked for
ENTRY_TO_FAULT = 50_000     # ns: a guest's entry and its first fault, when nothing measures it
HELD_ROWS = 2_000_000       # text held back at most while nothing ties the clocks together


class Merger:
    """Iterator over the merged rows, in arrays; see the module's text. Counts what it tied together.

    ``ties``: events found in both; ``mismatched``: pairs that name another table or operand, which tie nothing.
    """

    def __init__(self, text: Iterator[Events], table: Iterator[Events], role: str):
        self.text, self.table = text, table
        self.role = role
        self.ties = self.mismatched = 0
        self.waiting_text: dict[int, deque[tuple[int, int]]] = {}     # CPU: (time, what it names), not yet in the CSV
        self.waiting_table: dict[int, deque[tuple[int, int]]] = {}
        self.roots_text: dict[int, int] = {}
        self.roots_table: dict[int, int] = {}
        self.anchors: list[tuple[int, int, int]] = []   # (time of the CSV, time of the text, CPU), those still needed
        self.held: list[Events] = []                    # rows of the CSV without a time yet
        self.table_ended = False
        self._arrays = self._merge()

    def __iter__(self) -> Iterator[Events]:
        return self

    def __next__(self) -> Events:
        return next(self._arrays)

    # --- what both saw

    def text_ties(self, rows: Events) -> None:
        if self.role == "l1":
            found = rows[np.isin(rows["kind"], FLUSH_PROBES)]
            names = found["root"]
        else:
            found = rows[(rows["kind"] == int(K.HANDLE_TLBI)) & (rows["insn"] >> 16 & 7 == 4)]
            names = found["value"]
        for cpu, time, name in zip(found["cpu"].tolist(), found["time"].tolist(), names.tolist(), strict=True):
            self.waiting_text.setdefault(cpu, deque()).append((time, name))
        maps = np.flatnonzero(rows["kind"] == int(K.MAP))
        first, at = np.unique(rows["root"][maps], return_index=True)
        for root, row in zip(first.tolist(), maps[at].tolist(), strict=True):
            if root not in self.roots_text:
                self.roots_text[root] = self.entry_before(rows[max(row - LOOK_BACK, 0):row + 1])

    @staticmethod
    def entry_before(rows: Events) -> int:
        """When the guest was entered whose fault led to the map in the last of ``rows``."""
        map_ = rows[-1]
        faults = np.flatnonzero((rows["kind"] == int(K.GUEST_FAULT)) & (rows["pid"] == map_["pid"]))
        return int(rows["time"][faults[-1]] if len(faults) else map_["time"]) - ENTRY_TO_FAULT

    def table_ties(self, rows: Events) -> None:
        if self.role == "l1":
            found = rows[self.flush_ends(rows)]
            names = found["vttbr"] & BADDR
        else:
            found = rows[self.trapped(rows)]
            names = found["value"]
        for cpu, time, name in zip(found["cpu"].tolist(), found["time"].tolist(), names.tolist(), strict=True):
            self.waiting_table.setdefault(cpu, deque()).append((time, name))
        entries = rows[rows["kind"] == int(K.ENTER)]
        first, at = np.unique(entries["vttbr"] & BADDR, return_index=True)
        for root, time in zip(first.tolist(), entries["time"][at].tolist(), strict=True):
            self.roots_table.setdefault(root, time)

    @staticmethod
    def flush_ends(rows: Events) -> npt.NDArray[np.bool_]:
        return (rows["kind"] == int(K.TLBI)) & (rows["el"] == 2) & np.isin(rows["insn"] & ~RT, FLUSH_ENDS)

    @staticmethod
    def trapped(rows: Events) -> npt.NDArray[np.bool_]:
        """L1's own stage-2 TLBIs by address: its virtual EL2 is EL1 to the machine."""
        return (rows["kind"] == int(K.TLBI)) & (rows["el"] == 1) & (rows["insn"] >> 16 & 7 == 4)

    def tie(self) -> None:
        """Move what both have seen to the anchors."""
        new = []
        for cpu, texts in self.waiting_text.items():
            tables = self.waiting_table.get(cpu)
            while tables and texts:
                (time, name), (other, other_name) = texts.popleft(), tables.popleft()
                if name == other_name or not name:
                    new.append((other, time, cpu))
                else:
                    self.mismatched += 1
        if new:
            self.anchors = sorted((self.anchors if self.ties else []) + new)
            self.ties += len(new)
        elif not self.ties:
            self.anchors = sorted((self.roots_table[root], time, -1) for root, time in self.roots_text.items()
                                  if root in self.roots_table)

    def forget(self, oldest: int | None) -> None:
        """Drop the anchors before the last one that rows from ``oldest`` on can need."""
        times = [anchor[0] for anchor in self.anchors]
        at = len(times) if oldest is None else bisect_right(times, oldest)
        del self.anchors[:max(at - 1, 0)]

    # --- time

    def times(self, rows: Events) -> npt.NDArray[np.uint64]:
        """Time of the text for rows of the CSV, in order per CPU."""
        anchors = np.array(self.anchors, dtype=np.int64)
        theirs, ours = anchors[:, 0], np.maximum.accumulate(anchors[:, 1])
        mine = rows["time"].astype(np.int64)
        after = np.searchsorted(theirs, mine, side="right")
        before = np.maximum(after - 1, 0)
        time = ours[before] + (mine - theirs[before])
        known = after < len(ours)
        time[known] = np.minimum(time[known], ours[after[known]])
        for cpu in np.unique(rows["cpu"]).tolist():
            own = np.flatnonzero(rows["cpu"] == cpu)
            fixed = self.flush_times(rows[own], anchors[anchors[:, 2] == cpu])
            limit = np.minimum.accumulate(fixed[::-1])[::-1]
            time[own] = np.maximum.accumulate(np.minimum(np.where(fixed < NEVER, fixed, time[own]), limit))
        return np.maximum(time, 0).astype(np.uint64)

    def flush_times(self, rows: Events, anchors: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Times of the TLBIs of flushes, which come with their probe line; NEVER for other rows. Of one CPU."""
        fixed = np.full(len(rows), NEVER)
        if not len(anchors) or not self.ties:
            return fixed
        if self.role == "l1":
            ends, members = self.flush_ends(rows), (rows["kind"] == int(K.TLBI)) & (rows["el"] == 2)
        else:
            ends = members = self.trapped(rows)
        at = np.flatnonzero(ends)
        mine = rows["time"][at].astype(np.int64)
        anchor = np.minimum(np.searchsorted(anchors[:, 0], mine), len(anchors) - 1)
        tied = anchors[anchor, 0] == mine
        at, anchor = at[tied], anchor[tied]
        inside = np.flatnonzero(members)
        owner = np.searchsorted(at, inside)
        inside, owner = inside[owner < len(at)], owner[owner < len(at)]
        fixed[inside] = anchors[anchor[owner], 1]
        return fixed

    # --- the merge

    def _merge(self) -> Iterator[Events]:
        texts: list[Events] = []
        for chunk in self.text:
            texts.append(chunk)
            self.text_ties(chunk)
            self.tie()
            while not self.table_ended and self.wants_table():
                self.read_table()
            if self.anchors or self.table_ended or sum(map(len, texts)) > HELD_ROWS:
                together = joined(texts)
                texts = []
                yield from self.emit(together, int(together["time"][-1]))
        while not self.table_ended:
            self.read_table()
        yield from self.emit(joined(texts) if texts else None, None)

    def wants_table(self) -> bool:
        """Whether the CSV should hold something that the text has shown already."""
        return any(self.waiting_text.values()) or (not self.ties and bool(self.roots_text.keys() - self.roots_table))

    def read_table(self) -> None:
        chunk = next(self.table, None)
        if chunk is None:
            self.table_ended = True
            return
        self.held.append(chunk)
        self.table_ties(chunk)
        self.tie()

    def emit(self, text: Events | None, until: int | None) -> Iterator[Events]:
        """``text``, and every row of the CSV up to ``until`` (None: to the end)."""
        if not self.anchors:        # nothing in common: both begin together
            first = int(self.held[0]["time"][0]) if self.held else 0
            self.anchors = [(first, 0 if text is None else int(text["time"][0]), -1)]
        while until is not None and not self.table_ended and not self.beyond(until):
            self.read_table()
        parts = [] if text is None else [text]
        if self.held:
            rows = joined(self.held)
            time = self.times(rows)
            due = np.ones(len(rows), bool) if until is None else time <= until
            self.held = [] if due.all() else [chosen(rows, ~due)]
            self.forget(int(self.held[0]["time"][0]) if self.held else int(rows["time"][-1]))
            taken = chosen(rows, due)
            taken["time"] = time[due]
            parts.append(taken)
        if parts:
            merged = joined(parts)
            yield chosen(merged, np.argsort(merged["time"], kind="stable"))

    def beyond(self, until: int) -> bool:
        """Whether the CSV has been read past that time."""
        return bool(self.held) and int(self.times(self.held[-1][-1:])[0]) > until


# Whole rows are moved as raw bytes: numpy moves structured ones field by field, ten times slower.

def joined(arrays: list[Events]) -> Events:
    return np.concatenate([np.ascontiguousarray(array).view(RAW_ROW) for array in arrays]).view(EVENT_DTYPE)


def chosen(rows: Events, which: npt.NDArray[Any]) -> Events:
    """``rows[which]`` by a mask or by positions."""
    return np.ascontiguousarray(rows).view(RAW_ROW)[which].view(EVENT_DTYPE)


def merge(text: Iterator[Events], table: Iterator[Events], role: str) -> Merger:
    """Merge a text and a CSV of the same machine -> iterator of arrays of ``EVENT_DTYPE``, times those of the text."""
    return Merger(text, table, role)
