"""Write and read the report of an analysis: a table with nulls and intervals, and the data behind its pictures.

A folder holds, schema ``dvt-report/1``,

    report.json    schema, version, config, backbones, images, seconds, rows, and the index of data.npz with its SHA-256
    data.npz       NumPy arrays without pickles (below)
    table.txt  table.md  table.csv
    position.png  norms.png  pca.png  layers.png

``rows`` are the fields of :class:`dvt.analysis.metrics.scores.Row`. The index has four lists, each entry naming its
array:

    jpegs       {array, image}: uint8 bytes of a JPEG of each image shown; `image` is an index of `images`
    maps        {array, image, backbone, layer, variant, scale}: int8 (h, w, D), times `scale` the token map without
                its mean over positions, in D directions that all variants and images of one backbone and layer share.
                So cosines and mixtures of variants can be computed from it.
    positions   {array, backbone, layer, variant}: float32 (h, w), norm of the artifact G at each position
    norms       {array, backbone, layer, variant, edges}: int64 counts of token norms between float64 `edges`
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import dvt
from dvt.analysis.findings import Findings
from dvt.analysis.metrics.scores import METRICS, Row
from dvt.analysis.stored import ReportContent, read_arrays
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.schema import read_json, typed

REPORT_SCHEMA = "dvt-report/1"


class Report(Findings):
    """Hold the findings of :func:`dvt.analysis.analyze`; write them to a folder and read them back."""

    def to_json(self, data_sha256: str | None = None) -> dict[str, Any]:
        """Return everything but the arrays, ready for JSON, with the hash of the arrays' file if it is given."""
        return {
            "schema": REPORT_SCHEMA,
            "version": dvt.__version__,
            "config": self.config,
            "backbones": self.backbones,
            "images": self.images,
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
            "index": self.index,
            **({} if data_sha256 is None else {"data_sha256": data_sha256}),
        }

    def save(self, folder: str | Path) -> Path:
        """Write the folder that the module's documentation describes; each existing file is replaced atomically.

        Raises:
            ConfigError: the folder cannot be written.
        """
        from dvt.analysis.page.plots import save_plots

        folder = Path(folder)
        data = io.BytesIO()
        np.savez_compressed(data, **self.arrays)  # type: ignore[arg-type]
        texts = {
            "table.txt": self.to_text() + "\n",
            "table.md": self.to_markdown(),
            "table.csv": self.to_csv(),
            # Written last: it holds the hash of data.npz, so load refuses a report that was interrupted before.
            "report.json": json.dumps(self.to_json(sha256(data.getvalue()).hexdigest()), indent=1, allow_nan=False)
            + "\n",
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_plots(self, folder)
            for name, content in {"data.npz": data.getvalue(), **{n: t.encode() for n, t in texts.items()}}.items():
                with whole_file(folder / name) as part:
                    part.write_bytes(content)
        except OSError as error:
            raise ConfigError(f"cannot write the report to {str(folder)!r}: {error.strerror or error}") from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read a report from a folder.

        Raises:
            ConfigError: the folder holds no report of this schema, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / "report.json").is_file():
            raise ConfigError(
                f"{str(folder)!r} holds no report.json, so it is no folder of `dvt analyze`; make it with "
                "`dvt analyze IMAGES... --out DIR`"
            )
        try:
            content = read_json(folder / "report.json")
            if not isinstance(content, dict) or content.get("schema") != REPORT_SCHEMA:
                given = content.get("schema") if isinstance(content, dict) else None
                raise ConfigError(
                    f"{str(folder)!r} holds a report of schema {given!r}; this version reads {REPORT_SCHEMA!r}"
                )
            content = typed(ReportContent, content)
            rows = [typed(Row, row) for row in content["rows"]]
            if unknown := {row.metric for row in rows} - METRICS.keys():
                raise ConfigError(f"the report has rows of unknown metrics: {sorted(unknown)[:3]}")
            names = {entry["array"] for entries in content["index"].values() for entry in entries}  # type: ignore[attr-defined]
            arrays = read_arrays(folder / "data.npz", names, content.get("data_sha256"))
            kept = {name: content[name] for name in ("images", "backbones", "seconds", "config", "index")}
            return cls(rows, **kept, arrays=arrays)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(
                f"cannot use the report in {str(folder)!r}: {error}; make it with `dvt analyze IMAGES... --out DIR`"
            ) from error
        except Exception as error:  # a zip or a JSON file can be damaged in nearly any way
            raise ConfigError(
                f"{str(folder)!r} is not a readable report ({type(error).__name__}: {error}); "
                "make it with `dvt analyze IMAGES... --out DIR`"
            ) from error
