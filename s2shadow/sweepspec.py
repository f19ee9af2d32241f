"""The spec of a sweep: a TOML file whose lists make a cross product of storms.

The keys are the fields of ``StormConfig``, as the options of ``s2shadow storm`` name them;
a list makes an axis of the cross product. ``EXAMPLE`` (``s2shadow sweep --example``) shows them all.

    capture      folder of a capture, relative to the spec, or "shipped"; without it the tables are generated
    vm           VM of the capture (default: the largest)
    contexts     nested VMs
    pages        canonical 4K pages per context; generated tables only, as the next two
    aliases      nested IPAs that show each page
    block_mix    fraction of the bytes in 2 MiB blocks
    events       events under the reverse map
    event_pages  4K pages per event
    write        touch by writing
    teardown     policies (default: those of a storm); not an axis: each point measures all of them, one after the other
    tlbi         extent of L1's TLBIs
    seed         of the layout and of the events
    seconds      time for each policy other than the reverse map; at least min_events events
    min_events
    track_tlbis  whether the TLB maintenance that L0 owes is recorded

Each table ``[[grid]]`` is a cross product of its own over the keys above it; the points of all grids are run. A key in
a grid takes the place of the key above, and a grid with a capture ignores pages, aliases and block_mix above it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from s2shadow.inputs import open_input, read_input
from s2shadow.storm import DEFAULT_POLICIES, REVERSE_MAP, StormConfig

__all__ = ["EXAMPLE", "KEYS", "Spec", "SpecError", "load_spec", "parse_spec", "points"]

EXAMPLE = """\
# A sweep: every combination of these values is one storm ("s2shadow sweep THIS.toml").
# A list makes an axis. What is left out has the default of "s2shadow storm".

contexts  = [1, 4, 16]              # nested VMs
pages     = [4096, 65536]           # canonical 4K pages per context
aliases   = 1                       # nested IPAs that show each page
block_mix = [0.0, 0.5]              # fraction of the bytes in 2 MiB blocks

teardown  = ["reverse-map", "blow-away"]    # measured side by side at each point
seconds   = 1.0                     # for each policy other than the reverse map
seed      = [1, 2]                  # of the layout and of the events

# Each grid is a cross product of its own over what stands above it.

[[grid]]                            # single pages: compaction, KSM, NUMA balancing
event_pages = 1
events      = 2000

[[grid]]                            # a balloon gives 2 MiB back
event_pages = 512
events      = 200

# [[grid]]                          # captured tables in place of generated ones
# capture = "shipped"               # or a folder, relative to this file
"""

MOST_POINTS = 100_000
MOST_BYTES = 1 << 20
MOST_DOTS = 100                     # in one key: what reads TOML takes the square of their number
KEYS: dict[str, type] = {
    "capture": str, "vm": int, "contexts": int, "pages": int, "aliases": int, "block_mix": float, "events": int,
    "event_pages": int, "write": bool, "teardown": str, "tlbi": str, "seed": int, "seconds": float, "min_events": int,
    "track_tlbis": bool}
TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
GENERATED_ONLY = ("pages", "aliases", "block_mix")
SHIPPED = "shipped"


class SpecError(ValueError):
    """The spec cannot be used; the text names the file and the key."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A sweep as ``file`` describes it. ``grids``: per grid its keys with their values, in the order of the file."""

    file: str
    grids: tuple[dict[str, tuple[Any, ...]], ...]


