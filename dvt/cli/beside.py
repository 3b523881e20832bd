"""Files that a job writes beside its store: one a photograph, named after it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.images import is_url

if TYPE_CHECKING:
    from torch import Tensor


def names_beside(paths: Sequence[Path | str]) -> dict[Path, str]:
    """Name each image by its stem, with its number where several share one; no two get the same name."""
    stems = Counter(Path(path).stem for path in paths)
    names: dict[Path, str] = {}
    for number, path in enumerate(map(Path, paths)):
        name = path.stem if stems[path.stem] == 1 else f"{path.stem}-{number}"
        while name != path.stem and name in stems:
            name += "-"
        names[path] = name
    return names


def sources_outside(paths: Sequence[Path | str], folder: Path) -> list[Path | str]:
    """Remove what an earlier run wrote to a folder, where that lies among the images."""
    # Not Path.resolve, which stops at a symlink to itself.
    inside = Path(os.path.realpath(folder))
    return [path for path in paths if is_url(path) or inside not in Path(os.path.realpath(path)).parents]


def check_upsample(factor: int, ray: str | None) -> None:
    """Refuse a factor out of its range, and one that the workers of a cluster cannot write beside the store."""
    if factor < 1:
        raise ConfigError(f"upsample is {factor}; it must be 1 or more")
    if factor > 1 and ray is not None:
        raise ConfigError("--upsample writes beside the store, which workers of --ray cannot; leave one of them out")


def write_map(target: Path, values: Tensor) -> None:
    """Write an .npy file in half precision where that holds the values; it is whole or absent."""
    import numpy as np

    array = values.detach().cpu().numpy()
    with whole_file(target) as part, open(part, "wb") as file:
        np.save(file, array.astype(np.float16) if abs(array).max() < 65504 else array)
