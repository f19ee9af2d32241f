"""A modelled TLB: what hardware may hold of a ``NestedVM``'s shadows until it is told to let go.

It serves two purposes: to show that the engine and the maintenance it owes (``NestedVM.take_tlbis``) leave no stale
translation reachable, and to let a simulator count hits and misses.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from s2shadow.constants import EL0, EXEC, EXEC_EL0, PTW, READ, WRITE, Kind, perm_text, size_text
from s2shadow.engine import HW_TLBI_DTYPE, VCPU, Fault
from s2shadow.features import GRANULES

__all__ = ["TlbEntry", "TlbModel"]

VMALLS12, IPA, VA, ASID, VMALL, ALL, VAA = range(7)  # HW_TLBI_DTYPE["op"]
LEVEL_ANY = -2
FIRST_CONTEXT_VMID = 2  # host VMID of context 0
ADDRESS_LIMIT = 1 << 64
ACCESS_LIMIT = 32
FINAL_LEVEL = 3

Stage = Literal["combined", "stage2"]
# Host VMID, stage, ASID, log2 of the size, block number, last level.
Tag = tuple[int, Stage, int | None, int, int, bool]


@dataclass(frozen=True, slots=True)
class TlbEntry:
    """One entry. ``stage`` is ``"stage2"`` (IPA to PA) or ``"combined"`` (VA to PA, stages 1 and 2 in one).

    ``size`` bytes from ``start`` on (IPA or VA) under ``host_vmid`` are at ``pa``, with ``perm``, a mask of ``Access``.
    ``asid`` is None for a global entry and for stage 2 alone. ``level`` is that of the descriptor: of stage 1 in a
    combined entry. With ``last_level`` False it is a cached table descriptor and ``pa`` that of the next table.
    ``ptw``: the translation was good for a stage-1 table walk too (HCR_EL2.PTW).
    """

    stage: Stage
    host_vmid: int
    asid: int | None
    start: int
    size: int
    pa: int
    perm: int
    level: int
    last_level: bool = True
    ptw: bool = False

    @property
    def end(self) -> int:
        """First address beyond the entry; 2^64 for the last block of the address space."""
        return self.start + self.size

    def pa_of(self, address: int) -> int:
        """PA of an address inside the entry."""
        if not self.start <= address < self.end:
            raise ValueError(f"address {address:#x} is outside the entry [{self.start:#x}, {self.end:#x})")
        return self.pa + (address - self.start)

    def allows(self, access: int) -> bool:
        """Whether an access (``Access`` flags) may use the entry."""
        need = access & (READ | WRITE)
        if access & EXEC:
            need |= EXEC_EL0 if access & EL0 else EXEC
        return not need & ~self.perm and (self.ptw or not access & PTW)

    def __repr__(self) -> str:
        asid = "" if self.stage == "stage2" else ", global" if self.asid is None else f", ASID {self.asid}"
        what = perm_text(self.perm) if self.last_level else "table"
        return (f"TlbEntry({self.stage}, VMID {self.host_vmid}{asid}, {self.start:#x} -> {self.pa:#x}, "
                f"{size_text(self.size)}, {what})")


@dataclass(slots=True)
class _Held:
    """An entry and where it sits."""

    entry: TlbEntry
    set: int
    way: int
    used: int


class TlbModel:
    """A set-associative TLB for what runs on the shadows of one ``NestedVM``.

    ``entries`` in sets of ``ways``: None for ways is fully associative, None for entries never evicts (for proofs,
    since an eviction hides a missing invalidation). ``replacement`` is ``"lru"`` or ``"round-robin"``. ``granule`` is
    the host's, from which a stage-2 entry's level follows.

    Entries are tagged with the host VMID (that of context i is 2 + i, of the canonical table 1), the stage, the ASID
    or global, and the block of addresses. Only translations that are there are held: no faults, nothing with AF
    clear. An entry that denies an access is a miss, and the refill takes its place. Entries of different size that
    overlap are both held, as hardware may; the smaller answers.

    Thread safety: each call is one step. ``translate`` asks the engine and fills in one step, so that another thread
    may ``apply`` rows meanwhile; a translation passed to ``fill_ipa`` or ``fill_va`` may be old by then.
    """

    hits: int
    misses: int
    invalidated: int
    evicted: int

    def __init__(self, entries: int | None = 1024, ways: int | None = 4,
                 replacement: Literal["lru", "round-robin"] = "lru", granule: int = 4096) -> None:
        if replacement not in ("lru", "round-robin"):
            raise ValueError(f"replacement must be 'lru' or 'round-robin', got {replacement!r}")
        if granule not in GRANULES:
            raise ValueError(f"granule must be one of {GRANULES}, got {granule!r}")
        self.entries = None if entries is None else _integer(entries, "entries", 1, 1 << 32)
        if self.entries is None:
            self.ways = None
        else:
            self.ways = self.entries if ways is None else _integer(ways, "ways", 1, self.entries + 1)
            if self.entries % self.ways:
                raise ValueError(f"entries ({entries}) must be a multiple of ways ({ways})")
        self.replacement = replacement
        self.granule = granule
        self._sets: list[list[Tag | None]] = []
        self._hands: list[int] = []
        if self.entries is not None and self.ways is not None:
            self._sets = [[None] * self.ways for _ in range(self.entries // self.ways)]
            self._hands = [0] * len(self._sets)
        self._held: dict[Tag, _Held] = {}
        self._by_owner: dict[tuple[int, Stage], set[Tag]] = {}  # by host VMID and stage
        self._sizes: dict[int, int] = {}  # how many entries of each log2 size, so that lookups probe no others
        self._clock = 0
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Set the counters ``hits``, ``misses``, ``invalidated`` and ``evicted`` to 0; the entries stay."""
        self.hits = self.misses = self.invalidated = self.evicted = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[TlbEntry]:
        with self._lock:
            return iter([held.entry for held in self._held.values()])

    def __repr__(self) -> str:
        shape = "unbounded" if self.entries is None else f"{self.entries} entries, {self.ways} ways, {self.replacement}"
        return f"TlbModel({shape}; {len(self)} held, {self.hits} hits, {self.misses} misses)"

    # looking up

    def lookup_ipa(self, host_vmid: int, ipa: int, access: int = READ) -> TlbEntry | None:
        """The stage-2 entry that answers this access, or None. Counts a hit or a miss."""
        vmid, address = _vmid(host_vmid), _integer(ipa, "ipa", 0, ADDRESS_LIMIT)
        return self._lookup("stage2", vmid, (None,), address, _access(access))

    def lookup_va(self, host_vmid: int, va: int, access: int = READ, asid: int | None = None) -> TlbEntry | None:
        """The combined entry of this ASID, or a global one, that answers this access, or None. With ``asid`` None
        only global ones. Counts a hit or a miss."""
        vmid, number = _vmid(host_vmid), _asid(asid)
        asids = (None,) if number is None else (number, None)
        return self._lookup("combined", vmid, asids, _va(va), _access(access))

    def lookup_table(self, host_vmid: int, address: int, asid: int | None = None,
                     stage: Stage = "stage2") -> TlbEntry | None:
        """The cached table descriptor nearest to the leaf for an IPA (``"stage2"``) or VA, or None. Not counted."""
        vmid, number = _vmid(host_vmid), _asid(asid)
        at = _integer(address, "address", 0, ADDRESS_LIMIT) if _stage(stage) == "stage2" else _va(address, "address")
        with self._lock:
            for held in self._covering(stage, vmid, (number,), at, False):
                self._touch(held)
                return held.entry
        return None

    def _lookup(self, stage: Stage, vmid: int, asids: tuple[int | None, ...], address: int,
                access: int) -> TlbEntry | None:
        with self._lock:
            for held in self._covering(stage, vmid, asids, address, True):
                if held.entry.allows(access):
                    self._touch(held)
                    self.hits += 1
                    return held.entry
                break  # the smallest one answers, and it says no
            self.misses += 1
        return None

    def _covering(self, stage: Stage, vmid: int, asids: tuple[int | None, ...], address: int,
                  last_level: bool) -> Iterator[_Held]:
        """Every entry over an address, the smallest first."""
        for bits in sorted(self._sizes):
            for asid in asids:
                held = self._held.get((vmid, stage, asid, bits, address >> bits, last_level))
                if held is not None:
                    yield held

    def _touch(self, held: _Held) -> None:
        self._clock += 1
        held.used = self._clock

    # filling

    def fill_ipa(self, host_vmid: int, source: Fault | np.void, ptw: bool = False) -> TlbEntry | None:
        """Hold a stage-2 translation: the answer of ``vcpu.translate`` or ``vcpu.fault``, a row of their batches or of
        ``vm.shadow(index)``. Returns the entry; None, and nothing is held, for what is no translation or has AF clear.

        ``ptw``: the answer was to an access with PTW.
        """
        vmid = _vmid(host_vmid)
        found = _translation(source)
        if found is None:
            return None
        address, pa, size, perm = found
        level = self._level(size)
        start = address & -size
        with self._lock:
            return self._put(TlbEntry("stage2", vmid, None, start, size, pa & -size, perm, level, True, bool(ptw)),
                             address)

    def fill_va(self, host_vmid: int, va: int, source: Fault | np.void, asid: int | None = None, size: int = 4096,
                level: int = 3, perm: int = READ | WRITE | EXEC | EXEC_EL0) -> TlbEntry | None:
        """Hold a combined translation of ``va``: stage 2 as in ``fill_ipa``, stage 1 given by the ``size`` and
        ``level`` of its leaf and the permissions that it leaves; ``asid`` None is a global entry.

        The entry has the smaller of both sizes. Its address and IPA must agree below it: ``ValueError``.
        """
        vmid, number, address = _vmid(host_vmid), _asid(asid), _va(va)
        stage1_size = _power_of_two(size, "size")
        stage1_level = _integer(level, "level", -1, FINAL_LEVEL + 1)
        allowed = _integer(perm, "perm", 0, ADDRESS_LIMIT)
        found = _translation(source)
        if found is None:
            return None
        ipa, pa, stage2_size, stage2_perm = found
        span = min(stage1_size, stage2_size)
        if (address ^ ipa) & (span - 1):
            raise ValueError(f"va {va:#x} and IPA {ipa:#x} differ inside their block of {size_text(span)}")
        entry = TlbEntry("combined", vmid, number, address & -span, span, pa & -span, stage2_perm & allowed,
                         stage1_level)
        with self._lock:
            return self._put(entry, address)

    def fill_table(self, host_vmid: int, address: int, size: int, pa: int, level: int, asid: int | None = None,
                   stage: Stage = "stage2") -> TlbEntry:
        """Hold a table descriptor of ``level`` that covers ``size`` bytes around an IPA (``"stage2"``) or VA, as a walk
        cache does; ``pa`` is the next table's."""
        vmid, number = _vmid(host_vmid), _asid(asid)
        at = _integer(address, "address", 0, ADDRESS_LIMIT) if _stage(stage) == "stage2" else _va(address, "address")
        span = _power_of_two(size, "size")
        entry = TlbEntry(stage, vmid, number, at & -span, span, _integer(pa, "pa", 0, ADDRESS_LIMIT), 0,
                         _integer(level, "level", -1, FINAL_LEVEL), last_level=False)
        with self._lock:
            return self._put(entry, at)

    def translate(self, vcpu: VCPU, ipa: int, access: int = READ) -> TlbEntry | None:
        """What this vCPU's access finds: an entry held, stale or not; on a miss what the shadow has, which is held from
        then on. None where the shadow has nothing: then it is for ``vcpu.fault``.

        The engine is asked each time, since only its answer names the context; a hit does not look at the rest of it.
        """
        with self._lock:
            fault = vcpu.translate(ipa, access)
            vmid = FIRST_CONTEXT_VMID + fault.context
            return self.lookup_ipa(vmid, ipa, access) or self.fill_ipa(vmid, fault, bool(access & PTW))

    def _level(self, size: int) -> int:
        page_bits = self.granule.bit_length() - 1
        levels, rest = divmod(size.bit_length() - 1 - page_bits, page_bits - 3)
        if rest or not 0 <= levels <= FINAL_LEVEL + 1:
            raise ValueError(f"size {size_text(size)} is no leaf of granule {size_text(self.granule)}")
        return FINAL_LEVEL - levels

    def _put(self, entry: TlbEntry, address: int) -> TlbEntry:
        """Hold an entry, in place of those of its kind that cover the address."""
        bits = entry.size.bit_length() - 1
        tag = (entry.host_vmid, entry.stage, entry.asid, bits, entry.start >> bits, entry.last_level)
        if entry.last_level:
            for held in list(self._covering(entry.stage, entry.host_vmid, (entry.asid,), address, True)):
                if held.entry == replace(entry, ptw=True):
                    entry = held.entry
                self._remove(self._tag(held.entry))
        elif tag in self._held:
            self._remove(tag)
        index, way = self._place(tag, entry.start >> bits)
        self._clock += 1
        self._held[tag] = _Held(entry, index, way, self._clock)
        self._by_owner.setdefault((entry.host_vmid, entry.stage), set()).add(tag)
        self._sizes[bits] = self._sizes.get(bits, 0) + 1
        return entry

    def _place(self, tag: Tag, block: int) -> tuple[int, int]:
        """Set and way for a new entry; what was there is evicted."""
        if not self._sets:
            return 0, 0
        index = block % len(self._sets)
        ways = self._sets[index]
        if None in ways:
            way = ways.index(None)
        elif self.replacement == "lru":
            way = min(range(len(ways)), key=lambda n: self._held[ways[n]].used)  # type: ignore[index]
        else:
            way = self._hands[index]
            self._hands[index] = (way + 1) % len(ways)
        victim = ways[way]
        if victim is not None:
            self._remove(victim)
            self.evicted += 1
        ways[way] = tag
        return index, way

    @staticmethod
    def _tag(entry: TlbEntry) -> Tag:
        bits = entry.size.bit_length() - 1
        return entry.host_vmid, entry.stage, entry.asid, bits, entry.start >> bits, entry.last_level

    def _remove(self, tag: Tag) -> None:
        held = self._held.pop(tag)
        self._by_owner[tag[0], tag[1]].discard(tag)
        self._sizes[tag[3]] -= 1
        if not self._sizes[tag[3]]:
            del self._sizes[tag[3]]
        if self._sets:
            self._sets[held.set][held.way] = None

    # invalidating

    def apply(self, rows: npt.NDArray[np.void] | np.void) -> int:
        """Do the maintenance of ``vm.take_tlbis()``, in order; how many entries went.

        By Arm's rules for each: an IPA takes stage-2 entries only, with a level hint leaves of that level only;
        stage-1 operations take combined entries only; an ASID spares global entries; a last-level operation spares
        cached table descriptors; VMALLS12 takes all of a VMID.
        """
        if not isinstance(rows, (np.ndarray, np.void)) or rows.dtype != HW_TLBI_DTYPE:
            raise TypeError(f"rows must be an array of HW_TLBI_DTYPE, got {_kind_of(rows)}")
        with self._lock:
            before = self.invalidated
            for row in np.atleast_1d(rows).tolist():
                _seq, op, vmid, start, end, level, asid, last_level = row
                if op > VAA:
                    raise ValueError(f"rows: no operation {op}")
                self._invalidate(op, vmid, start, end or ADDRESS_LIMIT, level, asid, bool(last_level))
            return self.invalidated - before

    def _invalidate(self, op: int, vmid: int, start: int, end: int, level: int, asid: int, last_level: bool) -> None:
        for tag in self._candidates(op, vmid, start, end):
            entry = self._held[tag].entry
            if op in (ALL, VMALLS12, VMALL):
                named = True
            elif op == ASID:
                named = entry.asid == asid
            elif op == VA and entry.asid not in (None, asid):
                named = False
            else:
                named = _in_reach(entry, start, end, level, last_level)
            if named:
                self._remove(tag)
                self.invalidated += 1

    def _candidates(self, op: int, vmid: int, start: int, end: int) -> list[Tag]:
        """Entries of the VMID and the stage that an operation is about; for a short range of IPAs only those that can
        be in it."""
        if op == ALL:
            return list(self._held)
        combined = self._by_owner.get((vmid, "combined"), set())
        stage2 = self._by_owner.get((vmid, "stage2"), set())
        if op == VMALLS12:
            return [*combined, *stage2]
        if op != IPA:
            return list(combined)
        if sum(((end - 1) >> bits) - (start >> bits) + 1 for bits in self._sizes) > len(stage2):
            return list(stage2)
        found: list[Tag] = []
        for bits in self._sizes:
            for block in range(start >> bits, ((end - 1) >> bits) + 1):
                found += [(vmid, "stage2", None, bits, block, last_level) for last_level in (True, False)]
        return [tag for tag in found if tag in stage2]