def load_spec(file: str | os.PathLike[str]) -> Spec:
    """Read and check a spec; ``-`` is stdin. ``SpecError`` for anything that is wrong with it."""
    name = "stdin" if os.fspath(file) == "-" else os.fspath(file)
    try:
        if name == "stdin":
            data = read_input(sys.stdin.buffer, MOST_BYTES)
        else:
            with open_input(file) as stream:
                data = read_input(stream, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    if not data.strip():
        raise SpecError(f"{name}: it is empty; sweep --example prints a spec")
    folder = Path(".") if name == "stdin" else Path(file).parent
    return parse_spec(data, name, folder)


def parse_spec(data: bytes, name: str, folder: Path) -> Spec:
    try:
        text = data.decode()
        check_dots(text, name)
        table = tomllib.loads(text)
    except UnicodeDecodeError:
        raise SpecError(f"{name}: not UTF-8 text") from None
    except RecursionError:
        raise SpecError(f"{name}: lists or tables inside each other too deeply") from None
    except SpecError:
        raise
    except ValueError as error:             # not only its own: numbers too long
        raise SpecError(f"{name}: {error}") from None
    grids = table.pop("grid", [{}])
    if not (isinstance(grids, list) and grids and all(isinstance(grid, dict) for grid in grids)):
        raise SpecError(f"{name}: grid must be a table, written [[grid]]")
    shared = check_keys(table, name, folder)
    where = [name if len(grids) == 1 else f"{name}, grid {i}" for i in range(1, len(grids) + 1)]
    spec = Spec(name, tuple(merge(shared, check_keys(grid, at, folder))
                            for grid, at in zip(grids, where, strict=True)))
    check_size(spec)
    for grid, at in zip(spec.grids, where, strict=True):
        try:
            check_sources(grid)
            for _ in grid_points(grid):
                pass
        except ValueError as error:
            raise SpecError(f"{at}: {error}") from None
    return spec


def check_dots(text: str, name: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MOST_DOTS and any(part.count(".") > MOST_DOTS for part in re.split(r"[,=\[\]{}]", line)):
            raise SpecError(f"{name}: line {number} has a key of more than {MOST_DOTS} parts")


def merge(shared: dict[str, tuple[Any, ...]], grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """A grid of captures does without what the keys above it say of generated tables."""
    if "capture" in grid:
        shared = {key: values for key, values in shared.items() if key not in GENERATED_ONLY}
    return shared | grid


def check_keys(table: dict[str, Any], where: str, folder: Path) -> dict[str, tuple[Any, ...]]:
    """Each key's values as a tuple without repetitions, of the key's type."""
    found = {}
    for key, given in table.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}"
            raise SpecError(f"{where}: no key {key!r}; {hint}")
        values = given if isinstance(given, list) else [given]
        if not values:
            raise SpecError(f"{where}: {key} is an empty list")
        checked = [check_value(key, value, where) for value in values]
        if key == "capture":
            if "" in checked:
                raise SpecError(f"{where}: capture: no folder ''")
            checked = [value if value == SHIPPED else os.path.abspath(folder / value) for value in checked]
        found[key] = tuple(dict.fromkeys(checked))
    return found


def check_value(key: str, value: Any, where: str) -> Any:
    wanted = KEYS[key]
    if wanted is float and type(value) is int:
        value = float(value)
    if not fits(wanted, value):
        raise SpecError(f"{where}: {key} must be {TYPE_WORDS[wanted]}, got {toml_text(value)}")
    if wanted is int and abs(value) >= 1 << 63:
        raise SpecError(f"{where}: {key} must be below 2^63, got {value}")
    return value


def fits(wanted: type, value: Any) -> bool:
    """``true`` is not a whole number here, and ``nan`` and ``inf`` are not numbers."""
    return type(value) is wanted and (not isinstance(value, float) or math.isfinite(value))


def toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return f'"{value}"' if isinstance(value, str) else str(value)


def check_sources(grid: dict[str, tuple[Any, ...]]) -> None:
    if "capture" not in grid:
        if "vm" in grid:
            raise ValueError("vm needs a capture")
        return
    for key in GENERATED_ONLY:
        if key in grid:
            raise ValueError(f"{key} is for generated tables, and capture is given")


def check_size(spec: Spec) -> None:
    count = sum(math.prod(len(values) for key, values in grid.items() if key != "teardown") for grid in spec.grids)
    if count > MOST_POINTS:
        raise SpecError(f"{spec.file}: makes {count:,} points; at most {MOST_POINTS:,}")


def points(spec: Spec) -> list[StormConfig]:
    """The storms of a spec, each once, in the order of the file: the last key changes fastest."""
    merged: dict[StormConfig, tuple[str, ...]] = {}
    for grid in spec.grids:
        for config in grid_points(grid):
            key = point_key(config)
            merged[key] = tuple(dict.fromkeys(merged.get(key, ()) + config.teardown))
    return [replace(key, teardown=teardown) for key, teardown in merged.items()]


def grid_points(grid: dict[str, tuple[Any, ...]]) -> Iterator[StormConfig]:
    """``ValueError`` naming the key at the first value out of its range."""
    teardown = grid.get("teardown", DEFAULT_POLICIES)
    axes = {key: values for key, values in grid.items() if key != "teardown"}
    for chosen in product(*axes.values()):
        values = dict(zip(axes, chosen, strict=True))
        capture = values.pop("capture", None)
        yield StormConfig(**values, teardown=teardown, synthetic=capture is None,
                          capture=None if capture == SHIPPED else capture)


def point_key(config: StormConfig) -> StormConfig:
    """What makes two storms the same point: everything but the policies."""
    return replace(config, teardown=(REVERSE_MAP,))
