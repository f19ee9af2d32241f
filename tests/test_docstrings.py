"""Every public name says what it is: docstrings at run time, signatures in the stubs."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import s2shadow

PACKAGE = Path(s2shadow.__file__).parent
MODULES = ("s2shadow", "s2shadow.capture", "s2shadow.dump", "s2shadow.embed.unicorn", "s2shadow.replay",
           "s2shadow.storm", "s2shadow.sweep", "s2shadow.trace")
# made by the class statement, dataclasses or namedtuple, not written for anybody to read
GENERATED = re.compile(r"Alias for field number|^\w+\([^)]*\)\s*(-> None)?$")


def exported(module):
    found = importlib.import_module(module)
    return [(module, name, getattr(found, name)) for name in found.__all__]


NAMES = [row for module in MODULES for row in exported(module)]
CLASSES = list({f"{thing.__module__}.{thing.__name__}": thing for _, _, thing in NAMES
                if inspect.isclass(thing) and thing.__module__.startswith("s2shadow")}.items())
FUNCTIONS = [(f"{module}.{name}", thing) for module, name, thing in NAMES
             if callable(thing) and not inspect.isclass(thing) and hasattr(thing, "__name__")]


def written(thing):
    """The docstring that somebody wrote, without the signature that Cython puts in front."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r"^[\w.]+\(.*?\)(?: -> \w+)?\n\n", "", text, count=1, flags=re.DOTALL)
    return "" if GENERATED.search(text) else text.strip()


def own_attributes(cls):
    for name, thing in vars(cls).items():
        if not name.startswith("_") and name not in getattr(cls, "__members__", ()):
            yield name, thing


def test_what_is_looked_at():
    assert len(CLASSES) > 40 and len(FUNCTIONS) > 25


@pytest.mark.parametrize(("name", "thing"), CLASSES + FUNCTIONS, ids=[name for name, _ in CLASSES + FUNCTIONS])
def test_public_names_have_docstrings(name, thing):
    assert len(written(thing)) >= 20, f"{name} has no docstring: {thing.__doc__!r}"
    assert written(thing)[-1] in ".:)=", f"{name}: the docstring is no sentence"


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=[name for name, _ in CLASSES])
def test_public_attributes_are_described(name, cls):
    """Methods and properties by their own docstrings; plain fields there or by name in that of the class."""
    bare = []
    for attribute, thing in own_attributes(cls):
        named = f"``{attribute}``" in (cls.__doc__ or "")
        is_method = inspect.isroutine(thing) and not inspect.isdatadescriptor(thing)
        if not written(thing) and (is_method or not named):
            bare.append(attribute)
    assert not bare, f"{name}: {bare} without a description"


@pytest.mark.parametrize(("name", "cls"), [(n, c) for n, c in CLASSES if hasattr(c, "__members__")],
                         ids=[n for n, c in CLASSES if hasattr(c, "__members__")])
def test_members_of_enumerations_are_described(name, cls):
    """In the docstring, or each by a comment of its own (``#:``, which goes into the pages too)."""
    described = set(re.findall(r"\w+", cls.__doc__ or ""))
    described |= set(re.findall(r"^ +(\w+) = \d+ +#: \S+", inspect.getsource(cls), re.MULTILINE))
    assert not set(cls.__members__) - described


def stub_signatures(stub):
    """name or Class.name -> parameters of what a stub defines; None for what is no function."""
    found = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = None
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    a = inner.args
                    found[f"{node.name}.{inner.name}"] = [p.arg for p in a.posonlyargs + a.args + a.kwonlyargs]
                elif isinstance(inner, ast.AnnAssign):
                    found[f"{node.name}.{inner.target.id}"] = None
        elif isinstance(node, ast.FunctionDef):
            a = node.args
            found[node.name] = [p.arg for p in a.posonlyargs + a.args + a.kwonlyargs]
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
    return found


COMPILED = [(module, name, thing) for module, name, thing in NAMES
            if (PACKAGE / f"{getattr(thing, '__module__', '').rpartition('.')[2]}.pyi").exists()]


@pytest.mark.parametrize(("name", "thing"), [(name, thing) for _, name, thing in COMPILED],
                         ids=[name for _, name, _ in COMPILED])
def test_stubs_have_the_signatures(name, thing):
    stub = stub_signatures(PACKAGE / f"{thing.__module__.rpartition('.')[2]}.pyi")
    assert name in stub
    if not inspect.isclass(thing):
        assert stub[name] == list(inspect.signature(thing).parameters)
        return
    for attribute, inner in own_attributes(thing):
        assert f"{name}.{attribute}" in stub
        if inspect.isroutine(inner) and not inspect.isdatadescriptor(inner):
            assert stub[f"{name}.{attribute}"] == list(inspect.signature(inner).parameters), attribute
