"""Files that a job writes beside its store: one a photograph, named after it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dvt.cli.common import save_json, shown
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.images import is_url

if TYPE_CHECKING:
    from torch import Tensor

#: Of an image's name; with hash and suffix, and those of a file that is being written, a name has fewer than 255.
_STEM_BYTES = 160


def names_beside(paths: Sequence[Path | str]) -> dict[Path, str]:
    """Name what is written for each image: by its stem and a hash of its path, whatever other images there are.

    So a name stays when images are added, two images never share one, and it fits into the 255 bytes of a file name.
    """
    return {path: _lasting_name(path) for path in map(Path, paths)}


def _lasting_name(path: Path) -> str:
    stem = os.fsencode(path.stem)[:_STEM_BYTES].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def write_index(console: Console, folder: Path, names: Mapping[Path, str], suffix: str) -> None:
    """Write FOLDER/index.json, the image of each file, beside what earlier runs wrote into it, and say what is missing.

    Missing are the files of images that were in the store already.
    """
    target = folder / "index.json"
    try:
        kept = json.loads(target.read_bytes())
    except (OSError, ValueError):
        kept = {}
    files = {f"{name}{suffix}": str(path) for path, name in names.items()}
    found = {file: path for file, path in files.items() if (folder / file).exists()}
    if found:
        save_json(target, {**(kept if isinstance(kept, dict) else {}), **found})
    if missing := len(files) - len(found):
        console.print(
            f"[yellow]{missing} of {len(files)} images have no file in {shown(str(folder))}[/]: files beside the "
            "store are written when an image is computed, and these were in the store already or failed; another "
            "--out has them all"
        )


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
