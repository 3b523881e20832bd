"""Export a backbone, with or without a denoiser, to one file that needs neither dvt nor timm: ONNX or torch.export.

Position embeddings, timm's and the denoiser's, are resampled inside the graph, so one file takes any batch and, for
models that take any size, any grid. This needs the antialiased bicubic resize of ONNX opset 18. Models whose Python
code depends on the grid (the rotary embedding of timm's DINOv3) are exported with a fixed grid, which is reported.
"""

from __future__ import annotations

import copy
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dvt import __version__
from dvt.backbones.backbone import Backbone
from dvt.errors import BackboneError, ConfigError
from dvt.files import whole_file
from dvt.grids import Size

logger = logging.getLogger(__name__)

FORMATS = (".onnx", ".pt2")
GRIDS = ("auto", "dynamic", "fixed")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
#: Largest deviation of a written file from the module: absolute, and relative for tokens beyond 1.
TOLERANCE = 1e-4
#: Most bytes of weights inside an .onnx file, whose format ends at 2 GB; more are written beside it, to NAME.onnx.data.
MOST_INLINE = 1_900_000_000
#: Bounds of the dynamic sizes: images in a batch, patches along a side.
MAX_BATCH, MIN_SIDE, MAX_SIDE = 4096, 2, 512

ExportedForward = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ExportConfig:
    """Hold the settings of an export.

    Args:
        size: (H, W) in pixels of a file of fixed grid; None takes the backbone's own.
        grid: "dynamic" for a file that takes every size in whole patches, "fixed" for one size, "auto" for dynamic
            if the model allows it.
        opset: ONNX operator set; None takes the one recommended for this version of torch.

    Raises:
        ConfigError: a setting is outside its range.
    """

    size: Size | None = None
    grid: str = "auto"
    opset: int | None = None

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ConfigError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if self.opset is not None and self.opset < 18:
            raise ConfigError(f"opset must be at least 18, the first with antialiased resizing, got {self.opset}")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"size must be positive (height, width) in pixels, got {self.size}")
        if self.size is not None and self.grid == "dynamic":
            raise ConfigError(
                f"a file of dynamic grid takes every size: give either size {self.size} or grid='dynamic'"
            )


@dataclass(frozen=True)
class Exported:
    """Describe an exported file.

    Attributes:
        path: the file.
        dynamic_grid: True if it takes every size in whole patches, otherwise only `size`.
        size: (H, W) in pixels of a fixed grid, the backbone's own size otherwise.
        opset: the ONNX operator set; None for .pt2.
        deviation: largest difference from the module over the inputs tried, relative for tokens beyond 1.
        tried: shapes of those inputs.
    """

    path: Path
    dynamic_grid: bool
    size: Size
    opset: int | None
    deviation: float
    tried: tuple[tuple[int, ...], ...]


