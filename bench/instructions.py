"""Instructions per operation, counted by callgrind and held against ``bench/budgets.toml``.

    python bench/instructions.py                    # count everything, compare; exit status 1 if a budget is exceeded
    python bench/instructions.py --only walk fault  # cases whose name contains one of these
    python bench/instructions.py --profile fault_4k_random      # instructions by function, of one case
    python bench/instructions.py --json FILE        # the figures, for bench.report

One process runs under valgrind. Each operation is run n times and 2n times by a loop in C (``s2shadow._floor``); the
difference, divided by n, is what one costs: Python, set-up and the call around the loop cancel. Only user-space
instructions of the engine and the C library count. Figures repeat exactly, up to hash seeds and addresses (below 1 %).

The budgets hold for the compiler that they name; modules built by another are held against the ``issue`` limits only.
Without valgrind (or its headers, or a C compiler for the client requests) nothing is counted: one line on stderr says
so, exit status 77.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.toml"
NOT_COUNTED = 77
REQUESTS = r"""
#include <valgrind/callgrind.h>
int on_valgrind(void) { return RUNNING_ON_VALGRIND; }
void count_begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void count_end(const char *label) { CALLGRIND_DUMP_STATS_AT(label); CALLGRIND_STOP_INSTRUMENTATION; }
"""


class CannotCount(Exception):
    """valgrind, its headers or a C compiler is missing."""


# --- inside valgrind ---------------------------------------------------------------------------------------------


class Meter:
    """Counts what a call executes. The counts themselves are in callgrind's dumps, one for each label."""

    def __init__(self, requests):
        self.requests = ctypes.CDLL(requests)
        if not self.requests.on_valgrind():
            raise CannotCount("not under valgrind")
        self.rows = {}

    def count(self, label, run, expected):
        label = label.encode()
        self.requests.count_begin()
        result = run()
        self.requests.count_end(label)
        if result != expected:
            raise RuntimeError(f"{label.decode()}: {result} where {expected} was expected")

    def measure(self, name, prepare, n):
        """``prepare(n)`` makes, uncounted, a call of ``n`` operations and says what it must return."""
        sizes = (n, 2 * n)
        for size in sizes:
            run, expected = prepare(size)
            self.count(f"{name}@{size}", run, expected)
        self.rows[name] = sizes


def inside(requests, names, output):
    """Run the cases under valgrind; write which labels belong together, and the figures that are no counts."""
    from cases import CASES, reverse_map_bytes

    meter = Meter(requests)
    for name in names:
        if name in CASES:
            CASES[name](lambda prepare, n, name=name: meter.measure(name, prepare, n))
    figures = {"reverse_map_bytes": reverse_map_bytes()} if "reverse_map_bytes" in names else {}
    Path(output).write_text(json.dumps({"sizes": meter.rows, "figures": figures}))


# --- outside -----------------------------------------------------------------------------------------------------


def build_requests(folder):
    source, library = folder / "requests.c", folder / "requests.so"
    source.write_text(REQUESTS)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if shutil.which("valgrind") is None:
        raise CannotCount("valgrind is not installed (Debian: apt-get install valgrind)")
    if compiler is None:
        raise CannotCount("no C compiler for valgrind's client requests")
    made = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if made.returncode:
        raise CannotCount(f"valgrind's headers do not compile: {made.stderr.strip().splitlines()[0]}")
    return library


