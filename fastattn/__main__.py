"""python -m fastattn info | check | support | bench"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import fastattn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=fastattn.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="what was built, and what this machine can run")
    commands.add_parser("check", help="every kernel that runs here against the reference")
    commands.add_parser("support", help="which feature runs where, tried out, in Markdown")
    commands.add_parser(
        "bench", help="the benchmarks, from a clone (bench --help: theirs)", add_help=False
    )
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return bench(others)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if arguments.command == "check":
        from fastattn.check import run_check

        return 0 if run_check() else 1
    if arguments.command == "support":
        from fastattn.support import support

        print(support(), end="")
    else:
        print(fastattn.info())
    return 0


def bench(arguments: list[str]) -> int:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"
    if not script.exists():
        print("the benchmarks are not installed: run them from a clone, by `make bench`")
        return 1
    sys.path.insert(0, str(script.parent))
    main = runpy.run_path(str(script))["main"]
    return int(main(arguments))


if __name__ == "__main__":
    sys.exit(main())
