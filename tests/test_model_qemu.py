"""The reference model gives QEMU's answer to every access that the architecture decides."""

from types import SimpleNamespace

import pytest

import vectors
from model.memory import Memory, swap64
from model.walk import Config, Features, walk


def memory_of(tables, ram):
    mem = Memory()
    for start, size in ram:
        mem.add(start, size)
    for address, word in tables.words.items():
        mem.poke(address, swap64(word) if tables.big_endian else word)
    return mem


def answer(tables, mem, cfg, access, ram):
    """Walks one access; returns what differs from QEMU."""
    mem.writes.clear()
    w = walk(mem, cfg, access.ipa, access.flags)
    changed = {a: swap64(v) if tables.big_endian else v for a, v in mem.writes}
    got = SimpleNamespace(
        status=int(w.fault is not None),
        fsc=w.fsc,
        level=w.level,
        pa=w.pa,
        memattr=w.memattr,
        sh=w.sh,
        hpfar=access.ipa >> 12 << 4,
    )
    wrong = vectors.compare(tables, access, got, ram)
    if not access.answer.get("cu_mem") and changed != dict(access.changes):
        wrong.append(f"changed {changed}, QEMU {access.changes}")
    return wrong


def replay(tables, ram):
    """(number compared, differences) over one set, memory after each access as QEMU left it."""
    feat = Features(**vectors.features_of(tables.cpu))
    cfg = Config(tables.vttbr, tables.vtcr, feat, tables.hcr, tables.big_endian)
    mem = memory_of(tables, ram)
    compared, wrong = 0, []
    for access in tables.accesses:
        if not access.skipped:
            compared += 1
            saved = dict(mem.words)
            wrong += [(tables.number, hex(access.ipa), text) for text in answer(tables, mem, cfg, access, ram)]
            mem.words = saved
        for address, word in access.changes:
            mem.poke(address, swap64(word) if tables.big_endian else word)
    return compared, wrong


@pytest.mark.parametrize("row", vectors.COUNTS, ids="-".join)
def test_answers(row):
    """Every answer not left open: fault or address, level, code, attributes, descriptor changes."""
    sets, ram = vectors.sets_of(*row), vectors.load(row[0]).ram
    results = [replay(tables, ram) for tables in sets]
    wrong = [text for _, texts in results for text in texts]
    compared = sum(n for n, _ in results)
    assert not wrong, f"{len(wrong)} of {compared}: {wrong[:5]}"
    assert (len(sets), compared) == vectors.COUNTS[row]