def count(names, folder, *, symbols=False):
    """Run the cases under callgrind -> ({name: instructions per operation}, {label: dump file})."""
    library = build_requests(folder)
    output = folder / "sizes.json"
    valgrind = [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", "--combine-dumps=no", "--quiet",
        f"--callgrind-out-file={folder}/dump", "--smc-check=stack", "--compress-strings=no" if symbols else "--compress-strings=yes",
    ]  # fmt: skip
    inner = [sys.executable, __file__, "--inside", library, output, *names]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # one thread, and the same hash seed and environment each time
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([*valgrind, *map(str, inner)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("the run under valgrind failed:\n" + done.stderr.strip())
    dumps = read_dumps(folder)
    measured = json.loads(output.read_text())
    figures = dict(measured["figures"])
    for name, (n, more) in measured["sizes"].items():
        figures[name] = per_operation(dumps[f"{name}@{n}"][0], dumps[f"{name}@{more}"][0], n, more)
    return figures, {label: path for label, (_, path) in dumps.items()}


def per_operation(few, many, n, more):
    """What one operation costs when ``n`` cost ``few`` and ``more`` cost ``many``, with anything fixed around them."""
    return (many - few) / (more - n)


def read_dumps(folder):
    """{label: (instructions, file)} of callgrind's dumps."""
    dumps = {}
    for path in folder.glob("dump.*"):
        text = path.read_text(errors="replace")
        label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if label and total:
            dumps[label[1].strip()] = int(total[1]), path
    return dumps


def compiler_of(module):
    """What compiled a module, as its .comment section says."""
    found = re.search(rb"(GCC: [^\0]+|clang version [^\0]+)", Path(module).read_bytes())
    return found[1].decode() if found else "unknown"


def compare(figures, budgets, exact):
    """Rows of (name, measured, budget, issue's limit, verdict) in the order of the budgets; True if all hold."""
    rows, good = [], True
    for name, entry in budgets["instructions"].items():
        if name not in figures:
            continue
        measured = figures[name] - figures[entry["beyond"]] if "beyond" in entry else figures[name]
        if "per_leaf" in entry:
            measured /= entry["per_leaf"]
        issue = entry.get("issue")
        budget = entry.get("most") if exact else None
        most = budget * 1.01 + 0.05 if budget is not None else issue
        holds = most is None or measured <= most
        good = good and holds
        rows.append((name, measured, budget, issue, "" if holds else "EXCEEDED"))
    return rows, good


def main(argv=None):
    parser = argparse.ArgumentParser(description="Instructions per operation, held against bench/budgets.toml.")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--profile", metavar="NAME", help="instructions by function of one case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        inside(options.inside[0], options.inside[2:], options.inside[1])
        return 0
    budgets = tomllib.loads(BUDGETS.read_text())
    entries = budgets["instructions"]
    wanted = [options.profile] if options.profile else [n for n in entries if any(text in n for text in options.only)]
    if not wanted or options.profile and options.profile not in entries:
        print(f"instructions: no such case; there are: {', '.join(entries)}", file=sys.stderr)
        return 2
    names = [name for name in entries if name in wanted or name in {entries[n].get("beyond") for n in wanted}]
    with tempfile.TemporaryDirectory(prefix="s2shadow-instructions-") as folder:
        try:
            figures, dumps = count(names, Path(folder), symbols=options.profile is not None)
        except CannotCount as why:
            print(f"instructions: not counted: {why}", file=sys.stderr)
            return NOT_COUNTED
        if options.profile:
            return profile(options.profile, dumps)
    sys.path.insert(0, str(HERE.parent))
    import s2shadow.fault

    compiler = compiler_of(s2shadow.fault.__file__)
    exact = compiler == budgets["built"]["compiler"]
    rows, good = compare(figures, budgets, exact)
    if not exact:
        print(f"built by {compiler}, the budgets are those of {budgets['built']['compiler']}: "
              "only the issue's limits are compared", file=sys.stderr)  # fmt: skip
    print(f"{'instructions per operation':40} {'measured':>10} {'budget':>10} {'issue':>10}")
    for name, measured, budget, issue, verdict in rows:
        print(f"{name:40} {measured:10,.1f} {show(budget):>10} {show(issue):>10} {verdict}")
    if options.json:
        options.json.write_text(json.dumps({"compiler": compiler, "figures": {row[0]: round(row[1], 2) for row in rows}}, indent=1) + "\n")
    return 0 if good else 1


def show(number):
    return "-" if number is None else f"{number:,}"


def profile(name, dumps):
    """callgrind_annotate of the longer run: divide by its number of operations, the figure after the @."""
    label = max((label for label in dumps if label.split("@")[0] == name), key=lambda label: int(label.split("@")[1]))
    print(label)
    return subprocess.run(["callgrind_annotate", "--auto=no", "--threshold=99.5", dumps[label]]).returncode


if __name__ == "__main__":
    sys.exit(main())