class _Exportable(nn.Module):
    """Map images (B, 3, H, W) in [0, 1] to patches (B, h, w, C) and, if there are any, prefix tokens (B, P, C)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.backbone(images)
        return (tokens.patches, tokens.prefix) if self.backbone.num_prefix_tokens else (tokens.patches,)


def export(backbone: Backbone, path: str | Path, config: ExportConfig | None = None) -> Exported:
    """Write a backbone to one file, and compare the file's outputs with the backbone's.

    The file takes ``images`` (B, 3, H, W), float32 RGB in [0, 1], normalises them itself, and gives ``patches``
    (B, h, w, C) and, for models with class or register tokens, ``prefix`` (B, P, C). Its metadata describe its origin,
    as JSON under the keys ``dvt.backbone``, ``dvt.denoiser`` and so on (for .pt2, in the extra file ``dvt.json``). The
    file is whole or absent. The weights of a model of 2 GB and more do not fit into an .onnx file: they are in
    NAME.onnx.data beside it, and the two must be moved together.

    Args:
        backbone: from :func:`dvt.load_backbone`, :func:`dvt.wrap` or
            :func:`dvt.denoiser.attach.denoised_backbone`; exported in float32, from a copy where it is something else.
        path: a name that ends in .onnx or .pt2 (which :func:`torch.export.load` reads).
        config: the grid, the size and, for ONNX, the opset; by default those of :class:`ExportConfig`.

    Raises:
        ConfigError: the suffix is another, the model does not take the size, or ONNX's packages are missing.
        BackboneError: the model cannot be exported as asked, or the file deviates from it.
    """
    config, path = config or ExportConfig(), Path(path)
    _check(backbone, path, config)
    module = _Exportable(_float_on_cpu(backbone)).eval()
    dynamic = config.grid != "fixed" and config.size is None and not backbone.fixed_size
    if dynamic and config.grid == "auto":
        try:
            return _write(module, path, config, dynamic=True)
        except BackboneError as error:
            logger.warning("%s is exported for %s pixels only: %s", backbone.name, backbone.image_size, error)
            dynamic = False
    return _write(module, path, config, dynamic)


def _check(backbone: Backbone, path: Path, config: ExportConfig) -> None:
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} ends in {path.suffix!r}; a backbone is exported to {' or '.join(FORMATS)}")
    missing = [name for name in NEEDED if find_spec(name) is None] if path.suffix == ".onnx" else []
    if missing:
        raise ConfigError(
            f"ONNX files need {', '.join(missing)}: pip install 'denoising-vit[export]', or export to .pt2"
        )
    if config.grid == "dynamic" and backbone.fixed_size:
        raise ConfigError(
            f"{backbone.name}, as loaded, takes only {backbone.image_size} pixels: export it with grid='fixed'"
        )
    size = config.size
    if size is None:
        return
    if backbone.fixed_size and tuple(size) != tuple(backbone.image_size):
        raise ConfigError(
            f"{backbone.name}, as loaded, takes only {backbone.image_size}, got {size}: load it with that size"
        )
    if any(s % p for s, p in zip(size, backbone.patch_size, strict=True)):
        raise ConfigError(f"size {size} must be a multiple of the patch {backbone.patch_size} of {backbone.name}")


def _float_on_cpu(backbone: Backbone) -> Backbone:
    parameters = list(backbone.model.parameters())
    if all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters):
        return backbone
    return copy.deepcopy(backbone).float().cpu()


def _write(module: _Exportable, path: Path, config: ExportConfig, dynamic: bool) -> Exported:
    backbone = module.backbone
    size = tuple(config.size or backbone.image_size)
    program = _traced(module, (size[0], size[1]), dynamic)
    described = {"backbone": description(backbone), "dynamic_grid": dynamic, "size": size}
    weights = f"{path.name}.data"  # beside a large .onnx
    # torch.onnx and torch.export need the suffix.
    with whole_file(path, suffix=path.suffix, beside=(weights,) if path.suffix == ".onnx" else ()) as part:
        opset, run = (_onnx if path.suffix == ".onnx" else _pt2)(program, part, described, config, weights)
        inputs = list(_trials(backbone, (size[0], size[1]), dynamic))
        deviation = max(_deviation(module, run, images) for images in inputs)
        if not deviation <= TOLERANCE:
            raise BackboneError(
                f"the export of {backbone.name} with a {'dynamic' if dynamic else 'fixed'} grid fails, or deviates "
                f"from the module by {deviation:.1e} (allowed: {TOLERANCE:.0e}); nothing was written. Try grid='fixed' "
                "or the other format of .onnx and .pt2"
            )
    return Exported(path, dynamic, (size[0], size[1]), opset, deviation, tuple(tuple(i.shape) for i in inputs))


def description(backbone: Backbone) -> dict[str, Any]:
    """Describe the source of exported tokens: the backbone, its layer and weights and the denoiser, if it has one."""
    denoiser = getattr(backbone.model, "denoiser", None)
    return {
        "version": __version__,
        "backbone": backbone.name,
        "layer": backbone.layer,
        "patch_size": list(backbone.patch_size),
        "stride": list(backbone.stride),
        "feature_dim": backbone.feature_dim,
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "weights_sha256": backbone.weights_sha256,
        "denoiser": None if denoiser is None else denoiser.card | {"kind": denoiser.config.kind},
    }


def _traced(module: _Exportable, size: Size, dynamic: bool) -> ExportedProgram:
    """Trace the module's graph with a free batch size and, if `dynamic`, a free grid."""
    patch = module.backbone.patch_size
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if dynamic:
        # An oblong grid that differs from stored ones, because torch.export assumes that equal sizes are always equal.
        size = (11 * patch[0], 13 * patch[1])
        for axis, name, step in ((2, "rows", patch[0]), (3, "columns", patch[1])):
            shapes[axis] = step * Dim(name, min=MIN_SIDE, max=MAX_SIDE)
    try:
        with torch.no_grad():
            return torch.export.export(module, (torch.rand(2, 3, *size),), dynamic_shapes=(shapes,))
    except Exception as error:  # torch.export raises whatever the traced code met
        raise BackboneError(
            f"torch.export cannot trace {module.backbone.name} with a {'dynamic' if dynamic else 'fixed'} grid: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        ) from error


def _pt2(
    program: ExportedProgram, part: Path, described: dict[str, Any], config: ExportConfig, weights: str
) -> tuple[None, ExportedForward]:
    # Write to memory first, because on a full disk torch's writer would end the process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"dvt.json": json.dumps(described)})
    part.write_bytes(content.getbuffer())
    return None, torch.export.load(part).module()


def _onnx(
    program: ExportedProgram, part: Path, described: dict[str, Any], config: ExportConfig, weights: str
) -> tuple[int, ExportedForward]:
    import onnxruntime

    outputs = ["patches", "prefix"][: len(program.graph_signature.user_outputs)]
    try:
        with _quiet():
            written: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=config.opset, output_names=outputs
            )
    except Exception as error:  # the exporter wraps whatever its many steps raised
        cause = error.__cause__ or error
        raise BackboneError(
            f"{described['backbone']['backbone']} cannot be written as ONNX: {type(cause).__name__}: {cause}; "
            "export it to .pt2, or with grid='fixed'"
        ) from error
    model = written.model
    flat = described["backbone"] | {key: value for key, value in described.items() if key != "backbone"}
    model.metadata_props.update({f"dvt.{key}": json.dumps(value) for key, value in flat.items()})
    size = sum(value.nbytes for value in (*program.state_dict.values(), *program.constants.values()))
    if size > MOST_INLINE:
        _save_in_two(written, part, weights)
    else:
        written.save(part, external_data=False)
    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(out) for out in session.run(outputs, {"images": images.numpy()}))

    return int(model.opset_imports[""]), run


