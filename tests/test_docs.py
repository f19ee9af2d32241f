"""The pages in docs/: every example runs and prints what the page says, and what the pages list is all there is.

A fence may be ``pycon`` (run by doctest, all of a page in one session), ``console`` (``s2shadow`` commands, run in the
clone's folder), ``sh`` (too long to run: the arguments must parse), ``python`` (a sketch with parts left out: what it
imports must be there), or a directive (which may take its text from an example that is tested). Nothing else, so that
nothing is passed over.
"""

import ast
import doctest
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

import s2shadow
from s2shadow.cli import main, make_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
RUNNABLE = ("pycon", "console", "sh", "python")


def fences(page, language):
    return [match[3] for match in FENCE.finditer(page.read_text()) if match[2].strip() == language]


def having(language):
    return [page for page in PAGES if fences(page, language)]


def test_there_is_nothing_that_is_not_run():
    assert {page.stem for page in PAGES} >= {"api", "architecture", "cli", "embedding", "index", "results", "tutorial"}
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            assert match[2].strip() in RUNNABLE or match[2].startswith("{"), f"{page.name}: a fence of {match[2]!r}"
    assert {page.stem for page in having("pycon")} >= {"architecture", "tutorial"}
    assert {page.stem for page in having("console")} >= {"cli", "tutorial"}


@pytest.mark.parametrize("page", having("pycon"), ids=lambda page: page.stem)
def test_sessions(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = "\n".join(fences(page, "pycon"))
    session = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(session, out=said.append)
    assert result.attempted and not result.failed, "".join(said)


def commands(text):
    """(command, output) of a ``console`` fence."""
    assert text.startswith("$ "), text
    return [tuple(part.partition("\n")[::2]) for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]


COMMANDS = [(page, command, output) for page in PAGES for text in fences(page, "console")
            for command, output in commands(text)]


def without_times(text):
    """What is measured differs from run to run; so do the gaps between columns."""
    return re.sub(r" +", " ", re.sub(r"\d[\d,.]* (ns|µs|ms|s|min)\b", "0 s", text))


def without_figures(text):
    """A storm's policies stop by the clock: not even how many events there were repeats."""
    return re.sub(r"\d[\d,.]*", "0", without_times(text))


@pytest.mark.parametrize(("page", "command", "output"), COMMANDS,
                         ids=[f"{page.stem}-{n}" for n, (page, _, _) in enumerate(COMMANDS)])
def test_commands(page, command, output, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command, _, head = command.partition(" | head -")
    program, *arguments = shlex.split(command)
    assert program == "s2shadow"
    main(arguments)
    out, err = capsys.readouterr()
    seen = out + err
    if head:
        seen = "".join(seen.splitlines(keepends=True)[:int(head)])
    blur = {"storm": without_figures, "replay": without_times}.get(arguments[0], str)
    seen, output = blur(seen), blur(output)
    assert doctest.OutputChecker().check_output(output, seen, doctest.ELLIPSIS), f"$ {command}\n{seen}"


@pytest.mark.parametrize("page", having("sh"), ids=lambda page: page.stem)
def test_long_commands_are_possible(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in "".join(fences(page, "sh")).splitlines():
        program, *arguments = shlex.split(line)
        if program == "s2shadow":
            make_parser().parse_args(arguments)
            continue
        assert (program, *arguments[:1]) == ("pip", "install"), line
        for extra in re.findall(r"\[(.+?)\]", line):
            assert set(extra.split(",")) <= set(extras), line


def check_sketch(page, text):
    names = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), page.name, "exec"), names)
    assert names, f"{page.name}: a sketch that imports nothing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), f"{page.name}: {node.value.id}.{node.attr}"


def test_sketches_use_what_is_there():
    for page in PAGES:
        for text in fences(page, "python"):
            check_sketch(page, text)


def test_included_files_are_there():
    for page in PAGES:
        for file in re.findall(r"^`{3,}\{literalinclude\} (\S+)$", page.read_text(), re.MULTILINE):
            assert (page.parent / file).is_file(), f"{page.name}: {file}"


def subparsers():
    (action,) = [action for action in make_parser()._actions if action.dest == "command"]
    return action.choices


def sections(page):
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_has_a_section():
    assert set(subparsers()) <= set(sections(DOCS / "cli.md"))


@pytest.mark.parametrize("name", sorted(subparsers()))
def test_every_option_is_listed(name):
    listed = {}
    for row in re.findall(r"^\| (`-.+?) \| .+\|$", sections(DOCS / "cli.md")[name], re.MULTILINE):
        for option, value in re.findall(r"`(-[\w-]+)(?: ([^`]+))?`", row):
            listed[option] = value.replace("\\|", "|").strip("[]…")
    known = {}
    for action in subparsers()[name]._actions:
        if "--help" not in action.option_strings:
            for option in action.option_strings:
                known[option] = "" if action.nargs == 0 else action.metavar or "|".join(action.choices)
    assert listed == known


def dtype_tables():
    """{name: [(field, type)]} of the tables in api.md that stand under a dtype's name."""
    found = {}
    for name, table in re.findall(r"^### (\w+_DTYPE)\n(.*?)(?=^#|\Z)", (DOCS / "api.md").read_text(), re.M | re.S):
        rows = re.findall(r"^\| (`.+?`) \| (\w+) \| .+ \|$", table, re.MULTILINE)
        found[name] = [(field, kind) for names, kind in rows for field in re.findall(r"`(\w+)`", names)]
    return found


@pytest.mark.parametrize("name", sorted(name for name in s2shadow.__all__ if name.endswith("_DTYPE")))
def test_every_field_is_listed(name):
    dtype = getattr(s2shadow, name)
    assert dtype_tables()[name] == [(field, np.dtype(dtype[field]).str.lstrip("<|")) for field in dtype.names]


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    named = set(re.findall(r"\w+", text))
    missing = [name for name in s2shadow.__all__ if name not in named]
    assert not missing


@pytest.mark.parametrize("name", ["GuestMemory", "NestedVM", "Stage2Config"])
def test_constructors_have_the_arguments_of_the_stub(name):
    """Compiled classes do not tell theirs, so the page does."""
    module = getattr(s2shadow, name).__module__.rpartition(".")[2]
    stub = ast.parse((Path(s2shadow.__file__).parent / f"{module}.pyi").read_text())
    (made,) = [inner.args for node in stub.body if isinstance(node, ast.ClassDef) and node.name == name
               for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
    made.args = made.args[1:]
    for argument in made.args + made.kwonlyargs:
        argument.annotation = None
    assert f".. autoclass:: {name}({ast.unparse(made)})\n" in (DOCS / "api.md").read_text()


def test_rooms_know_only_those_before_them():
    """The table of rooms against what the sources cimport."""
    package = ROOT / "s2shadow"
    text = sections(DOCS / "architecture.md")["The rooms, from the ground up"]
    rooms = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)]
    sources = {path.stem for path in [*package.glob("*.pyx"), *package.glob("*.pxd")] if not path.stem.startswith("_")}
    assert {room for row in rooms for room in row} == sources - {"tracescan"}
    before = set()
    for row in rooms:
        for room in row:
            parts = [path.read_text() for path in (package / f"{room}.pyx", package / f"{room}.pxd") if path.exists()]
            known = set(re.findall(r"^from s2shadow\.(\w+) cimport", "\n".join(parts), re.MULTILINE))
            assert known <= before | {room}, f"{room} knows {known - before}"
        before |= set(row)
