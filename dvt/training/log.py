"""Write the log of a training run, log.csv."""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from pathlib import Path

from dvt.errors import ConfigError, WeightsError
from dvt.files import read_plain, sync_path, whole_file

_MOST_BYTES = 1 << 30  # of a log: ten million rows

#: One row of log.csv: "step", "lr", and further numbers by name.
LogRow = dict[str, float]


class RunLog:
    """Write log.csv; when a run continues from a step, keep the rows up to that step and drop later ones."""

    def __init__(self, path: Path, step: int, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.rows = [row for row in _read_rows(path) if row["step"] <= step] if step else []
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if writes:
            self._rewrite()

    def append(self, row: LogRow) -> None:
        """Add a row; if it has new names, rewrite the file with more columns."""
        self.rows.append(row)
        if not self.writes:
            return
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(row)
            except OSError as error:
                raise ConfigError(
                    f"cannot write {str(self.path)!r}: {error.strerror or error}; make room and run the same command "
                    "again, which continues from the last checkpoint"
                ) from error

    def sync(self) -> None:
        """Force the rows to the disk; call it before each checkpoint, so that no checkpoint is newer than the log."""
        sync_path(self.path)

    def _rewrite(self) -> None:
        with whole_file(self.path) as part:
            with open(part, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)
            sync_path(part)


def _read_rows(path: Path) -> list[LogRow]:
    """Read the complete rows of a log; a killed process may have left half a row at the end."""
    if not path.is_file():
        return []
    try:
        content = read_plain(path, _MOST_BYTES).decode(errors="replace")
        header, *lines = list(csv.reader(io.StringIO(content, newline=""))) or [[]]
    except (OSError, csv.Error) as error:
        raise WeightsError(f"cannot read the log {str(path)!r}: {error}; delete it to continue without it") from error
    rows: list[LogRow] = []
    for line in lines:
        if header[:1] == ["step"] and len(line) == len(header) and line[0]:
            with suppress(ValueError):
                pairs = zip(header, line, strict=True)
                rows.append({k: int(v) if k == "step" else float(v) for k, v in pairs if v})
    return rows
