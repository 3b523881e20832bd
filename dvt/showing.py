"""Show what dvt's objects hold, in notebooks and as pictures, and keep tensors with a description in one file.

Token maps are coloured by three principal components: the same colour is the same feature in all maps of a picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvt.errors import DvtError, NonFiniteError, ShapeError, WeightsError
from dvt.files import check_regular, whole_file
from dvt.schema import parsed_json

if TYPE_CHECKING:
    from PIL.Image import Image

_KEY = "dvt"  # of the description, in a file's metadata
_SHOWN = 180  # pixels of a map's longer side on a page


def pca_colours(reference: Tensor | Sequence[Tensor], *others: Tensor) -> list[Tensor]:
    """Colour token maps: three principal components as red, green and blue, the same directions in all maps.

    Each map is centred and scaled to unit variance by itself. The components and the colour range (percentiles 1
    and 99, where it is clipped) come from all references together, with equal weight: fitted on the raw map alone,
    they would show its artifact and leave the semantic map grey. So the same colour is the same direction away
    from a map's own mean, in units of that map's own spread.

    Args:
        reference: one (h, w, C) map or several, which may differ in grid; they decide the colours.
        others: further maps to colour in the same way, without influence on the colours.

    Returns:
        (h, w, 3) maps in [0, 1], the references first. Missing components, of maps with C < 3, are grey.

    Raises:
        ShapeError: a map is not (h, w, C), or they differ in channels.
        NonFiniteError: a token is NaN or infinite.
    """
    references = [reference] if isinstance(reference, Tensor) else list(reference)
    maps = [*references, *others]
    if any(each.ndim != 3 for each in maps) or len({each.shape[-1] for each in maps}) != 1:
        raise ShapeError(f"token maps must be (h, w, C) of one C, got {[tuple(each.shape) for each in maps]}")
    for number, each in enumerate(maps):
        if not bool(each.isfinite().all()):
            raise NonFiniteError(f"tokens of image {number} of {len(maps)} hold NaN or infinity; compute them again")
    scaled = [standardised(each.detach().cpu().float()) for each in maps]
    rows = [each.flatten(0, 1) for each in scaled[: len(references)]]
    covariance = torch.stack([each.T @ each / len(each) for each in rows]).mean(0)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]
    # The sign of an eigenvector is arbitrary: make its largest entry positive.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    projected = torch.cat([each @ directions for each in rows])
    low, high = projected.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    span = high - low
    flat = span < 1e-9
    colours = [((each @ directions - low) / span.masked_fill(flat, 1)).masked_fill(flat, 0.5) for each in scaled]
    missing = 3 - directions.shape[1]
    return [torch.nn.functional.pad(each.clamp(0, 1).float(), (0, missing), value=0.5) for each in colours]


def standardised(tokens: Tensor) -> Tensor:
    """Centre a map (h, w, C) and scale it to unit variance, in float64."""
    centred = tokens.double() - tokens.double().mean((0, 1))
    return centred / centred.square().sum(-1).mean().sqrt().clamp(min=1e-9)


def picture(panels: Mapping[str, Tensor]) -> Image:
    """Draw panels side by side, each below its title; a notebook shows the picture, ``.save(path)`` writes it.

    Args:
        panels: (h, w, 3) colours in [0, 1] by title.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    if not panels:
        raise ShapeError("there is no token map to draw; give one or more")
    shapes = [each.shape for each in panels.values()]
    ratio = min(max(*(shape[0] / shape[1] for shape in shapes), 0.3), 2.0)
    figure = Figure(figsize=(2.6 * len(panels), 2.6 * ratio + 0.4), layout="constrained", facecolor="white")
    for axis, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.imshow(
            values.detach().cpu().clamp(0, 1).numpy(), extent=(0, 1, 1, 0), aspect=values.shape[0] / values.shape[1]
        )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return Image.open(io.BytesIO(content.getvalue())).convert("RGB")


def page_part(title: str, facts: Mapping[str, object], panels: Callable[[], Mapping[str, Tensor]]) -> str:
    """Write an object as HTML for a notebook: facts in a table, and small pictures.

    Args:
        title: the first line.
        facts: values by name; text is escaped.
        panels: makes (h, w, 3) colours in [0, 1] by title; where they cannot be made, the reason is written.
    """
    try:
        pictures, reason = panels(), ""
    except DvtError as error:
        pictures, reason = {}, escape(str(error))
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td>{escape(_text(value))}</td></tr>'
        for name, value in facts.items()
    )
    cells = "".join(_cell(name, values) for name, values in pictures.items()) or reason
    return (
        f'<div><b>{escape(title)}</b><table>{rows}</table><div style="display:flex;gap:8px;flex-wrap:wrap">{cells}'
        "</div></div>"
    )


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({count})" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(title: str, colours: Tensor) -> str:
    scale = _SHOWN / max(colours.shape[:2])
    size = f"width:{round(colours.shape[1] * scale)}px;height:{round(colours.shape[0] * scale)}px"
    source = f"data:image/png;base64,{base64.b64encode(_png(colours)).decode()}"
    return (
        f'<figure style="margin:0"><img style="{size};image-rendering:pixelated" src="{source}" alt="{escape(title)}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _png(colours: Tensor) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(colours.mul(255).round().byte().cpu().numpy()).save(content, "PNG")
    return content.getvalue()


def save_tensors(path: str | Path, schema: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors to a .safetensors file, which is whole or absent; :func:`read_tensors` reads it.

    Raises:
        ConfigError: the file cannot be written.
        WeightsError: the name does not end in .safetensors.
    """
    import json

    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"it is saved as a .safetensors file, got {str(path)!r}; give a name that ends so")
    values = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with whole_file(path) as part:
        save_file(values, part, metadata={_KEY: json.dumps({"schema": schema})})
    return path


def read_tensors(path: str | Path, schema: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Read what :func:`save_tensors` wrote under a schema.

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    from safetensors import safe_open

    try:
        check_regular(path)
        with safe_open(str(path), "pt", device="cpu") as file:
            described: Any = parsed_json((file.metadata() or {}).get(_KEY, "{}"))
            found = described.get("schema") if isinstance(described, dict) else None
            if found == schema and set(file.keys()) == set(names):
                return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # of missing files, damaged headers, types that torch lacks
        raise WeightsError(f"cannot read {str(path)!r}: {error}; the file is missing, damaged or unreadable") from error
    raise WeightsError(f"{str(path)!r} is of schema {found!r} and not {schema!r}, which .save(path) writes")
