"""Where two stage-2 maps differ; see ``s2shadow.dump``."""

from __future__ import annotations

from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from s2shadow.kerneltext import as_kernel, goes_on_in_kernel, is_kernel_text
from s2shadow.ranges import AF, NO_ADDRESS, UNKNOWN, Rows, State, Words, merge

DIFF_DTYPE = np.dtype([("start", "u8"), ("end", "u8"), ("a_pa", "u8"), ("b_pa", "u8"), ("a_size", "u8"),
                       ("b_size", "u8"), ("kind", "u1"), ("a_level", "i1"), ("b_level", "i1"), ("a_perm", "u1"),
                       ("b_perm", "u1"), ("a_young", "u1"), ("b_young", "u1"), ("a_memattr", "u1"), ("b_memattr", "u1"),
                       ("a_sh", "u1"), ("b_sh", "u1")], align=True)
NOT_MAPPED = -2         # level of a side that maps nothing there
SIDE_FIELDS = {"pa": NO_ADDRESS, "size": 0, "level": NOT_MAPPED, "perm": 0, "young": 0, "memattr": UNKNOWN,
               "sh": UNKNOWN}      # and what they are where nothing is mapped
Side = dict[str, npt.NDArray[Any]]


class Difference(IntFlag):
    """How two maps differ in a range. MISSING: only the first maps it; EXTRA: only the second. Both map it, but not
    alike: PERMISSION, SIZE of the leaf, ADDRESS that it gives, ATTRIBUTES (memory type, shareability), ACCESS_FLAG."""

    MISSING = 1
    EXTRA = 2
    PERMISSION = 4
    SIZE = 8
    ADDRESS = 16
    ATTRIBUTES = 32
    ACCESS_FLAG = 64


def diff(a: Rows, b: Rows, access_flag: bool = False) -> Rows:
    """Where two maps differ, as ``DIFF_DTYPE`` in the order of the IPA; empty if nowhere.

    ``start``, ``end``: the range; ``kind``: ``Difference`` bits. Of either side ``size`` (0: not known), ``level`` (-2:
    nothing is mapped there), ``perm``, ``memattr``, ``sh``; ``pa`` of ``start`` where the kind has ADDRESS (else
    ``NO_ADDRESS``), ``young`` (AF) where it has ACCESS_FLAG (else 0).

    Only what both sides know is compared: output addresses and memory attributes not with kernel text, whose size of
    an entry is its level. Which entries make up a run does not matter, nor the level of what is not mapped. AF is
    compared only if asked for. The run that kernel text does not print is taken for what the other side has there, if
    that can be one run; else for not mapped.
    """
    text_a, text_b = is_kernel_text(a), is_kernel_text(b)
    whole_a, whole_b = a, b
    if text_a != text_b:
        a, b = as_kernel(a), as_kernel(b)
    cuts = distinct(np.concatenate([part for rows in (a, b) for part in (rows["start"], open_ends(rows))]))
    start, end = cuts[:-1], cuts[1:]
    if text_a != text_b:
        known = start < (unseen_from(whole_a, b) if text_a else unseen_from(whole_b, a))
        start, end = start[known], end[known]
    sides = {"a": side_of(a, start), "b": side_of(b, start)}
    kind = kinds(sides["a"], sides["b"], access_flag)
    differs = kind != 0
    found = np.zeros(np.count_nonzero(differs), dtype=DIFF_DTYPE)
    found["start"], found["end"], found["kind"] = start[differs], end[differs], kind[differs]
    for name, side in sides.items():
        for field in SIDE_FIELDS:
            found[f"{name}_{field}"] = side[field][differs]
        found[f"{name}_pa"][found["kind"] & Difference.ADDRESS == 0] = NO_ADDRESS
        found[f"{name}_young"][found["kind"] & Difference.ACCESS_FLAG == 0] = 0
    return merge(found, same_difference)


def open_ends(rows: Rows) -> Words:
    """Where a range ends and no other starts."""
    last = np.ones(len(rows), bool)
    last[:-1] = rows["end"][:-1] != rows["start"][1:]
    return rows["end"][last]


def distinct(values: Words) -> Words:
    values.sort(kind="stable")      # merges: what it is given is in order but for a few seams
    return values[np.flatnonzero(np.diff(values, prepend=NO_ADDRESS))]


def unseen_from(text: Rows, other: Rows) -> int:
    """Where the run that ``text`` does not print starts, if ``other`` may have the same; else the end of everything."""
    end = int(text["end"][-1]) if len(text) else 0
    tail = other[other["end"] > end]
    # the kernel would have gone on with the last line, had the rest been of the same kind
    fits = len(tail) == 1 and not (len(text) and goes_on_in_kernel(text[-1:], tail)[0])
    return end if fits else NO_ADDRESS


def side_of(rows: Rows, start: Words) -> Side:
    """What a map has at each address: ``SIDE_FIELDS``, and ``mapped``."""
    side: Side = {"mapped": np.zeros(len(start), bool)}
    at = np.searchsorted(rows["start"], start, side="right") - 1
    if len(rows):
        side["mapped"] = (at >= 0) & (start < rows["end"][at]) & (rows["state"][at] == State.MAPPED)
    at = at[side["mapped"]]
    for name, nothing in SIDE_FIELDS.items():
        side[name] = np.full(len(start), nothing, DIFF_DTYPE[f"a_{name}"])
        if name == "young":
            value = rows["attrs"][at] & AF != 0
        elif name == "pa":
            value = rows["pa"][at]
            value[value != NO_ADDRESS] += (start[side["mapped"]] - rows["start"][at])[value != NO_ADDRESS]
        else:
            value = rows[name][at]
        side[name][side["mapped"]] = value
    return side


def kinds(a: Side, b: Side, access_flag: bool) -> npt.NDArray[np.uint8]:
    kind = np.where(a["mapped"], np.uint8(Difference.MISSING), np.uint8(Difference.EXTRA))
    kind[a["mapped"] == b["mapped"]] = 0
    both = a["mapped"] & b["mapped"]

    def mark(name: str, what: Difference, unknown: int | None = None, comparable: Any = True) -> None:
        differs = both & comparable & (a[name] != b[name])
        if unknown is not None:
            differs &= (a[name] != unknown) & (b[name] != unknown)
        kind[differs] |= np.uint8(what)

    sized = (a["size"] != 0) & (b["size"] != 0)
    mark("perm", Difference.PERMISSION)
    mark("size", Difference.SIZE, comparable=sized)
    mark("level", Difference.SIZE, comparable=~sized)
    mark("pa", Difference.ADDRESS, unknown=NO_ADDRESS)
    mark("memattr", Difference.ATTRIBUTES, unknown=UNKNOWN)
    mark("sh", Difference.ATTRIBUTES, unknown=UNKNOWN)
    if access_flag:
        mark("young", Difference.ACCESS_FLAG)
    return kind


def same_difference(before: Rows, after: Rows) -> npt.NDArray[np.bool_]:
    same = np.ones(len(before), bool)
    for name in ("kind", *(f"{side}_{field}" for side in "ab" for field in SIDE_FIELDS if field != "pa")):
        same &= before[name] == after[name]
    moved = before["kind"] & Difference.ADDRESS != 0
    length = after["start"] - before["start"]
    for side in "ab":
        same &= ~moved | (after[f"{side}_pa"] - before[f"{side}_pa"] == length)
    return same
