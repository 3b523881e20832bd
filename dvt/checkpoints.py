"""Weights read from a file: never unpickled, unwrapped, compared with the model, finite."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvt.errors import WeightsError

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

#: Names under which training scripts store the state dict, tried in this order.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "teacher")
#: Prefixes that data-parallel, compiled and wrapped models leave before every name.
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.")
#: The classifier: dvt builds models without one.
HEAD = re.compile(r"^(head|head_dist|fc|classifier)\.")
SHOWN = 4


def read_state(path: str | Path) -> State:
    """The tensors of a weights file, by name.

    Args:
        path: a .safetensors file, or a .pth, .pt or .bin file of tensors, which is read with ``weights_only=True``:
            code in it is never run.

    Raises:
        WeightsError: the file is missing, unreadable, damaged, holds pickled code or holds no tensors.
    """
    path = Path(path)
    return _unwrap(read_content(path), path)


def read_content(path: Path) -> object:
    """What a weights file holds, wrappers and all; code in it is never run. Raises as :func:`read_state`."""
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}; give the path of a .safetensors file or of a .pth of tensors")
    readers: dict[str, Callable[[Path], object]] = dict.fromkeys((".pth", ".pt", ".bin"), _load_tensors)
    readers[".safetensors"] = load_file
    if path.suffix not in readers:
        raise WeightsError(f"{path} ends in {path.suffix!r}; weights are read from {', '.join(readers)} files")
    try:
        return readers[path.suffix](path)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds pickled objects beside tensors, or is damaged; dvt does not unpickle. Save its state dict "
            "with safetensors.torch.save_file, where you trust the file"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"cannot read weights from {path}: {error}; the file is damaged or unreadable") from error


def _load_tensors(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: object, path: Path) -> State:
    """The flat state dict inside a checkpoint: wrappers opened, a prefix common to all names removed."""
    while isinstance(content, Mapping) and (inner := next((w for w in WRAPPERS if _is_dict(content.get(w))), None)):
        content = content[inner]
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise WeightsError(f"{path} holds no named tensors; a state dict is needed, plain or under one of {WRAPPERS}")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file whole or not at all, with the permissions that the user's other files get.

    Raises:
        WeightsError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    state = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # safetensors writes for the owner alone
        save_file(state, part, metadata=dict(metadata))
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise WeightsError(f"cannot write {str(path)!r}: {error}; choose a folder that can be written to") from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a model without a classifier; heads and other unknown names are left out.

    Args:
        model: keeps its own dtype; the values are cast to it.
        state: tensors by the model's names.
        source: what to call the weights in errors.

    Raises:
        WeightsError: names are missing, shapes differ, or values are NaN or infinite; the first few are named.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} of the {len(own)} tensors of the model: {_first(missing)}; "
            "are these the weights of another architecture?"
        )
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if state[name].shape != own[name].shape
    ]
    if shapes:
        raise WeightsError(f"{source} holds {len(shapes)} tensors of another shape: {_first(shapes)}")
    used = {name: state[name].to(own[name].dtype) for name in own}
    # Checked after the cast, because a value may leave the range of the model's dtype.
    bad = [name for name, value in used.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise WeightsError(f"{source} holds NaN or infinity in {len(bad)} tensors: {_first(bad)}")
    extra = [name for name in state if name not in own and not HEAD.match(name)]
    if extra:
        logger.warning(
            "%s: %d tensors are not part of the model and are left out: %s", source, len(extra), _first(extra)
        )
    model.load_state_dict(used)


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
