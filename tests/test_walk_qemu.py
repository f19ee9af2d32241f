"""s2shadow.walk and walk_many give QEMU's answer to every access that the architecture decides."""

from types import SimpleNamespace

import numpy as np
import pytest

import s2shadow
import vectors


def swap64(word):
    return int.from_bytes(word.to_bytes(8, "little"), "big")


class Machine:
    """The memory and registers of one set, as the engine wants them."""

    def __init__(self, tables, ram):
        self.swapped = tables.big_endian
        self.mem = s2shadow.GuestMemory()
        for start, size in ram:
            self.mem.add(start, size)
        self.words = dict(tables.words)
        self.write(self.words)
        feat = s2shadow.Features(**vectors.features_of(tables.cpu))
        self.cfg = s2shadow.Stage2Config(
            tables.vttbr, tables.vtcr, features=feat, hcr=tables.hcr, big_endian=tables.big_endian
        )

    def write(self, words):
        for address, word in dict(words).items():
            self.mem.write64(address, swap64(word) if self.swapped else word)

    def changes(self):
        """The words that are no longer what they were."""
        now = {a: self.mem.read64(a) for a in self.words}
        now = {a: swap64(w) if self.swapped else w for a, w in now.items()}
        return {a: w for a, w in now.items() if w != self.words[a]}

    def settle(self, changes):
        """Memory as QEMU left it, whatever the walk did."""
        self.words.update(changes)
        self.write(self.words)


def scalar_answer(machine, tables, access, ram):
    """Differences of one walk from QEMU."""
    w = s2shadow.walk(machine.mem, machine.cfg, access.ipa, access.flags)
    got = SimpleNamespace(
        status=w.status, fsc=w.fsc, level=w.level, pa=w.pa, memattr=w.memattr, sh=w.sh, hpfar=access.ipa >> 12 << 4
    )
    wrong = vectors.compare(tables, access, got, ram)
    changed = machine.changes()
    if w.updated != bool(changed):
        wrong.append(f"updated {w.updated}, changed {changed}")
    if not access.answer.get("cu_mem") and changed != dict(access.changes):
        wrong.append(f"changed {changed}, QEMU {access.changes}")
    return [(tables.number, hex(access.ipa), text) for text in wrong]


def replay(tables, ram):
    machine = Machine(tables, ram)
    compared, wrong = 0, []
    for access in tables.accesses:
        if not access.skipped:
            compared += 1
            wrong += scalar_answer(machine, tables, access, ram)
        machine.settle(dict(access.changes))
    return compared, wrong


def runs(accesses):
    """The accesses in groups over which memory stays as it is."""
    group = []
    for access in accesses:
        group.append(access)
        if access.changes:
            yield group
            group = []
    if group:
        yield group


def replay_batches(tables, ram):
    machine = Machine(tables, ram)
    compared, wrong = 0, []
    for group in runs(tables.accesses):
        ipas = np.array([a.ipa for a in group], dtype=np.uint64)
        flags = np.array([a.flags for a in group], dtype=np.uint8)
        ws = s2shadow.walk_many(machine.mem, machine.cfg, ipas, flags, update=False)
        for access, w in zip(group, ws, strict=True):
            if not access.skipped:
                compared += 1
                got = SimpleNamespace(hpfar=access.ipa >> 12 << 4, **{n: w[n].item() for n in ws.dtype.names})
                wrong += [(tables.number, hex(access.ipa), text) for text in vectors.compare(tables, access, got, ram)]
        assert not machine.changes(), "update=False wrote"
        machine.settle(dict(group[-1].changes))
    return compared, wrong


@pytest.mark.parametrize("replay", [replay, replay_batches], ids=["walk", "walk_many"])
@pytest.mark.parametrize("row", vectors.COUNTS, ids="-".join)
def test_answers(row, replay):
    """Every answer not left open: fault or address, level, code, attributes, and (walk) descriptor changes."""
    sets, ram = vectors.sets_of(*row), vectors.load(row[0]).ram
    results = [replay(tables, ram) for tables in sets]
    wrong = [text for _, texts in results for text in texts]
    compared = sum(n for n, _ in results)
    assert not wrong, f"{len(wrong)} of {compared}: {wrong[:5]}"
    assert (len(sets), compared) == vectors.COUNTS[row]
