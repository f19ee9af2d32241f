"""Stage-2 descriptors with their fields named: what ``walk(…, trace=True)`` shows. Not on any hot path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2shadow.config import Stage2Config
    from s2shadow.memory import GuestMemory

FINAL_LEVEL = 3
VALID, TABLE, AF, CONTIGUOUS = 1 << 0, 1 << 1, 1 << 10, 1 << 52
DIRTY, DBM = 1 << 7, 1 << 51
SOFTWARE = 0xF << 55


@dataclass(frozen=True, slots=True)
class WalkLevel:
    """One level of a walk: ``level``, -1 to 3.

    ``table``, ``index``, ``address``: where the descriptor is; ``desc`` its value in host byte order, None where
    memory does not answer. ``kind``: ``invalid``, ``reserved`` (an encoding that this level does not have),
    ``table``, ``block``, ``page`` or ``unreadable``. ``output``: address of the next table, or of the leaf; None for
    the other kinds. ``fields``: the descriptor's fields by their names in the Arm ARM. ``notes``: what is odd about it.
    """

    level: int
    table: int
    index: int
    address: int
    desc: int | None
    kind: str
    output: int | None
    fields: dict[str, int]
    notes: tuple[str, ...]


def bits(value: int, high: int, low: int) -> int:
    return value >> low & (1 << high - low + 1) - 1


def level_shift(cfg: Stage2Config, level: int) -> int:
    granule_bits = cfg.granule.bit_length() - 1
    return granule_bits + (granule_bits - 3) * (FINAL_LEVEL - level)


def has_blocks(cfg: Stage2Config, level: int) -> bool:
    """Whether a block may stand at ``level`` (spec 01, section 3.2)."""
    largest = 1 if cfg.granule == 4096 else 2
    return largest - cfg.wide_output <= level < FINAL_LEVEL


def kind_of(cfg: Stage2Config, desc: int, level: int) -> str:
    if not desc & VALID:
        return "invalid"
    if level == FINAL_LEVEL:
        return "page" if desc & TABLE else "reserved"
    if desc & TABLE:
        return "table"
    return "block" if has_blocks(cfg, level) else "reserved"


def output_address(cfg: Stage2Config, desc: int) -> int:
    """Address bits of a table or leaf descriptor, 52-bit forms included."""
    address = bits(desc, 47, 0) & -cfg.granule
    if not cfg.wide_output:
        return address
    if cfg.granule == 65536:
        return address | bits(desc, 15, 12) << 48
    return address | bits(desc, 49, 48) << 48 | bits(desc, 9, 8) << 50


def fields_of(cfg: Stage2Config, desc: int, level: int, kind: str) -> dict[str, int]:
    """Fields of a table or leaf descriptor; empty for the other kinds."""
    if kind == "table":
        return {"NextLevelTable": output_address(cfg, desc)}
    if kind not in ("block", "page"):
        return {}
    fields = {"OA": output_address(cfg, desc) >> level_shift(cfg, level) << level_shift(cfg, level)}
    if cfg.s2pie:
        fields["PIIndex"] = bits(desc, 54, 53) << 2 | bits(desc, 51, 51) << 1 | bits(desc, 6, 6)
        fields["Dirty"] = bits(desc, 7, 7)
    else:
        fields["S2AP"] = bits(desc, 7, 6)
        fields["XN"] = bits(desc, 54, 53)
        fields["DBM"] = bits(desc, 51, 51)
    fields["AF"] = bits(desc, 10, 10)
    if not cfg.ds:
        fields["SH"] = bits(desc, 9, 8)
    fields["MemAttr"] = bits(desc, 5, 2)
    fields["FnXS"] = bits(desc, 11, 11)
    fields["Contiguous"] = bits(desc, 52, 52)
    if kind == "block":
        fields["nT"] = bits(desc, 16, 16)
    fields["Software"] = bits(desc, 58, 55)
    fields["PBHA"] = bits(desc, 62, 59)
    return fields


def group_entries(cfg: Stage2Config, level: int) -> int:
    """Adjacent entries that the contiguous bit joins; 1 where it is ignored."""
    per_level = {4096: {3: 16, 2: 16, 1: 16}, 16384: {3: 128, 2: 32}, 65536: {3: 32, 2: 32}}
    return per_level[cfg.granule].get(level, 1)


def group_notes(mem: GuestMemory, cfg: Stage2Config, table: int, index: int, desc: int, level: int) -> list[str]:
    """What is wrong with the contiguous group around a leaf (Arm ARM, "Misprogramming of the Contiguous bit")."""
    entries = group_entries(cfg, level)
    span = 1 << level_shift(cfg, level)
    if entries == 1:
        return [f"contiguous bit is ignored at level {level}"]
    if entries * span > 1 << cfg.ia_bits:
        return [f"contiguous group of {entries} exceeds the {cfg.ia_bits}-bit input: bit ignored"]
    first = index // entries * entries
    origin = output_address(cfg, desc) // span * span - (index - first) * span
    kind = kind_of(cfg, desc, level)
    may_differ = AF | SOFTWARE | (DIRTY if desc & DBM or cfg.s2pie else 0)      # hardware sets AF and bit 7 one by one
    wrong = []
    for entry in range(first, first + entries):
        other = read_descriptor(mem, cfg, table + entry * 8)
        if (other is None or kind_of(cfg, other, level) != kind or not other & CONTIGUOUS
                or (attributes(cfg, other) ^ attributes(cfg, desc)) & ~may_differ
                or output_address(cfg, other) // span * span != origin + (entry - first) * span):
            wrong.append(entry)
    notes = []
    if wrong:
        notes.append(f"contiguous group of {entries} is misprogrammed: "
                     f"{'entry' if len(wrong) == 1 else 'entries'} {', '.join(map(str, wrong[:8]))}"
                     f"{' …' if len(wrong) > 8 else ''} of the table {'does' if len(wrong) == 1 else 'do'} not fit")
    if origin % (entries * span):
        notes.append(f"contiguous group of {entries} is misprogrammed: its output is not aligned to its size")
    return notes


def attributes(cfg: Stage2Config, desc: int) -> int:
    """A leaf descriptor without its output address."""
    mask = bits(-cfg.granule, 47, 0)
    if cfg.wide_output:
        mask |= 0xF000 if cfg.granule == 65536 else 3 << 48 | 3 << 8
    return desc & ~mask


def read_descriptor(mem: GuestMemory, cfg: Stage2Config, address: int) -> int | None:
    """A descriptor in host byte order; None where no RAM is."""
    try:
        word = mem.read64(address)
    except ValueError:
        return None
    return int.from_bytes(word.to_bytes(8, "little"), "big") if cfg.big_endian else word


def describe_level(mem: GuestMemory, cfg: Stage2Config, ipa: int, level: int, address: int,
                   desc: int | None) -> WalkLevel:
    """The descriptor that a walk for ``ipa`` met at ``level``."""
    index = ipa >> level_shift(cfg, level)
    if level != cfg.start_level:
        index &= cfg.granule // 8 - 1
    table = address - index * 8
    if desc is None:
        return WalkLevel(level, table, index, address, None, "unreadable", None, {}, ())
    kind = kind_of(cfg, desc, level)
    fields = fields_of(cfg, desc, level, kind)
    notes = []
    if kind in ("block", "page") and desc & CONTIGUOUS:
        notes += group_notes(mem, cfg, table, index, desc, level)
    output = fields.get("NextLevelTable", fields.get("OA"))
    return WalkLevel(level, table, index, address, desc, kind, output, fields, tuple(notes))

