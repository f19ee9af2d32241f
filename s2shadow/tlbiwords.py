"""TLBIs in words: what an operation names, what the engine drops for it, and what Linux 7.2 does instead."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from s2shadow.constants import size_text
from s2shadow.features import Features
from s2shadow.tlbi import Tlbi, decode_tlbi

VTCR_DEFAULT = 16               # 48 bits, 4K granule, DS=0
GRANULES = {0: 4096, 1: 65536, 2: 16384, 3: 4096}       # VTCR.TG0; the reserved one acts as the smallest
SHARING = {"NSH": "non-shareable", "IS": "inner shareable", "OS": "outer shareable"}
LARGEST = {4096: 1 << 30, 16384: 32 << 20, 65536: 512 << 20}    # of the block sizes that Linux 7.2 knows
KVM_STEPS = (1 << 48) // (1 << 30)      # its steps over an empty 48-bit shadow on a 4K host
EL2_INSTEAD = "under {E2H,TGE}={1,1} it means the EL2&0 regime of virtual EL2 instead, whatever the VMID"


@dataclass(frozen=True, slots=True)
class Description:
    """A decoded TLBI and its lines: a heading, what it names, what it drops, what Linux 7.2 does."""

    tlbi: Tlbi
    xt: int
    heading: str
    names: str = ""
    drops: tuple[str, ...] = field(default=())
    linux: tuple[str, ...] = field(default=())

    @property
    def lines(self) -> list[str]:
        return [line for line in (self.heading, self.names, *self.drops, *self.linux) if line]


def features_for(vtcr: int | None) -> Features:
    """Everything an operation may need; 52-bit addresses where VTCR asks for them."""
    wide = vtcr is not None and (vtcr >> 16 & 7) >= 6
    return Features(pa_bits=52 if wide else 48, lpa=wide, lpa2=vtcr is not None and bool(vtcr >> 32 & 1))


def operation(text: str) -> str | int:
    """A name, or an instruction word: a number, or 8 hexadecimal digits as disassemblers print them."""
    if re.fullmatch(r"[dD]5[0-9a-fA-F]{6}", text):
        return int(text, 16)
    try:
        word = int(text, 0)
    except ValueError:
        return text
    if word < 0:
        raise ValueError(f"OP must be a name or an instruction word of 32 bits, got {text}")
    return word


def describe(op: str | int, xt: int | None = None, vtcr: int | None = None) -> Description:
    """What ``op`` with operand ``xt`` does, under ``vtcr`` (None: 48 bits, any granule). ``UndefinedInstruction``."""
    features = features_for(vtcr)
    tlbi = decode_tlbi(op, xt or 0, features=features, vtcr=vtcr)
    words = Words(tlbi, xt or 0, vtcr, features)
    names = words.names()
    if xt is None and tlbi.takes_operand:
        names += " (no operand given: taken as 0)"
    elif xt is not None and not tlbi.takes_operand:
        names = "it takes no operand: the one given does not count"
    return Description(tlbi, xt or 0, words.heading(), names, tuple(words.drops()), tuple(words.linux()))


def level_text(granule: int, level: int) -> str:
    return f"level {level} ({leaf_text(granule, level)})"


def leaf_size(granule: int, level: int) -> int:
    bits = granule.bit_length() - 1
    return 1 << (bits + (bits - 3) * (3 - level))


def leaf_text(granule: int, level: int) -> str:
    return f"{size_text(leaf_size(granule, level))} {'pages' if level == 3 else 'blocks'}"


def range_text(start: int, end: int) -> str:
    return f"[{start:#x}, {end:#x})"


class Words:
    """One operation, by its kind of target."""

    def __init__(self, tlbi: Tlbi, xt: int, vtcr: int | None, features: Features):
        self.tlbi, self.xt, self.vtcr, self.features = tlbi, xt, vtcr, features
        self.is_range = tlbi.name.startswith("R")
        self.has_address = tlbi.scope in ("VA", "VAA", "IPA")
        self.stage2 = tlbi.scope == "IPA"
        self.ttl = (xt >> 37 & 3 if self.is_range else xt >> 44 & 15) if self.has_address else 0
        # The granule that a context's leaves have: known only if VTCR is.
        self.granule = None if vtcr is None else GRANULES[vtcr >> 14 & 3]
        self.largest = LARGEST[self.granule or 4096]

    # --- what it names

    def heading(self) -> str:
        tlbi = self.tlbi
        parts = [self.target(), SHARING[tlbi.shareability]]
        if tlbi.last_level:
            parts.insert(1, "last level only")
        if tlbi.nxs:
            parts.append("exempts XS accesses")
        return f"{tlbi.name}  {', '.join(parts)}"

    def target(self) -> str:
        by = "by {} range" if self.is_range else "by {}"
        scope, regime = self.tlbi.scope, self.tlbi.regime
        if scope == "IPA":
            return f"{by.format('IPA')}, stage 2 of the current VMID"
        if scope == "VMALLS12":
            return "everything of the current VMID, stages 1 and 2 of EL1&0"
        if regime == "EL10_S12":
            return "everything of every VMID, stages 1 and 2 of EL1&0"
        if regime == "EL2_S1":
            return "everything of EL2's stage 1" if scope == "ALL" else f"{by.format('VA')}, stage 1 of EL2"
        which = {"VMALL": "everything", "ASID": "by ASID", "VAA": f"{by.format('VA')}, any ASID",
                 "VA": f"{by.format('VA')} and ASID"}[scope]
        return f"{which}, stage 1 of EL1&0 of the current VMID"

    def names(self) -> str:
        tlbi = self.tlbi
        asid = f"ASID {tlbi.asid}" if tlbi.asid is not None else ""
        if asid and tlbi.regime == "EL2_S1":
            asid += " if E2H=1"
        if not self.has_address:
            return asid
        if tlbi.start is None or tlbi.end is None:
            return f"names nothing: {self.why_nothing()}"
        parts = [asid] if asid else []
        if self.is_range:
            parts.append(f"{size_text(tlbi.granule or 0)} granule")
            parts.append(self.level_hint())
            pages = (tlbi.end - tlbi.start) // (tlbi.granule or 1)
            cut = ", cut at the input size" if pages != self.encoded_pages() and self.stage2 else ""
            parts.append(f"{pages:,} page{'s' if pages != 1 else ''}{cut}: {range_text(tlbi.start, tlbi.end)}")
        else:
            parts.append(f"{self.single_hint()}, {tlbi.start:#x}")
        return ", ".join(parts)

    def encoded_pages(self) -> int:
        return ((self.xt >> 39 & 31) + 1) << (5 * (self.xt >> 44 & 3) + 1)

    def why_nothing(self) -> str:
        if self.is_range and not self.xt >> 46 & 3:
            return "TG=00 is reserved"
        bits = 64 - ((VTCR_DEFAULT if self.vtcr is None else self.vtcr) & 63)
        return f"its address is beyond the input size of {bits} bits"

    def level_hint(self) -> str:
        tlbi = self.tlbi
        if tlbi.level is not None and tlbi.granule is not None:
            return level_text(tlbi.granule, tlbi.level)
        return "TTL=01 names no leaf of this granule: any level" if self.ttl else "any level"

    def single_hint(self) -> str:
        tlbi = self.tlbi
        if tlbi.granule is not None and tlbi.level is not None:
            return f"{size_text(tlbi.granule)} granule, {level_text(tlbi.granule, tlbi.level)}"
        return ("no leaf size has this TTL: " if self.ttl else "") + "any granule, any level"

    # --- what it drops

    def drops(self) -> list[str]:
        tlbi = self.tlbi
        if tlbi.scope == "VMALLS12":
            return ["drops every shadow leaf of every context of the VMID, stage 2 on or off"]
        if tlbi.regime == "EL10_S12":
            return ["drops every shadow leaf of every context"]
        if self.has_address and tlbi.start is None:
            return ["drops nothing"]
        if tlbi.regime == "EL2_S1":
            return ["drops no shadow leaf; the hardware is owed the same for the virtual EL2 regime"]
        if not self.stage2:
            return ["drops no shadow leaf; the hardware is owed the same for every context of the VMID", EL2_INSTEAD]
        return [self.stage2_drops()]

    def stage2_drops(self) -> str:
        tlbi = self.tlbi
        if tlbi.granule is not None and self.granule not in (None, tlbi.granule):
            return (f"drops nothing: VTCR's granule is {size_text(self.granule or 0)}, "
                    "and no entry of another granule need go")
        leaf = "every shadow leaf whose L1 mapping"
        if tlbi.level is not None and tlbi.granule is not None:
            leaf = f"the shadow leaves whose L1 mapping is at level {tlbi.level} and"
        reach = "touches that range" if self.is_range else "holds that address"
        return f"drops {leaf} {reach}, in all contexts of the VMID with stage 2 on"

    # --- what Linux 7.2 does

    def linux(self) -> list[str]:
        tlbi = self.tlbi
        if tlbi.regime == "EL10_S12":
            whom = "each context of the VMID" if tlbi.scope == "VMALLS12" else "each context, of any VMID"
            return [f"Linux 7.2 does the same, in {KVM_STEPS:,} steps of 1G over {whom}, full or empty"]
        if self.stage2:
            return self.linux_stage2()
        wider = "" if tlbi.shareability == "IS" else ", inner shareable"
        if tlbi.regime == "EL2_S1":
            return [f"Linux 7.2 does the same{wider}, and makes every fault that is being served start over"]
        return [f"Linux 7.2 does the same{wider}, context by context under the VM's write lock"]

    def in_linux(self) -> Tlbi:
        return decode_tlbi(self.tlbi.name, self.xt, features=self.features, vtcr=self.vtcr, dialect="kvm72")

    def linux_stage2(self) -> list[str]:
        tlbi, found = self.tlbi, self.in_linux()
        if self.vtcr is not None and not self.is_range and tlbi.start is None:
            return ["Linux 7.2 finds nothing there either"]
        if found.start is None or found.end is None:
            return [f"Linux 7.2 drops nothing{'' if tlbi.start is None else ': it takes the base for a negative one'}"]
        first = self.linux_range(found.start, found.end) if self.is_range else self.linux_single(found.start)
        lines = [f"Linux 7.2 {first}, and also drops the VMID's whole stage 1"]
        if not self.is_range and not self.ttl:
            lines.append(f"where it finds none it drops {self.block_text(found.start, self.largest)}, "
                         f"up to {self.largest // 4096:,} leaves of 4K")
        return [*lines, "Linux 7.2 does not spare contexts of the VMID with stage 2 off"]

    def linux_range(self, start: int, end: int) -> str:
        tlbi = self.tlbi
        if tlbi.start is None:
            reason = "takes TG=00 for 64K and " if not self.xt >> 46 & 3 else ""
            return f"{reason}drops every leaf in {range_text(start, end)}"
        if (start, end) != (tlbi.start, tlbi.end):
            return f"reads the base otherwise and drops every leaf in {range_text(start, end)}"
        if tlbi.level is not None:
            return "drops every leaf in that range, of any level"
        if self.granule not in (None, tlbi.granule):
            return "drops every leaf in that range, whatever the granule"
        return "does the same here"

    def linux_single(self, address: int) -> str:
        """The block that a TTL stands for is trusted; without one it is the shadow that says."""
        if not self.ttl:
            return "takes the size from the shadow leaf that it finds there"
        return f"drops every leaf in {self.block_text(address, self.linux_size())}, of any level"

    def linux_size(self) -> int:
        granule = {1: 4096, 2: 16384, 3: 65536}.get(self.ttl >> 2)
        level = self.ttl & 3
        if granule is None or level == 0 or (level == 1 and granule != 4096):
            return self.largest
        return leaf_size(granule, level)

    @staticmethod
    def block_text(address: int, size: int) -> str:
        start = address & ~(size - 1)
        return f"the {size_text(size)} of {range_text(start, start + size)}"


def record(found: Description) -> dict[str, Any]:
    """The same for machines; numbers that are addresses or registers as hexadecimal text."""
    tlbi = found.tlbi
    values: dict[str, Any] = {"op": tlbi.name, "xt": f"{found.xt:#x}"}
    for name, value in zip(tlbi._fields[1:], tlbi[1:], strict=True):
        values[name] = f"{value:#x}" if name in ("start", "end") and value is not None else value
    return values
