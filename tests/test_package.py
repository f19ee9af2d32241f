"""The package as it is installed: metadata, stubs, what an import costs, what git must not hold."""

import ast
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

import s2shadow
from sanitizer import SANITIZED

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(s2shadow.__file__).parent


def run_python(code):
    # -P: neither the current folder nor the script's is searched, so the installed package is what is imported
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_version_comes_from_one_place():
    assert s2shadow.__version__ == metadata.version("s2shadow")
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.+?)"', pyproject, re.MULTILINE) == [s2shadow.__version__]
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyi", ".pyx", ".pxd", ".h", ".pc")]
    for source in [*sources, ROOT / "setup.py", ROOT / "docs" / "conf.py"]:
        assert s2shadow.__version__ not in source.read_text(), source


def test_metadata():
    meta = metadata.metadata("s2shadow")
    assert meta["License-Expression"] == "MIT"
    assert meta["Requires-Python"] == ">=3.11"
    required = metadata.requires("s2shadow")
    assert [name for name in required if "extra ==" not in name] == ["numpy>=1.26"]
    assert set(meta.get_all("Provides-Extra")) == {"cli", "dask", "plot", "trace", "unicorn"}
    (script,) = metadata.entry_points(group="console_scripts", name="s2shadow")
    assert script.value == "s2shadow.cli:main"


def test_every_compiled_module_has_a_stub():
    modules = {path.name.partition(".")[0] for path in PACKAGE.glob("*.so")}
    assert modules, "no compiled modules: the package is not built"
    assert (PACKAGE / "py.typed").exists()
    assert modules <= {path.stem for path in PACKAGE.glob("*.pyi")}


@pytest.mark.parametrize("stub", sorted(PACKAGE.glob("*.pyi")), ids=lambda path: path.stem)
def test_stub_is_valid_python(stub):
    ast.parse(stub.read_text())


def test_public_names_are_exported():
    assert sorted(set(s2shadow.__all__)) == sorted(s2shadow.__all__)
    for name in s2shadow.__all__:
        assert hasattr(s2shadow, name), name


def test_import_brings_no_extra():
    heavy = ("rich", "matplotlib", "argparse", "multiprocessing")
    before, after = run_python(
        f"import sys, numpy; before = [m for m in {heavy} if m in sys.modules]\n"
        f"import s2shadow; print(len(before), len([m for m in {heavy} if m in sys.modules]))"
    )
    assert before == after


@pytest.mark.skipif(SANITIZED, reason="ASan takes longer")
def test_import_is_quick():
    # beyond numpy's own time; the best of three, since a busy machine only ever adds
    code = "import numpy, time; t = time.perf_counter(); import s2shadow; print(time.perf_counter() - t)"
    assert min(float(run_python(code)[0]) for _ in range(3)) < 0.25


def test_generated_code_declares_the_gil_slot():
    """A module without Py_mod_gil switches the GIL on again on a free-threaded interpreter (PEP 703)."""
    generated = [path for path in ROOT.glob("build/cython*/s2shadow/**/*") if path.suffix in (".c", ".cpp")]
    if not generated:
        pytest.skip("not built here: the generated C is elsewhere")
    for path in generated:
        text = path.read_text()
        assert "{Py_mod_gil, __Pyx_FREETHREADING_COMPATIBLE}" in text, path
        # the first two stand behind a macro that a builder may set; the last is what the directive asked for
        values = re.findall(r"#define __Pyx_FREETHREADING_COMPATIBLE (\w+)", text)
        assert values[-1] == "Py_MOD_GIL_NOT_USED" and len(values) == 3, path


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="not a free-threaded interpreter")
def test_imports_leave_the_gil_off():
    modules = ", ".join(f"s2shadow.{path.name.partition('.')[0]}" for path in PACKAGE.glob("*.so"))
    assert run_python(f"import sys, {modules}; print(sys._is_gil_enabled())") == ["False"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_holds_nothing_generated():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    made = (".c", ".cpp", ".so", ".pyc", ".html")
    written = {"examples/embed_c/main.c", "fuzz/engine.c", "tests/lifetimes.c", "tests/threads/driver.c"}
    assert not [name for name in set(listed.splitlines()) - written
                if name.endswith(made) or name.startswith("build/")]
