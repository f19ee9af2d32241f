"""Replay of a recorded event stream: what each teardown policy would have done with what really happened.

The events of a trace drive an engine per policy, side by side, in the order of the trace: faults, TLBIs, MMU notifiers,
dirty logging and aging, on guest tables as captured. ``replay_l1`` and ``replay_l0`` say how, for a trace of a host
that plays L1 and for one of a host that runs a guest hypervisor.

What a trace can show: the faults that really happened. A page that a policy drops and that L2 touches again shows
only if the real host faulted there too, so refaults are a lower bound.

**Result** (``run``), JSON-ready::

  ``schema``          1
  ``machine``         as in a storm: ``cpu``, ``system``, ``python``, ``s2shadow`` …
  ``config``          ``trace``, ``role`` (``"l1"``, ``"l0"``), ``memory``, ``teardown`` (list), ``tlbi``, ``memslots``
  ``trace``           ``label``, ``seconds`` (of the trace clock), ``events``, ``vcpus``, ``machines``; ``lost``,
                      ``unreadable``, ``truncated``; ``ties`` and ``mismatched`` where text and CSV were merged
  ``counts``          recorded: ``events`` {kind of row: n}, ``tlbi`` {"TLBI ipas2e1is el2": n}, ``names`` {name in the
                      text: n}; ``applied`` and ``skipped`` {what, in words: n}
  ``policies``        by name, in the order of ``config.teardown``:

                      ``faults``              answers to L2's touches: ``total``, ``hit``, ``mapped`` (a fault that the
                                              shadow had to serve), ``l1_fault``, ``host_fault``, ``mmio``, ``retry``,
                                              ``no_memory``
                      ``refaults_needless``   of ``mapped``: only over-invalidation caused them (the reverse map with
                                              exact TLBIs still had the page)
                      ``teardown``            host changes: ``events``, ``removed``, ``required`` (leaves), ``ns`` {p50,
                                              p99, max, mean} or null
                      ``tlbi``                L1's TLBIs: ``operations``, ``removed``, ``required``, ``ns``
                      ``dropped_needlessly``  removed minus required, of both
                      ``kernel_steps``        range steps that Linux would spend on the host changes, with a range flush
                                              each (``kernel_flushes``)
                      ``owed_tlbis``          TLB maintenance that L0 owes its hardware
                      ``live``                leaves at the end; ``contexts_recycled``
  ``timeline``        lists of one length, at most ``POINTS``: ``seconds``, and cumulative ``touches``, ``tlbis``,
                      ``changes``; ``policies`` {name: {``live``, ``mapped`` (cumulative)}}
  ``largest``         the host changes that cost most: ``seconds``, ``start``, ``end``, ``event``, ``policies`` {name:
                      {``ns``, ``removed``, ``required``, ``kernel_steps``, ``owed``}}, and ``linux_unmaps`` where the
                      trace shows the stage-2 unmap calls that the real host made for it
  ``checks``          ``tables``: per snapshot and VM, L1's table as replayed against the captured one; ``shadows`` and
                      ``hosts`` (role l0): the same for shadow and host tables; ``counts``: recorded against
                      checks.json; ``same_mapping``: what any policy holds at the end, touched under all of them;
                      ``passed``: whether nothing differs
  ``notes``           what the replay had to assume, in words
  ``interrupted``     whether the figures stop before the end of the trace
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from s2shadow.constants import Kind
from s2shadow.events import EventKind as K
from s2shadow.events import Events
from s2shadow.lanes import Lanes, Tally
from s2shadow.memslots import Memslot, Memslots
from s2shadow.recording import Recording, Snapshot, open_recording, read_snapshot
from s2shadow.storm import POLICIES, TLBI_MODES
from s2shadow.streams import Merger

if TYPE_CHECKING:
    from s2shadow.features import Features
    from s2shadow.memory import GuestMemory
    from s2shadow.trace import TraceReader

__all__ = ["POINTS", "ROLES", "ReplayConfig", "ReplayError", "Session", "run"]

Progress = Callable[[str, float], None]

ROLES = ("l1", "l0")
POINTS = 400            # of the time line, at most
LARGEST = 8
NEVER = 1 << 64
NESTED = tuple(map(int, (K.NESTED_ERET, K.NESTED_EXCEPTION, K.WALK_NESTED, K.SHADOW_LOOKUP, K.HANDLE_TLBI,
                         K.NESTED_UNMAP)))
MN_EVENTS = ("UNMAP", "CLEAR", "PROTECTION_VMA", "PROTECTION_PAGE")


class ReplayError(ValueError):
    """A replay that cannot be run as asked; the text says why."""


@dataclass(frozen=True, slots=True)
class ReplayConfig:
    """A replay. ``trace``: capture folder or file; ``role`` None: from the capture and its events.

    ``memory``: snapshot whose tables are L1's at the start, for a trace without snapshots of its own. ``vcpus``: CPUs
    of L1, None: from the trace. ``contexts``: shadow contexts, None: 2 per vCPU as Linux has. ``memslots``: those that
    the trace does not show. ``teardown``: policies, None for all; ``tlbi``: ``"exact"`` or ``"kvm72"``. ``ValueError``
    for values that are none of these.
    """

    trace: str | os.PathLike[str]
    memory: str | os.PathLike[str] | None = None
    role: str | None = None
    memslots: tuple[Memslot, ...] = ()
    teardown: tuple[str, ...] | None = None
    tlbi: str = "exact"
    vcpus: int | None = None
    contexts: int | None = None

    def __post_init__(self) -> None:
        if self.role is not None and self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if self.tlbi not in TLBI_MODES:
            raise ValueError(f"tlbi must be one of {', '.join(TLBI_MODES)}, got {self.tlbi!r}")
        for policy in self.teardown or ():
            if policy not in POLICIES:
                raise ValueError(f"teardown must be of {', '.join(POLICIES)}, got {policy!r}")
        if self.teardown is not None and not self.teardown:
            raise ValueError("teardown names no policy")
        for name in ("vcpus", "contexts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def slots(self) -> Memslots:
        """``memslots``, to look host addresses up in."""
        return Memslots(self.memslots)

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies to replay under, each once."""
        return tuple(dict.fromkeys(self.teardown or POLICIES))


