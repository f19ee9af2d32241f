"""One target under libFuzzer (atheris): python fuzz/run.py TARGET [options of libFuzzer] [CORPUS]…

The Python of the tools is instrumented as it is imported; the compiled modules are, if they were built so
(``.ci/long/fuzz``).
"""

import sys

import atheris

atheris.enabled_hooks.add("str")        # what text is compared with is known to the mutator
with atheris.instrument_imports(include=["s2shadow", "targets"]):
    import targets


def main() -> None:
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
