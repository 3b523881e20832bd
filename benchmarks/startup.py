"""What the command line costs before it does anything: help, a version and a mistake, against `python -c pass`.

python benchmarks/startup.py --rounds 5

Processor time of child processes; rounds alternate, so that all meet the same machine. The last line of the output is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from tables import table

LINES = {
    "--help": ["--help"],
    "--version": ["--version"],
    "a typo": ["denoize"],
    "denoise --help": ["denoise", "--help"],
    "probe --help": ["probe", "--help"],
    "prior train --help": ["prior", "train", "--help"],
}
SLOWEST = 5  # imports that are named


def seconds(arguments: list[str]) -> float:
    """Processor time of one Python process."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def slowest_imports(arguments: list[str]) -> list[dict[str, object]]:
    """The top-level packages that cost most, by `-X importtime`, each without what it imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True)
    spent: dict[str, int] = {}
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and parts[0].strip().isdigit():
            package = parts[2].strip().partition(".")[0]
            spent[package] = spent.get(package, 0) + int(parts[0])
    ranked = sorted(spent.items(), key=lambda each: -each[1])[:SLOWEST]
    return [{"package": package, "ms": round(micro / 1000, 1)} for package, micro in ranked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[float]] = {name: [] for name in ("python -c pass", *LINES)}
    for _ in range(rounds):
        taken["python -c pass"].append(seconds(["-c", "pass"]))
        for name, line in LINES.items():
            taken[name].append(seconds(["-m", "dvt", *line]))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    rows = [
        {"command line": name, "seconds": value, "over python": value / medians["python -c pass"]}
        for name, value in medians.items()
    ]
    table(f"processor time, median of {rounds}", rows)
    table("imports of `dvt denoise --help`", slowest_imports(["-m", "dvt", "denoise", "--help"]))
    print(json.dumps({"benchmark": "startup", "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    main()