def _in_reach(entry: TlbEntry, start: int, end: int, level: int, last_level: bool) -> bool:
    if entry.start >= end or start >= entry.end:
        return False
    if not entry.last_level:
        return not last_level and (level == LEVEL_ANY or entry.level < level)
    return level in (LEVEL_ANY, entry.level)


def _kind_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, (np.ndarray, np.void)) else type(value).__name__


def _integer(value: Any, name: str, low: int, limit: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    number = int(value.__index__())
    if not low <= number < limit:
        raise ValueError(f"{name} must be in [{low}, {limit:#x}), got {number:#x}")
    return number


def _power_of_two(value: Any, name: str) -> int:
    number = _integer(value, name, 1, ADDRESS_LIMIT)
    if number & (number - 1):
        raise ValueError(f"{name} must be a power of two, got {number}")
    return number


def _vmid(value: Any) -> int:
    return _integer(value, "host_vmid", 0, 1 << 16)


def _asid(value: Any) -> int | None:
    return None if value is None else _integer(value, "asid", 0, 1 << 16)


def _access(value: Any) -> int:
    return _integer(value, "access", 0, ACCESS_LIMIT)


def _stage(value: Any) -> str:
    if value not in ("combined", "stage2"):
        raise ValueError(f"stage must be 'combined' or 'stage2', got {value!r}")
    return str(value)


def _va(value: Any, name: str = "va") -> int:
    """VA[55:0] with bit 55 copied upwards: what a TLBI can name."""
    address = _integer(value, name, 0, ADDRESS_LIMIT) & ((1 << 56) - 1)
    return address | 0xFF << 56 if address >> 55 else address


def _translation(source: Any) -> tuple[int, int, int, int] | None:
    """(ipa, pa, size, perm) of what can be held, or None."""
    if isinstance(source, Fault):
        if source.kind not in (Kind.HIT, Kind.MAPPED):
            return None
        return source.ipa, source.pa, source.size, source.perm
    names = source.dtype.names if isinstance(source, np.void) else None
    if not names or not {"ipa", "pa", "size", "perm"} <= set(names):
        raise TypeError(f"source must be a Fault or a row of FAULT_DTYPE or SHADOW_DTYPE, got {_kind_of(source)}")
    if ("young" in names and not source["young"]) or ("kind" in names and source["kind"] > Kind.MAPPED):
        return None
    return int(source["ipa"]), int(source["pa"]), int(source["size"]), int(source["perm"])
