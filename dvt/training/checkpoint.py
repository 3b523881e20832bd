"""Checkpoints that are whole or absent, and that only the same run continues."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

_NAME = re.compile(r"step-(\d{8,})")


# Changing these changes no weight, so a run may be continued with others.
_FREE = ("checkpoint_every", "log_every", "validate_every", "keep", "trackers")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One run a folder; a POSIX lock dies with its process. What a killed run left half written is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "run.lock", "a")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {str(folder)!r}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"another process trains in {str(folder)!r}; wait, or choose another folder") from error
        for part in folder.glob("step-*.part"):
            shutil.rmtree(part, ignore_errors=True)
        yield


def _identity(config: TrainingConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE}
    try:
        return json.loads(json.dumps({"config": plain, "settings": dict(settings)}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the settings of a run must be plain JSON values: {error}") from error


def _compare(about: Mapping[str, Any], identity: Mapping[str, Any], checkpoint: Path) -> None:
    theirs, mine = ({**a.get("config", {}), **a.get("settings", {})} for a in (about, identity))
    names = sorted(theirs.keys() | mine.keys())
    changed = [
        f"{name} {theirs.get(name, 'unset')!r} there, {mine.get(name, 'unset')!r} here"
        for name in names
        if theirs.get(name, "unset") != mine.get(name, "unset")
    ]
    if changed:
        raise ConfigError(
            f"{str(checkpoint.parent)!r} holds a run with other settings ({', '.join(changed)}); continue it with the "
            "same ones, or choose another folder"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    values = {**identity["config"], **identity["settings"]}
    return {k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in values.items()}


def _write(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
    """A checkpoint's folder, on the disk under its name only when all of it is."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, values in tensors.items():
        # Copies, because safetensors refuses tensors that share memory.
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in values.items()}, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(about, indent=1))
    for file in (*part.iterdir(), part):
        _sync(file)
    os.replace(part, target)
    _sync(target.parent)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def _latest(folder: Path) -> Path | None:
    return next(reversed(_checkpoints(folder)), None)


def _prune(folder: Path, keep: int) -> None:
    for old in _checkpoints(folder)[:-keep]:
        gone = old.with_name(f"{old.name}.part")  # renamed first: half a folder must not look like a checkpoint
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _load_moments(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    # Numbered as torch does it; some have no moments, because they never had a gradient.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        parameter, step = parameters[index], torch.zeros(())
        _check_same(values, {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_same(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """That tensors have the names, shapes and types of others, and are finite."""
    if values.keys() != like.keys():
        raise ValueError(f"it holds {sorted(values)[:4]} instead of {sorted(like)[:4]}")
    for name, value in values.items():
        if (value.shape, value.dtype) != (like[name].shape, like[name].dtype):
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype} instead of {tuple(like[name].shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def _damaged(checkpoint: Path, error: Exception) -> str:
    return (
        f"the checkpoint {str(checkpoint)!r} is damaged, or of another model ({error}); delete it to go on from the "
        "one before"
    )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
