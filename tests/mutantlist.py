"""The list of mistakes to make in the engine on purpose, tests/mutants/mutants.toml."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutants" / "mutants.toml"


@dataclass(frozen=True)
class Mutant:
    """One mistake: ``find`` stands in ``file`` once, and ``replace`` takes its place."""

    name: str
    file: str
    find: str
    replace: str
    rule: str
    tests: list[str]

    def mutated(self, root: Path) -> str:
        """The text of the file with the mistake in it; ``ValueError`` if the list has gone stale."""
        text = (root / self.file).read_text()
        if (count := text.count(self.find)) != 1:
            raise ValueError(f"{self.name}: {self.find!r} stands in {self.file} {count} times")
        return text.replace(self.find, self.replace)


def load(path: Path = LIST) -> list[Mutant]:
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]
