"""What the benchmarks share: aligned tables, intervals over seeds, the machine in words, and photographs to work on."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PHOTOS = Path(__file__).parents[1] / "dvt" / "data" / "photos"


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys as aligned columns."""
    cells = [list(rows[0]), *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and half the width of its 95 % t interval over seeds."""
    from scipy import stats  # like the others below, not for those who only print a table

    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half": math.nan}
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half": float(half)}


def described_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, so that a number can be read later."""
    import torch

    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def photographs(folder: Path, count: int, size: tuple[int, int] = (320, 480)) -> list[Path]:
    """JPEG files of one size (height, width), each another cut of a bundled photograph, so that no two are equal."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        source, step = sources[number % len(sources)], number // len(sources)
        scale = max((size[0] + step + 8) / source.height, (size[1] + step + 8) / source.width)
        larger = source.resize((math.ceil(source.width * scale), math.ceil(source.height * scale)), Image.LANCZOS)
        larger.crop((step, step, step + size[1], step + size[0])).save(path, quality=90)
    return paths