class Timeline:
    """What has happened until when, in at most ``POINTS`` rows however long the trace is."""

    def __init__(self, names: Sequence[str]):
        self.rows: list[list[int]] = []
        self.names = names
        self.step = 1 << 20         # about a millisecond

    def add(self, row: list[int]) -> int:
        """Take a row that begins with its time -> the time from which on the next one is wanted."""
        self.rows.append(row)
        if len(self.rows) >= POINTS:
            del self.rows[1::2]
            self.step *= 2
        return row[0] + self.step

    def result(self, start: int) -> dict[str, Any]:
        columns: list[Any] = [list(column) for column in zip(*self.rows, strict=True)]
        columns = columns or [[]] * (4 + 2 * len(self.names))
        shown = {name: {"live": columns[4 + 2 * i], "mapped": columns[5 + 2 * i]} for i, name in enumerate(self.names)}
        return {"seconds": [(time - start) / 1e9 for time in columns[0]], "touches": columns[1], "tlbis": columns[2],
                "changes": columns[3], "policies": shown}


class Session:
    """What the parts of one replay share: the recording, the tallies, and what they report."""

    def __init__(self, config: ReplayConfig, recording: Recording):
        self.config = config
        self.recording = recording
        self.memory: Snapshot | None = None if config.memory is None else read_snapshot(as_path(config.memory))
        self.tallies = [Tally(policy) for policy in config.policies]
        self.machines: list[Lanes] = []
        self.events: Counter[int] = Counter()
        self.instructions: Counter[int] = Counter()
        self.applied: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        self.checks: dict[str, list[Any]] = {"tables": [], "shadows": [], "hosts": [], "counts": [], "same_mapping": []}
        self.largest: list[dict[str, Any]] = []
        self.timeline = Timeline(config.policies)
        self.next_tick = 0
        self.tlbis = self.changes = 0
        self.frozen = False
        self.first_time: int | None = None
        self.last_time = 0
        self.text: TraceReader | None = None
        self.notified: dict[int, tuple[int, int]] = {}

    def lanes(self, mem: GuestMemory, vcpus: int, features: Features, populate: Any) -> Lanes:
        """Engines for one more L1, one per policy."""
        made = Lanes(self.tallies, self.config.tlbi, mem, vcpus, self.config.contexts, features, populate)
        self.machines.append(made)
        return made

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        self.notes[text] = None

    def note_text(self, index: int) -> str:
        """What user space wrote into the trace."""
        notes = self.text.notes if self.text is not None else []
        return notes[index].text if index < len(notes) else ""

    @property
    def left_out(self) -> list[tuple[int, str, int]]:
        """Lines that comments of the text stand for: (line of the comment, event, how many)."""
        return self.text.left_out if self.text is not None else []

    def is_repeated(self, repeating: bool, cpu: int, start: int, end: int) -> bool:
        """Whether a ``kvm_unmap_hva_range`` is of the notifier that a probe showed before it on the same CPU."""
        if not repeating:
            self.notified[cpu] = (start, end)
            return False
        return self.notified.pop(cpu, None) == (start, end)

    def count(self, rows: Events) -> None:
        """Count what was recorded, before anything is left out."""
        numbers = np.bincount(rows["kind"])
        self.events.update({int(kind): int(numbers[kind]) for kind in np.flatnonzero(numbers)})
        table = rows[rows["kind"] == int(K.TLBI)]
        words = table["insn"].astype(np.uint64) & np.uint64(0xFFFF_FFE0)
        keys, times = np.unique(words << np.uint64(8) | table["el"], return_counts=True)
        self.instructions.update(dict(zip(keys.tolist(), times.tolist(), strict=True)))
        if self.first_time is None:
            self.first_time = int(rows["time"][0])
            self.next_tick = self.first_time
        self.last_time = int(rows["time"][-1])

    def tick(self, time: int) -> None:
        """Add a point to the time line; ``time`` in nanoseconds of the trace."""
        live = [0] * len(self.tallies)
        for machine in self.machines:
            for lane, count in zip(machine.shown, machine.live(), strict=True):
                live[self.tallies.index(lane.tally)] += count
        pairs = zip(live, self.tallies, strict=True)
        shown = [value for count, tally in pairs for value in (count, tally.kinds[Kind.MAPPED])]
        self.next_tick = self.timeline.add([time, sum(self.tallies[0].kinds), self.tlbis, self.changes, *shown])

    def freeze(self) -> None:
        """Take down what the engines hold: comparing them afterwards fills their shadows."""
        if self.frozen:
            return
        self.frozen = True
        if self.machines:
            self.tick(self.last_time)
        for machine in self.machines:
            for lane in machine.shown:
                stats = lane.vm.stats
                lane.tally.live += stats.live
                lane.tally.recycled += stats.contexts_recycled

    def changed(self, time: int, start: int, end: int, event: str, done: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Remember a host change if it is among the largest -> its record."""
        self.changes += 1
        record = {"seconds": (time - (self.first_time or 0)) / 1e9, "start": start, "end": end, "event": event,
                  "policies": done}
        self.largest.append(record)
        if len(self.largest) > LARGEST:
            self.largest.sort(key=weight, reverse=True)
            del self.largest[LARGEST:]
        return record


def weight(record: dict[str, Any]) -> tuple[int, int]:
    done = record["policies"].values()
    return max(row["kernel_steps"] + row["removed"] for row in done), max(row["ns"] for row in done)


def as_path(name: str | os.PathLike[str]) -> Any:
    from pathlib import Path

    return Path(name)


# --- the whole replay ------------------------------------------------------------------------------------------


def run(config: ReplayConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run a replay -> the JSON-ready result of this module's docstring.

    ``progress(what, fraction)`` is called now and then. ``KeyboardInterrupt`` ends the replay early: the result holds
    what was done until then, with ``"interrupted": true``. ``CaptureError``, ``TraceError`` and ``ReplayError`` (all
    ``ValueError``) for what cannot be replayed.
    """
    from s2shadow.storm import machine

    recording = open_recording(config.trace)
    session = Session(config, recording)
    result: dict[str, Any] = {"schema": 1, "machine": machine(), "config": config_dict(config)}
    interrupted = False
    collecting = gc.isenabled()
    gc.disable()
    readers: list[Any] = []
    player: Any = None
    merged: Any = None
    try:
        reporter = Reporter(progress)
        text, table = recording.readers(reporter)
        readers = [reader for reader in (text, table) if reader is not None]
        session.text = text
        first, rest = peek(text if text is not None else table)
        role = choose_role(config, recording, first)
        result["config"]["role"] = role
        player = new_player(role, session)
        merged = Merger(rest, iter(table), role) if text is not None and table is not None else rest
        for rows in merged:
            session.count(rows)
            player.play(rows)
        player.finish()
        session.freeze()
        player.compare_policies()
        reporter.finish()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if collecting:
            gc.enable()
        for reader in readers:
            reader.close()
    return result | summarize(session, readers, merged, player, interrupted)


class Reporter:
    """Turns the readers' bytes into a fraction."""

    def __init__(self, progress: Progress | None):
        self.progress = progress

    def __call__(self, position: int, size: int | None) -> None:
        if self.progress is not None and size:
            self.progress("replay", min(position / size, 0.999))

    def finish(self) -> None:
        if self.progress is not None:
            self.progress("replay", 1.0)


def peek(arrays: Any) -> tuple[Events, Iterator[Events]]:
    """The first array of a stream, and the whole stream."""
    stream = iter(arrays)
    first = next(stream, None)
    if first is None:
        raise ReplayError("the trace has no event that a replay can use")
    return first, chain([first], stream)


def choose_role(config: ReplayConfig, recording: Recording, first: Events) -> str:
    """As asked; else L0 where a guest hypervisor ran in the traced machine."""
    if config.role is not None:
        return config.role
    nested = recording.nested
    if nested is None:
        nested = bool(np.isin(first["kind"], NESTED).any())
    return "l0" if nested else "l1"


def new_player(role: str, session: Session) -> Any:
    if role == "l1":
        from s2shadow.replay_l1 import L1Player

        return L1Player(session)
    from s2shadow.replay_l0 import L0Player

    return L0Player(session)


# --- the result ------------------------------------------------------------------------------------------------


def summarize(session: Session, readers: Sequence[Any], merged: Any, player: Any, interrupted: bool) -> dict[str, Any]:
    start = session.first_time or 0
    if player is not None:
        session.applied.update(player.applied())
    session.freeze()
    if not interrupted and session.recording.checks is not None:
        session.checks["counts"] = count_checks(session, session.recording.checks)
    return {
        "trace": trace_dict(session, readers, merged),
        "counts": {"events": {K(kind).name: n for kind, n in sorted(session.events.items())},
                   "tlbi": instruction_names(session.instructions),
                   "names": session.text.events if session.text is not None else {},
                   "applied": {"TLBIs": session.tlbis, **session.applied}, "skipped": dict(session.skipped)},
        "policies": {tally.policy: policy_dict(tally) for tally in session.tallies},
        "timeline": session.timeline.result(start),
        "largest": sorted(session.largest, key=weight, reverse=True),
        "checks": {**session.checks, "passed": passed(session.checks)},
        "notes": list(session.notes),
        "interrupted": interrupted,
    }


def trace_dict(session: Session, readers: Sequence[Any], merged: Any) -> dict[str, Any]:
    found = {"label": session.recording.label, "seconds": (session.last_time - (session.first_time or 0)) / 1e9,
             "events": sum(session.events.values()), "machines": len(session.machines),
             "vcpus": sum(machine.vcpu_count for machine in session.machines),
             "lost": sum(reader.lost for reader in readers), "unreadable": sum(reader.unreadable for reader in readers),
             "truncated": next((reader.truncated for reader in readers if reader.truncated), None)}
    if isinstance(merged, Merger):
        found |= {"ties": merged.ties, "mismatched": merged.mismatched}
    return found


def policy_dict(tally: Tally) -> dict[str, Any]:
    names = [kind.name.lower() for kind in Kind if kind != Kind.MISS]
    return {
        "faults": {"total": sum(tally.kinds), **dict(zip(names, tally.kinds, strict=False))},
        "refaults_needless": tally.needless,
        "teardown": {"events": tally.teardowns, "removed": tally.torn, "required": tally.must_tear,
                     "ns": tally.teardown.summary()},
        "tlbi": {"operations": tally.tlbis, "removed": tally.tlbi_removed, "required": tally.tlbi_required,
                 "ns": tally.tlbi.summary()},
        "dropped_needlessly": tally.torn - tally.must_tear + tally.tlbi_removed - tally.tlbi_required,
        "kernel_steps": tally.kernel_steps, "kernel_flushes": tally.kernel_steps, "owed_tlbis": tally.owed,
        "live": tally.live, "contexts_recycled": tally.recycled,
    }


def instruction_names(instructions: Counter[int]) -> dict[str, int]:
    """``TLBI ipas2e1is el2``: how many; decoded from the instruction words."""
    found: Counter[str] = Counter()
    for key, count in instructions.items():
        found[f"TLBI {instruction_name(key >> 8)} el{key & 0xFF}"] += count
    return dict(found.most_common())


def instruction_name(insn: int) -> str:
    from s2shadow.features import Features
    from s2shadow.tlbi import UndefinedInstruction, decode_tlbi

    try:
        return decode_tlbi(insn, features=Features()).name.lower()
    except UndefinedInstruction:
        return f"op1_{insn >> 16 & 7}_crm{insn >> 8 & 15}_op2_{insn >> 5 & 7}"


def passed(checks: dict[str, list[Any]]) -> bool:
    tables = chain(checks["tables"], checks["shadows"], checks["hosts"])
    return (all(unexplained(row) <= row.get("under_way", 0) for row in tables)
            and all(row["recorded"] == row["expected"] for row in checks["counts"])
            and not any(row["different"] for row in checks["same_mapping"]))


def unexplained(row: dict[str, Any]) -> int:
    """Pages and leaves of a captured table that the replay has otherwise."""
    pages = sum(row[name] for name in ("other_pa", "only_replay", "only_tables"))
    return int(pages + row["leaves"] - row["equal_leaves"])


# ENTRY is thinned out in every CSV; a name that stood for another instruction when the checks were written
THINNED = ("ENTRY",)
MISNAMED = {"op1_0_crm6_op2_5": "rvale1"}


def count_checks(session: Session, checks: dict[str, Any]) -> list[dict[str, Any]]:
    """What was recorded against checks.json, but for what it says was left out of the packed files."""
    left_out = {str(name) for name in checks.get("left_out_of_trace", ())}
    names = session.text.events if session.text is not None else {}
    rows = []
    more: Counter[str] = Counter()
    for _, name, count in session.left_out:
        more[name] += count
    for name, expected in checks.get("ftrace", {}).items():
        if name not in left_out and not any(word.startswith(f"{name} ") for word in left_out):
            recorded = names.get(name, 0) + more[name]
            rows.append({"name": name, "recorded": recorded, "expected": expected})
    found: Counter[str] = Counter(instruction_names(session.instructions))
    for kind, name in ((K.SET_VTTBR, "VTTBR"), (K.SET_VTCR, "VTCR"), (K.MARK, "MARK"), (K.FOLD, "FOLD")):
        found[name] = session.events[int(kind)]
    wanted: Counter[str] = Counter()
    for name, expected in checks.get("trap_stream", {}).items():
        words = name.split()
        if words[0] in THINNED or (words[0] == "TLBI" and f"tlbi:{words[1]}" in left_out):
            continue
        if words[0] == "TLBI":
            wanted[f"TLBI {MISNAMED.get(words[1], words[1])} {words[2]}"] += expected
        else:
            wanted[words[0]] += expected
    return rows + [{"name": name, "recorded": found[name], "expected": expected} for name, expected in wanted.items()]


def config_dict(config: ReplayConfig) -> dict[str, Any]:
    return {"trace": os.fspath(config.trace), "role": config.role,
            "memory": None if config.memory is None else os.fspath(config.memory),
            "teardown": list(config.policies), "tlbi": config.tlbi, "vcpus": config.vcpus, "contexts": config.contexts,
            "memslots": [{"gpa": slot.gpa, "hva": slot.hva, "size": slot.size, "vm": slot.vm}
                         for slot in config.memslots]}
