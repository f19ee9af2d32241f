"""Reads the QEMU answers in data/qemu (its FORMAT.md says what every key means)."""

import gzip
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
FILES = ("public", "cpus")
# (file, CPU, sets in the base format or the others) -> (sets, answers compared)
COUNTS = {
    ("public", "max", "base"): (379, 12373),
    ("public", "max", "lpa-lpa2-hd"): (1166, 39649),
    ("cpus", "neoverse-v1", "base"): (154, 5644),
    ("cpus", "neoverse-v1", "lpa-lpa2-hd"): (46, 1562),
    ("cpus", "cortex-a57", "base"): (200, 7223),
    ("cpus", "cortex-a53", "base"): (200, 6951),
}
HCR_DC = 1 << 12
READ, WRITE, EXEC, EL0 = 1, 2, 4, 8


def number(text):
    return int(text, 16)


@dataclass
class Access:
    """One access and what the CPU answered."""

    op: str
    ipa: int
    ok: bool
    answer: dict
    changes: tuple

    @property
    def flags(self):
        """The access as READ/WRITE/EXEC, with EL0 where it was unprivileged."""
        kind = {"R": READ, "W": WRITE, "X": EXEC}
        if self.op.startswith("AT"):
            return kind[self.op[3]] | (EL0 if self.op[2] == "0" else 0)
        return kind[self.op[0]] | (EL0 if self.op[1] == "0" else 0)

    @property
    def skipped(self):
        """Answers that say nothing about stage 2: of stage 1, or left open by the architecture."""
        return bool(self.answer.get("cu")) or self.answer.get("s") == 1

    def get(self, key):
        """A number of the answer, or None."""
        value = self.answer.get(key)
        return number(value) if isinstance(value, str) else value


@dataclass
class TableSet:
    """One register state, its tables, and the accesses made in order."""

    number: int
    cpu: dict
    vtcr: int
    vttbr: int
    hcr: int
    big_endian: bool
    granule: str
    words: dict
    accesses: list = field(default_factory=list)

    @property
    def ds(self):
        return bool(self.vtcr >> 32 & 1)

    @property
    def hd(self):
        return bool(self.vtcr >> 22 & 1)

    @property
    def base_format(self):
        """Descriptors of 48 bits and no hardware dirty state: what every version of the engine decodes."""
        return not self.ds and not self.hd and not (self.granule == "64K" and self.cpu["name"] == "max")


@dataclass
class VectorFile:
    ram: list
    data: tuple
    sets: list


def features_of(cpu):
    """Keyword arguments of Features, of the model or of the engine, for one CPU of a header."""
    sizes = {"4K": 4096, "16K": 16384, "64K": 65536}
    return {
        "pa_bits": cpu["pamax"],
        "granules": tuple(sizes[name] for name in cpu["grans"]),
        "lpa2": bool(cpu["lpa2"]),
        "lpa": cpu["pamax"] >= 52,
        "fwb": bool(cpu["fwb"]),
        "xnx": bool(cpu["xnx"]),
        "ttst": bool(cpu["ttst"]),
        "hafdbs": cpu["hafdbs"],
        "vmid_bits": 16,
    }


def read_access(raw):
    changes = tuple((number(a), number(w)) for a, w in raw.get("ch", ()))
    return Access(raw["op"], number(raw["ipa"]), bool(raw["ok"]), raw, changes)


def read_set(raw, cpus):
    return TableSet(
        number=raw["id"],
        cpu=cpus[raw["cpu"]],
        vtcr=number(raw["vtcr"]),
        vttbr=number(raw["vttbr"]),
        hcr=number(raw["hcr"]),
        big_endian=bool(raw["ee"]),
        granule=raw["gran"],
        words={number(a): number(w) for a, w in raw["mem"]},
        accesses=[read_access(a) for a in raw["acc"]],
    )


