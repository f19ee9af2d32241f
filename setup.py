"""Extension modules and compiler directives; everything else is in pyproject.toml.

S2SHADOW_CHECKED=1                     bounds, None and initialisation checks, C assertions
S2SHADOW_SANITIZE=address,undefined    one -fsanitize=… for each, with frame pointers and line numbers
S2SHADOW_STRESS=1                      locks are let go as often as possible: chunks of two leaves, one fault;
                                       steps that are lock-free are held open
CFLAGS                                 where set, replaces -O2 -g0

A module that asks for C++ (``# distutils: language = c++``) is built with the same options.
"""

import os
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

CHECKED = os.environ.get("S2SHADOW_CHECKED", "0") not in ("", "0")
STRESS = os.environ.get("S2SHADOW_STRESS", "0") not in ("", "0")
SANITIZE = [f"-fsanitize={name}" for name in os.environ.get("S2SHADOW_SANITIZE", "").split(",") if name]

QUIET = ["-Wno-unused-function", "-Wno-sign-compare"]  # generated code only
compile_args = QUIET if "CFLAGS" in os.environ else ["-O2", "-g0", *QUIET]
if CHECKED:
    compile_args = [*compile_args, "-UNDEBUG"]
if STRESS:
    compile_args = [*compile_args, "-DS2SHADOW_STRESS"]
if SANITIZE:
    compile_args = [*compile_args, "-g1", "-fno-omit-frame-pointer", *SANITIZE]

directives = {
    "language_level": 3,
    "boundscheck": CHECKED,
    "initializedcheck": CHECKED,
    "nonecheck": CHECKED,
    "wraparound": False,
    "cdivision": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "freethreading_compatible": True,
}
extensions = [
    Extension(
        ".".join(path.with_suffix("").parts),
        [path.as_posix()],
        extra_compile_args=compile_args,
        # the small functions of the rooms below are meant to vanish into the hot ones, whatever a compiler's limits say
        define_macros=[
            ("CYTHON_INLINE", "inline __attribute__((always_inline))"),
            ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
        ],
        include_dirs=["s2shadow/include", numpy.get_include()],
        extra_link_args=["-pthread", *SANITIZE],
    )
    for path in sorted(Path("s2shadow").rglob("*.pyx"))
]

if __name__ == "__main__":  # cythonize's worker processes may import this file
    setup(
        ext_modules=cythonize(
            extensions,
            # away from the sources, and apart, since cythonize compares times and not directives
            build_dir="build/cython-checked" if CHECKED else "build/cython",
            nthreads=2,
            compiler_directives=directives,
        ),
        options={"build_ext": {"parallel": os.cpu_count()}},
    )