def _save_in_two(written: Any, part: Path, weights: str) -> None:
    """Write the graph, and its weights to a file of a lasting name in the same folder, by which the graph finds it."""
    import onnx

    written.save(part, external_data=True)
    graph = onnx.load(part, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights
    part.with_name(f"{part.name}.data").rename(part.with_name(weights))
    onnx.save(graph, part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from printing its progress."""
    previous = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger("onnxscript").setLevel(previous)


def _trials(backbone: Backbone, size: Size, dynamic: bool) -> Iterator[Tensor]:
    """Make images of two batch sizes and, if the grid is dynamic, of two sizes, all different from the traced ones."""
    generator = torch.Generator().manual_seed(0)
    height, width = backbone.patch_size
    yield torch.rand(1, 3, *size, generator=generator)
    other = (4 * height, 6 * width) if dynamic else size
    yield torch.rand(3, 3, *other, generator=generator)


def _deviation(module: nn.Module, run: ExportedForward, images: Tensor) -> float:
    with torch.no_grad():
        expected = module(images)
        try:
            found = run(images)
        except Exception as error:  # onnxruntime has its own exceptions
            logger.info("the exported file fails on images %s: %s", tuple(images.shape), error)
            return float("inf")
    if [tuple(e.shape) for e in expected] != [tuple(f.shape) for f in found]:
        return float("inf")
    return max(float(((f - e).abs() / e.abs().clamp(min=1)).max()) for e, f in zip(expected, found, strict=True))
