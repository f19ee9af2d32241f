"""One L1 under several policies at once: every event goes to one engine per policy, and is counted and timed there.

Beside the policies that are asked for runs the *reference*, the reverse map with exact TLBIs (one of them, where it is
asked for): it drops exactly what must go. A fault that another policy has to serve while the reference still holds the
page is one that only over-invalidation causes: ``needless``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from s2shadow.constants import Kind

if TYPE_CHECKING:
    from s2shadow.features import Features
    from s2shadow.memory import GuestMemory

__all__ = ["EXACT", "REFERENCE", "Distribution", "Lane", "Lanes", "Tally"]

REFERENCE, EXACT = "reverse-map", "exact"
PAGE = 4096
FEW_PAGES = 8           # up to so many, asking for each page's leaves is cheaper than a scan of all
DRAIN = 256
ACCESSES = 0x1F
HIT_KIND, MAPPED_KIND = int(Kind.HIT), int(Kind.MAPPED)     # plain integers compare faster

Registers = tuple[int, int, int]        # VTTBR_EL2, VTCR_EL2, HCR_EL2


class Distribution:
    """Nanoseconds of any number of events in bounded memory: classes less than 0.8 % wide; mean and maximum exact."""

    DIGITS = 7

    def __init__(self) -> None:
        self.classes: Counter[int] = Counter()
        self.count = self.total = self.most = 0

    def add(self, value: int) -> None:
        drop = value.bit_length() - self.DIGITS - 1
        self.classes[value if drop <= 0 else value >> drop << drop] += 1
        self.count += 1
        self.total += value
        if value > self.most:
            self.most = value

    def percentile(self, percent: float) -> float | None:
        wanted, seen = self.count * percent / 100, 0
        for value in sorted(self.classes):
            seen += self.classes[value]
            if seen >= wanted:
                return float(min(value, self.most))
        return None

    def summary(self) -> dict[str, float] | None:
        """p50, p99, max and mean, or None where nothing was measured."""
        p50, p99 = self.percentile(50), self.percentile(99)
        if p50 is None or p99 is None:
            return None
        return {"p50": p50, "p99": p99, "max": float(self.most), "mean": self.total / self.count}


class Tally:
    """What one policy did over a whole replay, whatever the number of machines in it."""

    def __init__(self, policy: str):
        self.policy = policy
        self.kinds = [0] * 8
        self.needless = 0
        self.teardown, self.tlbi = Distribution(), Distribution()
        self.teardowns = self.torn = self.must_tear = 0
        self.tlbis = self.tlbi_removed = self.tlbi_required = 0
        self.kernel_steps = self.owed = self.live = self.recycled = 0


class Lane:
    """One engine under one policy, and the tally it adds to."""

    def __init__(self, tally: Tally, mem: GuestMemory, vcpus: int, contexts: int | None, features: Features,
                 policy: str, tlbi: str):
        from s2shadow.engine import NestedVM

        self.tally = tally
        self.policy = policy
        self.exact_teardown = policy == REFERENCE
        self.vm = NestedVM(mem, vcpus=vcpus, contexts=contexts, features=features, teardown=policy, tlbi=tlbi)
        self.vcpus = self.vm.vcpus
        self.undrained = 0

    def tlbi(self, vcpu: int, insn: int, xt: int, regs: Registers) -> int:
        tally = self.tally
        issue = self.vcpus[vcpu].tlbi
        began = perf_counter_ns()
        result = issue(insn, xt, *regs)
        tally.tlbi.add(perf_counter_ns() - began)
        tally.tlbis += 1
        tally.tlbi_removed += result.removed
        tally.tlbi_required += result.required
        self.undrained += 1
        if self.undrained >= DRAIN:
            self.drain()
        return int(result.removed)

    def unmap(self, start: int, end: int) -> dict[str, int]:
        """One host change, timed alone -> what it did."""
        tally, vm = self.tally, self.vm
        self.drain()
        steps = vm.stats.kernel_steps
        required = 0 if self.exact_teardown else self.overlapping(start, end)
        began = perf_counter_ns()
        change = vm.unmap(start, end)
        spent = perf_counter_ns() - began
        removed = int(change.leaves)
        if self.exact_teardown:         # by contract: what it drops is what overlaps
            required = removed
        steps = vm.stats.kernel_steps - steps
        tally.teardown.add(spent)
        tally.teardowns += 1
        tally.torn += removed
        tally.must_tear += required
        tally.kernel_steps += steps
        return {"ns": spent, "removed": removed, "required": required, "kernel_steps": steps, "owed": self.drain()}

    def overlapping(self, start: int, end: int) -> int:
        """Live leaves that map any of [start, end): what any policy must drop."""
        if end - start <= FEW_PAGES * PAGE:
            found = {(int(row["context"]), int(row["ipa"])) for at in range(start, end, PAGE)
                     for row in self.vm.reverse(at)}
            return len(found)
        count = 0
        for context in self.vm.contexts:
            if context.entries:
                rows = self.vm.shadow(context.index)
                count += int(np.count_nonzero((rows["cipa"] < end) & (rows["cipa"] + rows["size"] > start)))
        return count

    def drain(self) -> int:
        """L0 applies the TLB maintenance that it owes -> how many operations."""
        taken = 0
        while batch := len(self.vm.take_tlbis(DRAIN)):
            taken += batch
            if batch < DRAIN:
                break
        self.undrained = 0
        self.tally.owed += taken
        return taken


class Lanes:
    """The engines of one machine, the reference first; it is not among the tallies unless it was asked for."""

    def __init__(self, tallies: Sequence[Tally], tlbi: str, mem: GuestMemory, vcpus: int, contexts: int | None,
                 features: Features, populate: Any):
        self.mem = mem
        self.features = features
        self.vcpu_count = vcpus
        wanted = [(tally, tally.policy, tlbi) for tally in tallies]
        first = [row for row in wanted if row[1:] == (REFERENCE, EXACT)] or [(Tally(REFERENCE), REFERENCE, EXACT)]
        rest = [row for row in wanted if row is not first[0]]
        self.lanes = [Lane(tally, mem, vcpus, contexts, features, policy, mode) for tally, policy, mode in first + rest]
        self.reference = self.lanes[0]
        self.others = self.lanes[1:]
        self.shown = [lane for lane in self.lanes if any(lane.tally is tally for tally in tallies)]
        for lane in self.lanes:
            lane.vm.host.populate = populate
        self.loaded: list[Registers | None] = [None] * vcpus
        self.hcr: dict[tuple[int, int], int] = {}

    def load(self, vcpu: int, regs: Registers) -> None:
        """L1 enters L2 with these registers (nothing happens where they are loaded already)."""
        if self.loaded[vcpu] != regs:
            self.loaded[vcpu] = regs
            self.hcr[regs[:2]] = regs[2]
            for lane in self.lanes:
                lane.vcpus[vcpu].load(*regs)

    def fault(self, vcpu: int, ipa: int, access: int) -> int:
        """L2 touches ``ipa`` -> how the reference answered (a ``Kind``)."""
        access = access & ACCESSES or 1         # a syndrome that is no abort says nothing: taken as a read
        lane = self.reference
        answer = int(lane.vcpus[vcpu].fault(ipa, access).kind)
        lane.tally.kinds[answer] += 1
        for lane in self.others:
            kind = int(lane.vcpus[vcpu].fault(ipa, access).kind)
            lane.tally.kinds[kind] += 1
            if kind == MAPPED_KIND and answer == HIT_KIND:
                lane.tally.needless += 1
        return answer

    def tlbi(self, vcpu: int, insn: int, xt: int, regs: Registers) -> None:
        for lane in self.lanes:
            lane.tlbi(vcpu, insn, xt, regs)

    def unmap(self, start: int, end: int) -> dict[str, dict[str, int]]:
        return {lane.policy: done for lane in self.lanes for done in [lane.unmap(start, end)] if lane in self.shown}

    def live(self) -> list[int]:
        return [lane.vm.stats.live for lane in self.shown]

    def agreement(self, wanted: Callable[[int, int], bool]) -> dict[str, int]:
        """Touch in every lane what any lane holds, and compare: pages, and how many differ from the reference.

        ``wanted(vttbr, vtcr)`` chooses the contexts. Faults are not counted.
        """
        compared = different = 0
        enabled = {(context.vttbr, context.vtcr) for context in self.reference.vm.contexts if context.enabled}
        for regs in sorted(enabled):
            if regs not in self.hcr or not wanted(*regs):
                continue
            ipas = np.unique(np.concatenate([self.held(lane, *regs) for lane in self.lanes]))
            answers = []
            for lane in self.lanes:
                lane.vcpus[0].load(*regs, self.hcr[regs])
                answers.append(lane.vcpus[0].fault_many(ipas))
            self.loaded[0] = None
            compared += len(ipas)
            base = answers[0]["kind"] <= MAPPED_KIND
            unlike: npt.NDArray[np.bool_] = np.zeros(len(ipas), bool)
            for answer in answers[1:]:
                mapped = answer["kind"] <= MAPPED_KIND
                unlike |= (mapped != base) | (mapped & (answer["pa"] != answers[0]["pa"]))
            different += int(np.count_nonzero(unlike))
        return {"pages": compared, "different": different}

    @staticmethod
    def held(lane: Lane, vttbr: int, vtcr: int) -> npt.NDArray[np.uint64]:
        """IPAs of the leaves that a lane holds for a context."""
        rows = [lane.vm.shadow(context.index)["ipa"] for context in lane.vm.contexts
                if context.enabled and (context.vttbr, context.vtcr) == (vttbr, vtcr)]
        return np.concatenate(rows) if rows else np.empty(0, np.uint64)
