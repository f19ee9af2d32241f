"""s2shadow.h: clean in both languages, and the same as what Cython, ctypes and numpy are told."""

import ctypes
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import capitable
import s2shadow

INCLUDE = Path(s2shadow.get_include())
HEADER = INCLUDE / "s2shadow" / "s2shadow.h"
PXD = Path(s2shadow.__file__).parent / "__init__.pxd"
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ctypes_call.py"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{INCLUDE}"]
PYTHON_H = f"-I{sysconfig.get_path('include')}"

needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
needs_cxx = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


def compile_text(tmp_path, compiler, text, *options):
    source = tmp_path / "unit.c"
    source.write_text(text)
    done = subprocess.run([*compiler, *STRICT, *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("python_h", ["", "#include <Python.h>\n"], ids=["alone", "with Python.h"])
@pytest.mark.parametrize("compiler", [
    pytest.param(["cc", "-std=c11", "-xc"], marks=needs_cc, id="c11"),
    pytest.param(["c++", "-std=c++17", "-xc++"], marks=needs_cxx, id="c++17"),
])
def test_header_compiles_without_a_warning(tmp_path, compiler, python_h):
    use = "s2s_import() != NULL && s2s_from_python(NULL) == NULL" if python_h else "S2S_OK"
    text = f'{python_h}#include "s2shadow/s2shadow.h"\nint use(void);\nint use(void) {{ return {use}; }}\n'
    compile_text(tmp_path, compiler, text, PYTHON_H, "-c", "-o", str(tmp_path / "unit.o"))


def expressions(tmp_path, wanted):
    """What a C compiler says that integer expressions are."""
    prints = "\n".join(f'printf("%lld\\n", (long long)({e}));' for e in wanted)
    text = f'#include <stdio.h>\n#include "s2shadow/s2shadow.h"\nint main(void) {{ {prints} return 0; }}\n'
    compile_text(tmp_path, ["cc", "-std=c11", "-xc"], text, "-o", str(tmp_path / "unit"))
    done = subprocess.run([tmp_path / "unit"], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


STRUCTS = {"features": capitable.Features, "options": capitable.Options, "registers": capitable.Registers,
           "mapping": capitable.Mapping, "populate": capitable.Populate, "memory_ops": capitable.MemoryOps,
           "stats": capitable.Stats, "fault": capitable.Fault, "walk": capitable.Walk, "hw_tlbi": capitable.HwTlbi,
           "change": capitable.Change, "tlbi_result": capitable.TlbiResult, "api": capitable.Table}


@needs_cc
@pytest.mark.parametrize("name", STRUCTS)
def test_ctypes_structs_are_those_of_the_header(tmp_path, name):
    struct, c_name = STRUCTS[name], f"s2s_{name}_t"
    fields = [field[0] for field in struct._fields_]
    size, *places = expressions(tmp_path, [f"sizeof({c_name})", *(f"offsetof({c_name}, {f})" for f in fields)])
    assert size == ctypes.sizeof(struct)
    assert places == [getattr(struct, f).offset for f in fields]


@needs_cc
@pytest.mark.parametrize("name, dtype", [("fault", s2shadow.FAULT_DTYPE), ("walk", s2shadow.WALK_DTYPE),
                                         ("hw_tlbi", s2shadow.HW_TLBI_DTYPE)])
def test_rows_are_those_of_the_arrays(tmp_path, name, dtype):
    c_name = f"s2s_{name}_t"
    size, *places = expressions(tmp_path, [f"sizeof({c_name})", *(f"offsetof({c_name}, {f})" for f in dtype.names)])
    assert size == dtype.itemsize
    assert places == [dtype.fields[f][1] for f in dtype.names]


@needs_cc
def test_constants_are_those_of_python(tmp_path):
    names = [*(f"S2S_{kind.name}" for kind in s2shadow.Kind), *(f"S2S_{access.name}" for access in s2shadow.Access),
             *(f"S2S_HCR_{name}" for name in ("VM", "PTW", "DC", "CD", "FWB"))]
    values = [*s2shadow.Kind, *s2shadow.Access,
              *(getattr(s2shadow, f"HCR_{name}") for name in ("VM", "PTW", "DC", "CD", "FWB"))]
    assert expressions(tmp_path, names) == [int(value) for value in values]
    policies = [f"S2S_TEARDOWN_{name.upper().replace('-', '_')}" for name in s2shadow.TEARDOWNS]
    assert expressions(tmp_path, policies) == list(range(len(policies)))


def without_comments(path):
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r"#.*", "", text) if path.suffix == ".pxd" else text


def table_functions(path):
    text = without_comments(path)
    return re.findall(r"\(\*(\w+)\)\(", text[text.index("uint32_t abi_version") :])


def test_the_table_is_the_same_for_c_cython_and_ctypes():
    functions = table_functions(HEADER)
    assert functions == table_functions(PXD) == list(capitable.FUNCTIONS)
    shown = re.findall(r'^    \("(\w+)", ', EXAMPLE.read_text(), re.M)
    assert len(shown) > 10 and shown == functions[: len(shown)]


def test_cython_sees_every_name_of_the_header():
    header, pxd = without_comments(HEADER), without_comments(PXD)
    names = set(re.findall(r"\b(?:S2S|s2s|S2SHADOW)_\w+", header))
    internal = {"S2S_STATIC_ASSERT", "S2SHADOW_H"}
    tags = set(re.findall(r"(?:struct) (s2s_\w+)", header))
    missing = names - internal - tags - set(re.findall(r"\b(?:S2S|s2s|S2SHADOW)_\w+", pxd))
    assert not missing


def test_table_says_what_it_is():
    assert capitable.api.size == ctypes.sizeof(capitable.Table)
    assert capitable.api.abi_version == 1 << 16
    assert all(getattr(capitable.api, name) for name in capitable.FUNCTIONS)


def test_cflags_find_the_header(capsys):
    from s2shadow.cli import main

    assert main(["--cflags"]) == 0
    assert capsys.readouterr().out == f"-I{INCLUDE}\n"
    assert HEADER.is_file()
