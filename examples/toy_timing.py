"""A toy timing model around the resumable walker: python examples/toy_timing.py

A simulator that counts cycles cannot let a walker read memory by itself: each descriptor takes its time, depends on
what is cached, and others are under way meanwhile. ``s2shadow.walk_step`` never reads; it says which descriptor it
wants next and takes the word when it arrives. Here that is a few walkers over a cache of descriptor lines, driven by
an event queue.

Prints cycles for each number of walkers: more of them hide latency until the memory's own pace is what remains.
"""

import argparse
import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

import s2shadow as s2

PAGE, LINE = 4096, 64
TABLES, DATA = 0x4000_0000, 0x10_0000_0000
VTCR = 64 - 39 | 1 << 6 | 5 << 16 | 1 << 31 | 1 << 21  # 4K, three levels, access flag by hardware
PAGE_RW = 3 << 8 | 3 << 6 | 0xF << 2 | 3  # without AF: the first access to a page swaps it in


@dataclass
class Memory:
    """Words of L1's memory, and when they arrive: cycles of a hit and a miss, and between two misses."""

    words: s2.GuestMemory
    lines: int = 256
    hit: int = 4
    miss: int = 120
    pace: int = 10
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    free_at: int = 0  # the bus
    hits: int = 0
    misses: int = 0

    def when(self, address: int, now: int) -> int:
        """The cycle at which the line of ``address`` is here, for who asks at ``now``."""
        line = address // LINE
        if line in self.cached:
            self.cached.move_to_end(line)
            self.hits += 1
            return now + self.hit
        self.misses += 1
        start = max(now, self.free_at)
        self.free_at = start + self.pace
        self.cached[line] = None
        if len(self.cached) > self.lines:
            self.cached.popitem(last=False)
        return start + self.miss

    def answer(self, request: s2.WalkRequest) -> int:
        """The word that memory holds; a swap writes if it holds what is expected."""
        word = self.words.read64(request.address)
        if request.kind == "swap" and word == request.expected:
            assert request.desired is not None
            self.words.write64(request.address, request.desired)
        return word


@dataclass
class Outcome:
    """Of a run: its cycles, and for each address the cycles from the start of its walk to the end, and the result."""

    cycles: int
    latencies: list[int]
    results: list[s2.Walk]


def simulate(config: s2.Stage2Config, memory: Memory, ipas: list[int], walkers: int) -> Outcome:
    """Walk all addresses, up to ``walkers`` at once, in the order in which they come."""
    waiting = deque(enumerate(ipas))
    events: list[tuple[int, int, int, s2.WalkStep]] = []  # (arrival of the word, number, began, walk)
    latencies = [0] * len(ipas)
    results: dict[int, s2.Walk] = {}
    now = 0

    def wait(number: int, began: int, step: s2.WalkStep) -> bool:
        """Ask memory for what the walk wants; False where it wants no more."""
        if step.request is None:
            latencies[number], results[number] = now - began, step.result
            return False
        heapq.heappush(events, (memory.when(step.request.address, now), number, began, step))
        return True

    def begin() -> None:
        """A walker is idle: give it the next address that needs one."""
        while waiting:
            number, ipa = waiting.popleft()
            if wait(number, now, s2.walk_step(config, ipa, s2.READ)):
                return

    for _ in range(walkers):
        begin()
    while events:
        now, number, began, step = heapq.heappop(events)
        assert step.request is not None
        step.feed(memory.answer(step.request))
        if not wait(number, began, step):
            begin()
    return Outcome(now, latencies, [results[number] for number in range(len(ipas))])


def tables(pages: int) -> s2.GuestMemory:
    """L1's stage 2: ``pages`` pages from IPA 0 on, scattered over its memory."""
    leaf_tables = -(-pages // 512)
    image = np.zeros((2 + leaf_tables) * 512, dtype=np.uint64)
    image[0] = TABLES + PAGE | 3
    image[512 : 512 + leaf_tables] = TABLES + PAGE * (2 + np.arange(leaf_tables)) | 3
    frames = DATA + PAGE * np.random.default_rng(1).permutation(pages)
    image[1024 : 1024 + pages] = frames | PAGE_RW
    mem = s2.GuestMemory()
    mem.add(TABLES, buffer=image)
    return mem


def main(walks: int = 2000, pages: int = 1 << 16) -> list[tuple[int, int]]:
    ipas = (PAGE * np.random.default_rng(2).integers(0, pages, walks)).tolist()
    config = s2.Stage2Config(TABLES, VTCR)
    rows = []
    print(f"{walks:,} random walks over {pages:,} pages\nwalkers   cycles   cycles/walk   latency   descriptor hits")
    for walkers in (1, 2, 4, 8, 16, 32):
        memory = Memory(tables(pages))
        outcome = simulate(config, memory, ipas, walkers)
        latency = sum(outcome.latencies) / walks
        share = memory.hits / (memory.hits + memory.misses)
        print(f"{walkers:7} {outcome.cycles:8,} {outcome.cycles / walks:13.1f} {latency:9.1f} {share:17.0%}")
        rows.append((walkers, outcome.cycles))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--walks", type=int, default=2000, help="addresses to translate (default: %(default)s)")
    parser.add_argument("--pages", type=int, default=1 << 16, help="pages that L1 maps (default: %(default)s)")
    arguments = parser.parse_args()
    main(arguments.walks, arguments.pages)
