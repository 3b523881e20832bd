"""Write files beside a job's store: one per photograph, named after it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dvt.cli.common import save_json, shown
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.images.members import member_title
from dvt.schema import read_json
from dvt.text import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: The longest part of an image's name that is used; with hash, suffix and ".part", a name has fewer than 255 bytes.
_STEM_BYTES = 160


def names_beside(paths: Sequence[Path | str]) -> dict[Path, str]:
    """Name the file that is written for each image: its stem and a hash of its path.

    So names do not change when images are added, no two images share one, and all fit into the 255 bytes of a file
    name.
    """
    return {path: _lasting_name(path) for path in map(Path, paths)}


def _lasting_name(path: Path) -> str:
    stem = os.fsencode(member_title(path))[:_STEM_BYTES].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def write_index(
    console: Console, folder: Path, names: Mapping[Path, str], suffix: str, failed: Iterable[tuple[str, str]] = ()
) -> None:
    """Add each file and its image to FOLDER/index.json, keep earlier runs' entries, and report missing files.

    A file is missing if its image was in the store already; images that failed have been reported.
    """
    target = folder / "index.json"
    kept = _earlier(console, target)
    files = {f"{name}{suffix}": str(path) for path, name in names.items()}
    found = {file: path for file, path in files.items() if (folder / file).exists()}
    if found:
        save_json(target, {**kept, **found})
        console.print(f"{folder.name}: {shown(str(folder))}")
    unusable = {path for path, _ in failed}
    if missing := sum(path not in unusable for file, path in files.items() if file not in found):
        console.print(
            f"[yellow]no file for {missing} of {counted(len(files), 'image')} in {shown(str(folder))}[/]: files beside "
            "the store are written when an image is computed, and not for one in the store already; give another "
            "--out to get all files"
        )


def clear_beside(out: Path) -> None:
    """Remove the files beside a store that earlier runs listed, and their lists; other files stay."""
    for folder in (out / "pictures", out / "upsampled"):
        try:
            listed = read_json(folder / "index.json")
        except (OSError, ConfigError):  # no list, so nothing is known to be ours
            continue
        for name in listed if isinstance(listed, dict) else ():
            if Path(name).name == name:  # a list of a stranger must not lead elsewhere
                (folder / name).unlink(missing_ok=True)
        (folder / "index.json").unlink()


def _earlier(console: Console, index: Path) -> dict[str, str]:
    """Read what earlier runs wrote into an index; one that cannot be read is told, and begun anew."""
    try:
        kept = read_json(index) if index.exists() else {}
    except (OSError, ConfigError):
        kept = None
    if isinstance(kept, dict):
        return kept
    console.print(f"[yellow]{shown(str(index))} cannot be read[/]: it is written anew, with the files of this run only")
    return {}


def fine_suffix(factor: int, upsampler: str | None = None) -> str:
    """Name the end of a file of finer features, so that factors and ways to upsample do not share files."""
    return f"-x{factor}.npy" if upsampler is None else f"-x{factor}-anyup.npy"


def load_upsampler(source: str | None, device: torch.device) -> Callable[[Tensor, Tensor, int, Tensor], Tensor]:
    """Make a function of (tokens, image, factor, patch centres) that upsamples; with a source, by AnyUp."""
    if source is None:
        from dvt.upsampling import upsample

        return lambda tokens, image, factor, centres: upsample(tokens, image, factor, centres=centres)
    from dvt.denoiser.anyup import AnyUp

    learned = AnyUp.load(source).to(device)
    return lambda tokens, image, factor, centres: learned.upsample(tokens, image, factor)


def check_upsample(factor: int, ray: str | None, upsampler: str | None = None) -> None:
    """Refuse a factor out of range, and upsampling on a cluster, whose workers do not write beside the store."""
    if upsampler is not None and factor == 1:
        raise ConfigError(f"--upsampler {upsampler} says how to upsample; give a factor by --upsample, too")
    if factor < 1:
        raise ConfigError(f"upsample is {factor}; it must be 1 or more")
    if factor > 1 and ray is not None:
        raise ConfigError("--upsample writes files beside the store, but the workers of --ray cannot; leave one out")


def write_map(target: Path, values: Tensor) -> None:
    """Write an .npy file, in half precision if the values fit into it; the file is whole or absent."""
    import numpy as np

    array = values.detach().cpu().numpy()
    with whole_file(target) as part, open(part, "wb") as file:
        np.save(file, array.astype(np.float16) if abs(array).max() < 65504 else array)
