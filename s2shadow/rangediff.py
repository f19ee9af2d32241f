"""Where two stage-2 maps differ; see ``s2shadow.dump``."""

from __future__ import annotations

from enum import IntFlag

import numpy as np
import numpy.typing as npt

from s2shadow.kerneltext import as_kernel, is_kernel_text
from s2shadow.ranges import NO_ADDRESS, UNKNOWN, Rows, State, merge

DIFF_DTYPE = np.dtype([("start", "u8"), ("end", "u8"), ("a_pa", "u8"), ("b_pa", "u8"), ("a_size", "u8"),
                       ("b_size", "u8"), ("kind", "u1"), ("a_level", "i1"), ("b_level", "i1"), ("a_perm", "u1"),
                       ("b_perm", "u1"), ("a_young", "u1"), ("b_young", "u1"), ("a_memattr", "u1"), ("b_memattr", "u1"),
                       ("a_sh", "u1"), ("b_sh", "u1")], align=True)
NOT_MAPPED = -2         # level of a side that maps nothing there


class Difference(IntFlag):
    """How two maps differ in a range. MISSING: only the first maps it; EXTRA: only the second."""

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
    cuts = np.unique(np.concatenate([rows[name] for rows in (a, b) for name in ("start", "end")]))
    start, end = cuts[:-1], cuts[1:]
    known = np.ones(len(start), bool)
    if text_a and not text_b:
        known = start < unseen_from(whole_a, b)
    elif text_b and not text_a:
        known = start < unseen_from(whole_b, a)
    start, end = start[known], end[known]
    found = np.zeros(len(start), dtype=DIFF_DTYPE)
    found["start"], found["end"] = start, end
    in_a, in_b = fill_side(found, "a_", a), fill_side(found, "b_", b)
    found["kind"] = kinds(found, in_a, in_b, access_flag)
    for side in "ab":
        found[f"{side}_pa"][found["kind"] & Difference.ADDRESS == 0] = NO_ADDRESS
        found[f"{side}_young"][found["kind"] & Difference.ACCESS_FLAG == 0] = 0
    return merge(found[found["kind"] != 0], same_difference)


def unseen_from(text: Rows, other: Rows) -> int:
    """Where the run that ``text`` does not print starts, if ``other`` may have the same; else the end of everything."""
    end = int(text["end"][-1]) if len(text) else 0
    tail = other[other["end"] > end]
    return end if len(tail) == 1 and int(tail["start"][0]) == end else NO_ADDRESS


def fill_side(found: Rows, prefix: str, rows: Rows) -> npt.NDArray[np.bool_]:
    """The fields of one side of every range; which of them it maps."""
    mapped = np.zeros(len(found), bool)
    found[f"{prefix}level"] = NOT_MAPPED
    found[f"{prefix}pa"] = NO_ADDRESS
    found[f"{prefix}memattr"] = found[f"{prefix}sh"] = UNKNOWN
    if not len(rows) or not len(found):
        return mapped
    at = np.searchsorted(rows["start"], found["start"], side="right") - 1
    under = rows[at]
    mapped = (at >= 0) & (found["start"] < under["end"]) & (under["state"] == State.MAPPED)
    under = under[mapped]
    for name in ("size", "level", "perm", "memattr", "sh"):
        found[prefix + name][mapped] = under[name]
    found[f"{prefix}young"][mapped] = under["attrs"] >> np.uint64(10) & np.uint64(1)
    known = under["pa"] != NO_ADDRESS
    found[f"{prefix}pa"][mapped] = np.where(known, under["pa"] + (found["start"][mapped] - under["start"]), NO_ADDRESS)
    return mapped


def kinds(found: Rows, in_a: npt.NDArray[np.bool_], in_b: npt.NDArray[np.bool_],
          access_flag: bool) -> npt.NDArray[np.uint8]:
    kind = np.zeros(len(found), np.uint8)
    kind[in_a & ~in_b] = Difference.MISSING
    kind[in_b & ~in_a] = Difference.EXTRA
    both = in_a & in_b

    def mark(differs: npt.NDArray[np.bool_], what: Difference) -> None:
        kind[both & differs] |= np.uint8(what)

    sized = (found["a_size"] != 0) & (found["b_size"] != 0)
    mark(found["a_perm"] != found["b_perm"], Difference.PERMISSION)
    mark(np.where(sized, found["a_size"] != found["b_size"], found["a_level"] != found["b_level"]), Difference.SIZE)
    mark((found["a_pa"] != found["b_pa"]) & (found["a_pa"] != NO_ADDRESS) & (found["b_pa"] != NO_ADDRESS),
         Difference.ADDRESS)
    for name in ("memattr", "sh"):
        mark((found[f"a_{name}"] != found[f"b_{name}"]) & (found[f"a_{name}"] != UNKNOWN)
             & (found[f"b_{name}"] != UNKNOWN), Difference.ATTRIBUTES)
    if access_flag:
        mark(found["a_young"] != found["b_young"], Difference.ACCESS_FLAG)
    return kind


def same_difference(before: Rows, after: Rows) -> npt.NDArray[np.bool_]:
    same = np.ones(len(before), bool)
    fields = ("size", "level", "perm", "young", "memattr", "sh")
    for name in ("kind", *(f"{side}_{field}" for side in "ab" for field in fields)):
        same &= before[name] == after[name]
    moved = before["kind"] & Difference.ADDRESS != 0
    length = after["start"] - before["start"]
    for side in "ab":
        same &= ~moved | (after[f"{side}_pa"] - before[f"{side}_pa"] == length)
    return same
