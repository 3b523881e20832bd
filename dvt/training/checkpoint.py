"""Write and check checkpoints, which are whole or absent and which only the same run continues."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import load_file, save_file
from torch import Tensor

from dvt.errors import ConfigError
from dvt.files import (
    check_regular,
    open_lock,
    remove,
    remove_dead,
    remove_parts,
    renamed_away,
    replaced_folder,
    take_lock,
)
from dvt.schema import read_json, typed
from dvt.text import differing
from dvt.training.config import TrainingConfig

_NAME = re.compile(r"step-(\d{8,})")
# These settings do not change the weights, so a run may be continued with other values.
_FREE = ("checkpoint_every", "log_every", "validate_every", "keep", "trackers")


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one run at a time use a folder, and remove files that a killed run left half written.

    The lock is POSIX's (fcntl), which the kernel releases when its process dies; it does not exclude threads of the
    same process. Partial files are removed only with the lock held, so they cannot be those of a living run.

    Raises:
        ConfigError: another process holds the lock, nothing can be written there, or the folder's name is not UTF-8.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeError as error:  # safetensors would write files to such a folder, but could not read them
        raise ConfigError(f"the name of the folder {str(folder)!r} is not UTF-8; choose another") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = open_lock(folder / "run.lock")
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {str(folder)!r}: {error.strerror or error}") from error
    try:
        try:
            mine = take_lock(fd)
        except OSError as error:
            raise ConfigError(f"cannot write to the folder {str(folder)!r}: {error.strerror or error}") from error
        if not mine:
            raise ConfigError(f"another process trains in {str(folder)!r}; wait, or choose another folder")
        remove_parts(folder, "step-*")
        remove_dead(folder)  # a file that was whole when its writer was killed is not written again
        yield
    finally:
        os.close(fd)


def run_identity(config: TrainingConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """List all settings that change a run's weights, as JSON values; a checkpoint continues only if they are equal.

    Its keys and values are part of the format of checkpoints, so that runs of earlier versions can be continued.

    Raises:
        ConfigError: a setting is not a JSON value.
    """
    plain = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE}
    plain["learning_rate"] = config.peak_rate
    try:
        return json.loads(json.dumps({"config": plain, "settings": dict(settings)}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the settings of a run must be plain JSON values: {error}") from error


class _CheckpointAbout(TypedDict):
    """Type a checkpoint's state.json."""

    step: int
    config: dict[str, Any]
    settings: dict[str, Any]
    scaler: dict[str, float] | None


def read_about(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself.

    Raises:
        OSError, ConfigError: it cannot be read, or is no such description.
    """
    about = dict(typed(_CheckpointAbout, read_json(checkpoint / "state.json")))
    if checkpoint.name != f"step-{about['step']:08}":
        raise ConfigError("its state.json belongs to another step")
    return about


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors "model", "ema" or "optimizer" of a checkpoint.

    Raises:
        OSError, SafetensorError: they cannot be read.
    """
    path = checkpoint / f"{name}.safetensors"
    check_regular(path)
    return load_file(path)


def check_identity(about: Mapping[str, Any], identity: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint of a run with other settings.

    Raises:
        ConfigError: the settings differ; the message names each difference.
    """
    theirs, mine = ({**a.get("config", {}), **a.get("settings", {})} for a in (about, identity))
    if changed := differing(dict(sorted(theirs.items())), dict(sorted(mine.items()))):
        raise ConfigError(
            f"{str(checkpoint.parent)!r} holds a run with other settings: {changed}. Continue it with its own "
            "(--resume), begin anew in its place (--overwrite), or choose another folder"
        )


def flat_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten an identity for trackers: plain values by name."""
    values = {**identity["config"], **identity["settings"]}
    return {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in values.items()}


def write_checkpoint(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
    """Write a checkpoint's folder, which gets its name only when all of it is on the disk."""
    with replaced_folder(target) as part:
        for name, values in tensors.items():
            # Copy, because safetensors refuses tensors that share memory.
            copies = {k: v.detach().cpu().clone().contiguous() for k, v in values.items()}
            save_file(copies, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps(about, indent=1))


def checkpoints_in(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest last."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run."""
    return next(reversed(checkpoints_in(folder)), None)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all checkpoints except the newest ones."""
    for old in checkpoints_in(folder)[:-keep]:
        remove(renamed_away(old))


def check_same(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check that tensors have the same names, shapes and types as others, and are finite.

    Raises:
        ValueError: they differ; the message says in what.
    """
    if values.keys() != like.keys():
        raise ValueError(f"it holds {sorted(values)[:4]} instead of {sorted(like)[:4]}")
    for name, value in values.items():
        if (value.shape, value.dtype) != (like[name].shape, like[name].dtype):
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype} instead of {tuple(like[name].shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def damaged(checkpoint: Path, error: Exception) -> str:
    """Word the message for a checkpoint that cannot be used."""
    return (
        f"the checkpoint {str(checkpoint)!r} is damaged, or belongs to another model ({error}); delete it to continue "
        "from the previous one"
    )
