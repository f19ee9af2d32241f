"""``python -m s2shadow``."""

from s2shadow.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