@cache
def load(name):
    """The file vectors-NAME.jsonl.gz, checked against its own totals."""
    with gzip.open(DATA / "qemu" / f"vectors-{name}.jsonl.gz", "rt") as lines:
        header = json.loads(next(lines))
        sets = [read_set(json.loads(line), header["cpus"]) for line in lines]
    assert header["format"] == "s2oracle-vectors" and header["version"] == 1
    assert len(sets) == header["sets"] and sum(len(s.accesses) for s in sets) == header["accesses"]
    ram = [(number(a), number(n)) for a, n in header["ram"]]
    base, size = (number(x) for x in header["data"])
    return VectorFile(ram, (base, size), sets)


def sets_of(name, cpu, form):
    """The sets of one row of COUNTS."""
    return [s for s in load(name).sets if s.cpu["name"] == cpu and s.base_format == (form == "base")]


# What the accesses of a set say, however they are walked


def stage1_attributes(dc):
    """MAIR code and shareability of stage 1 off: Device-nGnRnE, or write-back with DC."""
    return (0xFF, 0) if dc else (0x00, 2)


def combined_attributes(memattr, sh, fwb, dc):
    """(MAIR code, shareability) of stage 1 off combined with a stage-2 leaf, as PAR_EL1 shows them."""
    attr, sh1 = stage1_attributes(dc)
    if fwb:
        code = memattr & 7
        if code < 4:
            attr = code << 2 if dc else min(code << 2, attr)
        elif code <= 5:
            attr = 0x44 if dc else attr
        elif code == 6:
            attr = 0xFF
    elif memattr < 4:
        attr = memattr << 2 if dc else min(memattr << 2, attr)
    elif dc:
        half = {1: 0x4, 2: 0xB, 3: 0xF}
        attr = half[memattr >> 2] << 4 | half[memattr & 3]
    return attr, 2 if attr in (0, 4, 8, 12, 0x44) else stronger_sh(sh1, sh)


def stronger_sh(a, b):
    return 2 if 2 in (a, b) else 3 if 3 in (a, b) else 0


FAULT_BASE = {"translation": 0x04, "addrsize": 0x00, "access": 0x08, "permission": 0x0C, "walk-abort": 0x14}
FAULT_MINUS_1 = {"translation": 0x2B, "addrsize": 0x29, "walk-abort": 0x13}


def expected_fsc(kind, level):
    return FAULT_MINUS_1[kind] if level == -1 else FAULT_BASE[kind] + level


def compare(tables, access, got, ram):
    """What differs between one answer and a walk: a list of texts, empty if nothing does.

    `got` has status, fsc, level, pa, memattr, sh and hpfar.
    """
    answer = access.answer
    if access.ok != (got.status == 0):
        return [f"ok={access.ok}, walk says status {got.status} fsc {got.fsc:#x}"]
    if not access.ok:
        return compare_fault(access, got)
    wrong = []
    if answer.get("noram") and any(start <= got.pa < start + size for start, size in ram):
        wrong.append(f"pa {got.pa:#x} is RAM, QEMU found none there")
    if "pa" in answer and access.get("pa") != got.pa:
        wrong.append(f"pa {got.pa:#x}, QEMU {answer['pa']}")
    if "pa44" in answer and access.get("pa44") != got.pa & 0xFFF_FFFF_F000:
        wrong.append(f"pa {got.pa:#x}, QEMU's bits 43:12 {answer['pa44']}")
    if "attr" in answer and not answer.get("cu_attr"):
        fwb = bool(tables.hcr >> 46 & 1) and bool(tables.cpu["fwb"])
        ours = combined_attributes(got.memattr, got.sh, fwb, bool(tables.hcr & HCR_DC))
        theirs = (access.get("attr"), access.get("sh"))
        if ours != theirs:
            wrong.append(f"attributes {ours}, QEMU {theirs}")
    return wrong


def compare_fault(access, got):
    answer = access.answer
    wrong = []
    if got.fsc != expected_fsc(answer["t"], answer["l"]) or got.fsc != access.get("fsc"):
        wrong.append(f"fsc {got.fsc:#x}, QEMU {answer['t']} level {answer['l']}")
    if got.level != answer["l"]:
        wrong.append(f"level {got.level}, QEMU {answer['l']}")
    if "hpfar" in answer and access.get("hpfar") != got.hpfar:
        wrong.append(f"hpfar {got.hpfar:#x}, QEMU {answer['hpfar']}")
    return wrong
