"""A table of what the fault tests tried: attacks by command, with counts.

DVT_ATTACKS=attacks.jsonl python -m pytest tests/faults
python benchmarks/attacks.py attacks.jsonl

Prints Markdown, a row a test: how many runs of each command it made, those that were let alone for comparison included,
and "cases" for files that were handed to functions. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

#: Commands that have a column; the others are summed in the one before the last.
COLUMNS = ("extract", "denoise", "train", "distill", "prior train", "probe", "analyze", "export", "store export")
OTHERS, CASES = "others", "cases"
#: Counted under these names are files that were handed to functions.
READERS = ("images", "lists", "stores", "weights", "runs", "readers")


def column(name: str) -> str:
    """Find the column of a command, or of a kind of file."""
    return name if name in COLUMNS else CASES if name in READERS else OTHERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+")
    lines = [json.loads(line) for path in parser.parse_args().lines for line in path.read_text().splitlines()]
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    ended = Counter(line["ended"] for line in lines)
    for line in lines:
        if line["ended"] == "passed":
            row = counts[line["file"].removeprefix("test_"), line["attack"].removeprefix("test_").replace("_", " ")]
            row["tests"] += 1
            for name, count in line["runs"].items():
                row[column(name)] += count
    columns = ("tests", *COLUMNS, OTHERS, CASES)
    print(f"| | attack | {' | '.join(columns)} |\n|---|---|{'---:|' * len(columns)}")
    total: Counter[str] = Counter()
    for (file, attack), row in sorted(counts.items()):
        print(f"| {file} | {attack} | {' | '.join(str(row[name] or '') for name in columns)} |")
        total += row
    print(f"| | all | {' | '.join(str(total[name]) for name in columns)} |")
    print(json.dumps({"benchmark": "attacks", "ended": ended, "all": total}))


if __name__ == "__main__":
    main()
