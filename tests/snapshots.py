"""Reads the captured tables in data/captures (its README.md says what they hold), and scans them by brute force."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

CAPTURES = Path(__file__).parent / "data" / "captures"
SIZE = {0: 1 << 39, 1: 1 << 30, 2: 1 << 21, 3: 1 << 12}
NAME = {1 << 30: "1G", 1 << 21: "2M", 1 << 12: "4K"}


@dataclass
class Snapshot:
    path: Path
    registers: dict

    def __hash__(self):
        return hash(self.path)

    @cache  # noqa: B019 - snapshots live as long as the tests do
    def pages(self, which="tables"):
        """{address: the page as 512 words}"""
        with np.load(self.path / f"{which}.npz") as file:
            return dict(zip(file["addresses"].tolist(), file["pages"].view("<u8"), strict=True))

    @cache  # noqa: B019
    def scan(self, which, vttbr, vtcr):
        """Every leaf and every table page below a root, by brute force."""
        return scan(self.pages(which), vttbr, vtcr)

    @property
    def pa_bits(self):
        cpu = self.registers["cpu"]
        return 44 if "a57" in cpu else 48 if "lpa2=off" in cpu else 52

    @property
    def roots(self):
        """(name, file, VTTBR, VTCR, number of leaves, leaves by size or None, tables by level or None)"""
        for vm in self.registers["vms"]:
            leaves = sum(vm["leaves"].values())
            yield f"vm{vm['vm']}", "tables", *regs(vm), leaves, vm["leaves"], vm["tables_by_level"]
        if "l0_table_for_l1" in self.registers:
            host = self.registers["l0_table_for_l1"]
            yield "l0", "tables", *regs(host), host["leaves"], None, host["tables_by_level"]
        for vm in self.registers.get("nested", ()):
            yield f"l1-vm{vm['vm']}", "l1_tables", *regs(vm, "l1_"), vm["l1_leaves"], None, None


def regs(entry, prefix=""):
    return int(entry[f"{prefix}vttbr_el2"], 16), int(entry[f"{prefix}vtcr_el2"], 16)


@cache
def load(name):
    path = CAPTURES / name
    return Snapshot(path, json.loads((path / "registers.json").read_text()))


NAMES = sorted(str(p.parent.relative_to(CAPTURES)) for p in CAPTURES.glob("*/*/registers.json"))


def readme_rows():
    """{snapshot: (VMs, table pages, leaves by size)} from the tables in the captures' READMEs."""
    rows = {}
    for readme in CAPTURES.glob("*/README.md"):
        for line in readme.read_text().splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) == 7 and re.fullmatch(r"\d\d_\w+", cells[0]):
                sizes = {k: int(v) for k, v in (pair.split(":") for pair in cells[5].split())}
                rows[f"{readme.parent.name}/{cells[0]}"] = int(cells[2]), int(cells[3]), sizes
    return rows


# A scan that knows 4K granules only, 48-bit or LPA2 descriptors


@dataclass
class Scan:
    leaves: list  # (ipa, pa, size, level, descriptor)
    tables: dict  # level: number of tables, a concatenated start table counted once
    pages: set


def address(desc, ds):
    return desc & 0x0000_FFFF_FFFF_F000 | ((desc >> 48 & 3) << 48 | (desc >> 8 & 3) << 50 if ds else 0)


def scan(pages, vttbr, vtcr):
    ds = vtcr >> 32 & 1
    ia = 64 - (vtcr & 63)
    start = {0: 2, 1: 1, 2: 0}[vtcr >> 6 & 3]
    concatenated = max(1, 1 << max(0, ia - (48 - 9 * start)))
    base = (vttbr & 0x0000_FFFF_FFFF_F000 | (vttbr >> 2 & 15) << 48 if ds else vttbr & 0x0000_FFFF_FFFF_F000) & -(
        4096 * concatenated
    )
    found = Scan([], {start: 1}, set())
    todo = [(base + 4096 * n, start, n * 512 * SIZE[start]) for n in range(concatenated)]
    while todo:
        table, level, ipa = todo.pop()
        found.pages.add(table)
        words = pages[table]
        for index in np.flatnonzero(words & 1).tolist():
            desc, at = int(words[index]), ipa + index * SIZE[level]
            if level == 3 or not desc & 2:
                found.leaves.append((at, address(desc, ds), SIZE[level], level, desc))
            else:
                todo.append((address(desc, ds), level + 1, at))
                found.tables[level + 1] = found.tables.get(level + 1, 0) + 1
    found.leaves.sort()
    return found
