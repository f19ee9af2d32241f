"""Inputs to start from, made of the tests' samples: python fuzz/seeds.py FOLDER writes FOLDER/TARGET/*."""

import gzip
import json
import lzma
import sys
from pathlib import Path

DATA = Path(__file__).parent.parent / "tests" / "data"
PLAIN = DATA / "captures" / "b_linux_l2_thp_7.2" / "00_booting"
NESTED = DATA / "captures" / "g2_nested_notifier_7.2" / "00_early"


def traces():
    for name in ("a", "b2", "d", "g2"):
        lines = lzma.decompress((DATA / "traces" / f"{name}.trace.txt.xz").read_bytes()).splitlines(True)
        for at in range(0, min(len(lines), 400), 40):
            yield b"\x40" + b"".join(lines[at:at + 10])
        table = lzma.decompress((DATA / "traces" / f"{name}.tlbi.csv.xz").read_bytes()).splitlines(True)
        yield b"\x80" + b"".join(table[:8])
        yield b"\x05" + gzip.compress(b"".join(lines[:6]), mtime=0)
        yield b"\x05" + lzma.compress(b"".join(table[:6]))


def captures():
    for folder in (PLAIN, NESTED):
        registers = json.dumps(json.loads((folder / "registers.json").read_bytes())).encode()
        yield b"\x01" + len(registers).to_bytes(2, "little") + registers + (folder / "tables.npz").read_bytes()
    small = {"vms": [{"vm": 0, "vttbr_el2": "0x1000040000001", "vtcr_el2": "0x802d3558", "hcr_el2": "0x400000000001",
                      "tables_by_level": {"1": 1}, "leaves": {"4K": 1}}], "ram_base": "0x40000000"}
    nested = {"nested": [{"vm": 0, "l1_vttbr_el2": "0x1000040000001", "l1_vtcr_el2": "0x802d3558",
                          "shadow_vttbr_el2": "0x1000040000001"}],
              "l0_table_for_l1": {"vttbr_el2": "0x40000000", "vtcr_el2": "0x80023558"}}
    # four pages; a table, a table, a page and a block
    tables = bytes((4, 0, 1, 2, 3, 5, 0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 3, 3, 0, 0x70, 0x18, 0, 0, 9,
                    2, 1, 0x70, 0x1D, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2))
    for kind, registers in ((0, small), (2, small | nested)):
        text = json.dumps(registers).encode()
        yield bytes((kind,)) + len(text).to_bytes(2, "little") + text + tables * 2


def dumps():
    from s2shadow.capturedtables import host_table, shadow_table, vm_table
    from s2shadow.dump import kernel_text, records

    for table in (vm_table(PLAIN), host_table(NESTED), shadow_table(NESTED, 0)):
        yield kernel_text(table.rows).encode()
        yield json.dumps({"schema": 1, "ipa_bits": table.cfg.ia_bits, "ranges": records(table.rows)[:12]}).encode()


def programs():
    """For walker, tlbi and engine: the alphabet of their bytes, in runs."""
    for start in range(0, 256, 32):
        yield bytes((start + i * 7) & 0xFF for i in range(96))


SEEDS = {"trace": traces, "capture": captures, "dump": dumps, "walker": programs, "tlbi": programs, "engine": programs}


def main() -> None:
    for name, seeds in SEEDS.items():
        folder = Path(sys.argv[1], name)
        folder.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(seeds()):
            (folder / f"seed-{i:02}").write_bytes(seed)


if __name__ == "__main__":
    main()
