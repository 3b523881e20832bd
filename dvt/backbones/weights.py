"""Read weights from a file without unpickling, unwrap them, and check them against the model."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvt.backbones.converted import State, encoder_state, unchunked
from dvt.errors import WeightsError
from dvt.files import check_regular, replaced, similar
from dvt.schema import parsed_json

logger = logging.getLogger(__name__)

#: Names under which training scripts store the state dict, tried in this order.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "teacher", "target_encoder", "student", "encoder")
#: Prefixes that data-parallel, compiled and wrapped models add to every name.
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.")
#: The classifier: dvt builds models without one.
HEAD = re.compile(r"^(head|head_dist|fc|classifier)\.")
SHOWN = 4


def read_state(path: str | Path) -> State:
    """Read the tensors of a weights file, by name.

    Args:
        path: a .safetensors file, or a .pth, .pt or .bin file of tensors, which is read with ``weights_only=True``:
            code in it is never run.

    Raises:
        WeightsError: the file is missing, unreadable, damaged, holds pickled code or holds no tensors.
    """
    path = Path(path)
    return _unwrap(read_content(path), path)


def read_content(path: Path) -> object:
    """Read all that a weights file holds, wrappers included; code in it is never run. Raises as :func:`read_state`."""
    if not path.is_file():
        hint = "" if path.is_dir() else similar(path)
        raise WeightsError(
            f"no weights file at {path}{hint or '; give the path of a .safetensors file or of a .pth of tensors'}"
        )
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
    except WeightsError:
        raise
    except Exception as error:  # torch's readers raise nearly anything on damaged bytes
        reason = str(error) or type(error).__name__
        raise WeightsError(f"cannot read weights from {path}: {reason}; the file is damaged or unreadable") from error


def read_described(path: str | Path, key: str, what: str, *, tensors: bool = True) -> tuple[Any, State]:
    """Read what a .safetensors file's metadata describes as JSON, and its tensors.

    Args:
        path: path of the file.
        key: key of the metadata; if it is missing, the description is an empty dict.
        what: the expected content, for the message.
        tensors: also read the tensors.

    Raises:
        WeightsError: the file is missing, not a regular file, or damaged.
    """
    try:
        check_regular(path)
        with safe_open(str(path), "pt", device="cpu") as file:
            described = parsed_json((file.metadata() or {}).get(key, "{}"))
            return described, {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except FileNotFoundError as error:
        hint = similar(path) or "; check the path"
        raise WeightsError(f"cannot read {what} from {str(path)!r}: there is no such file{hint}") from error
    except OSError as error:
        raise WeightsError(f"cannot read {what} from {str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # of the header's JSON, of types that torch lacks, ...
        reason = _reason(error)
        raise WeightsError(
            f"cannot read {what} from {str(path)!r}: {reason}; the file is damaged, or something else"
        ) from error


def _reason(error: Exception) -> str:
    """Say why a .safetensors file cannot be read; safetensors names the part of the header that it stopped at."""
    header = isinstance(error, SafetensorError) and "header" in str(error).lower()
    return f"it has no header of a .safetensors file ({error})" if header else str(error)


def folder_weights(folder: Path) -> Path:
    """Find the weights in a folder that timm saved.

    timm itself would choose among all files of the folder, and some of its versions (1.0.20) unpickle them.

    Raises:
        WeightsError: the folder holds no weights.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds neither model.safetensors nor pytorch_model.bin; give a file by --weights")


def _load_tensors(path: Path) -> object:
    _check_form(path)
    # The settings that many training scripts save beside the tensors; a Namespace holds values and runs nothing.
    allowed = getattr(torch.serialization, "safe_globals", None)  # since torch 2.5
    with nullcontext() if allowed is None else allowed([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_form(path: Path) -> None:
    """Refuse forms that torch.save does not write.

    A compressed zip can expand to any size; and before torch 2.6, ``weights_only`` has no effect on TorchScript files
    and on the tar files of 2016 (CVE-2025-32434).
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # how torch tells
    if not zipped:
        _require_form(not tarfile.is_tarfile(path), path, "a tar file")
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    _require_form(sum(e.file_size for e in entries) <= path.stat().st_size, path, "a compressed archive")
    _require_form(not any(e.filename.endswith("/constants.pkl") for e in entries), path, "a TorchScript program")


def _require_form(right: bool, path: Path, form: str) -> None:
    if not right:
        raise WeightsError(f"{path} is {form}; weights are read from .safetensors and from what torch.save writes")


def _unwrap(content: object, path: Path) -> State:
    """Find the encoder's state dict inside a checkpoint: open wrappers, and remove prefixes and heads."""
    for _ in WRAPPERS:  # a bounded loop, because a dict can contain itself
        if isinstance(content, Mapping) and (inner := next((w for w in WRAPPERS if _is_dict(content.get(w))), None)):
            content = content[inner]
    held = content.items() if isinstance(content, Mapping) else ()
    state = {k: v for k, v in held if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no named tensors; a state dict is needed, plain or under one of {WRAPPERS}")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return unchunked(encoder_state(state, str(path)))


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file, which is whole or absent, with the permissions of the user's other files.

    Raises:
        WeightsError: the file cannot be written.
    """
    state = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, sync=True) as part:
            save_file(state, part, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write {str(path)!r}: {error}; choose a folder that can be written to") from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a model without a classifier; heads and other unknown names are left out.

    Args:
        model: keeps its own dtype; the values are cast to it.
        state: tensors by the model's names.
        source: the name of the weights in errors.

    Raises:
        WeightsError: names are missing, shapes differ, or values are NaN or infinite; the first few are named.
    """
    check_state(model, state, source)
    own = model.state_dict()
    used = {name: state[name].to(own[name].dtype) for name in own}
    # Check after the cast, which may exceed the range of the model's dtype.
    bad = [name for name, value in used.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise WeightsError(f"{source} holds NaN or infinity in {len(bad)} tensors: {_first(bad)}")
    extra = [name for name in state if name not in own and not HEAD.match(name)]
    if extra:
        logger.warning(
            "%s: %d tensors are not part of the model and are left out: %s", source, len(extra), _first(extra)
        )
    model.load_state_dict(used)


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Check that a state dict fits a model; the model may be on the device "meta", without memory of its own.

    Raises:
        WeightsError: names are missing, shapes differ, or tensors are not plain real ones; the first few are named.
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
    if odd := [name for name in own if not _is_plain(state[name])]:
        raise WeightsError(f"{source} holds {len(odd)} tensors that are no plain arrays of real numbers: {_first(odd)}")


def _is_plain(value: Tensor) -> bool:
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    # Views that repeat a few values over any shape are not plain.
    return dense and not value.is_complex() and value.nbytes <= value.untyped_storage().nbytes()


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
