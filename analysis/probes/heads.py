"""Keep the head of a probe in a file that knows the features it was trained on, and predict with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.analysis.config import ProbeConfig
from dvt.analysis.probes.depth import DepthProbe
from dvt.analysis.probes.discovery import Lost, TokenCut
from dvt.analysis.probes.probe import Probe
from dvt.analysis.probes.segmentation import KnnSegmentation, LinearSegmentation
from dvt.backbones import Backbone
from dvt.backbones.weights import check_state, load_state, read_described, save_state
from dvt.errors import BackboneError, ConfigError, WeightsError
from dvt.grids import Size
from dvt.schema import typed
from dvt.upsampling import upsample

HEAD_SCHEMA = "dvt-head/1"
_KEY = "dvt"

KeptTask = Literal["segmentation", "knn", "depth", "discovery"]


@dataclass(frozen=True)
class HeadCard:
    """Describe a kept head: what it predicts, and the features that it takes.

    Args:
        task: the probe's task.
        backbone: name of the backbone.
        weights_sha256: hash of the backbone's weights.
        layers: blocks whose tokens it takes, side by side; -1 for the last, after the final norm.
        stride: (vertical, horizontal) pixels between patches.
        size: shorter side of the backbone's input, in pixels, in training; predictions may take another.
        channels: C of the features.
        patch: (height, width) of a patch in pixels; None, in files of before it was kept, means the stride.
        denoiser: identity of the denoiser whose output it takes; None for raw features.
        upsample: upsampling factor of the features, guided by the image.
        num_classes: K of label maps, 0 for other tasks.
        classes: names of the classes, one each, or none.
        bins: of depth, "log" or "linear".
        depths: smallest and largest depth in metres that it predicts.
        neighbours: votes of "knn".
        method: of discovery, "lost" or "tokencut".
        centred: of discovery.
        class_token: whether the class token follows each patch token in the features.
    """

    task: KeptTask
    backbone: str
    weights_sha256: str
    layers: tuple[int, ...]
    stride: tuple[int, int]
    size: int
    channels: int
    patch: tuple[int, int] | None = None
    denoiser: dict[str, Any] | None = None
    upsample: int = 1
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    bins: Literal["log", "linear"] = "log"
    depths: tuple[float, float] = (0.0, 0.0)
    neighbours: int = 20
    method: Literal["lost", "tokencut"] = "lost"
    centred: bool = True
    class_token: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a head takes the tokens of one layer or more, got none")
        if min(*self.stride, self.size, self.channels, self.upsample, self.neighbours) < 1 or len(self.stride) != 2:
            raise ConfigError(f"stride, size, channels, upsample and neighbours are 1 or more, got {self}")
        if self.task in ("segmentation", "knn") and self.num_classes < 1:
            raise ConfigError(f"num_classes is {self.num_classes}; a head for label maps has 1 class or more")
        if self.task == "depth" and not 0 < self.depths[0] < self.depths[1]:
            raise ConfigError(f"depths are {self.depths}; they must be positive and rise")

    def centres(self, grid: Size) -> Tensor:
        """Compute the patch centres (h, w, 2) of the features of a grid, before upsampling."""
        return grids.overlapping_centres(grid, self.patch or self.stride, self.stride)

    @property
    def folder(self) -> str:
        """The name of the folder for its maps: "labels" or "depth"."""
        return "depth" if self.task == "depth" else "labels"

    def name_of(self, label: int) -> str:
        """Name a class."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    def check_fits(self, backbone: Backbone, denoiser: Mapping[str, Any] | None) -> None:
        """Refuse features that the head was not trained on.

        Args:
            backbone: source of the raw tokens.
            denoiser: identity of the denoiser behind it; None without one.

        Raises:
            BackboneError: backbone, weights, layer, stride or denoiser differ; the message lists the differences.
        """
        spec = backbone.identity
        own = {"weights": spec.weights_sha256, "layer": spec.layer, "stride": tuple(spec.stride)}
        wanted = {"weights": self.weights_sha256, "layer": self.layers[-1], "stride": tuple(self.stride)}
        apart = [f"{name} {wanted[name]}, got {own[name]}" for name in own if own[name] != wanted[name]]
        if own["weights"] != wanted["weights"] and spec.name != self.backbone:
            apart = [f"backbone {self.backbone}, got {spec.name}", *apart]
        if (denoiser is None) != (self.denoiser is None):
            apart.append(
                "raw features, got denoised ones" if self.denoiser is None else "denoised features (give --denoiser)"
            )
        elif json.dumps(denoiser, sort_keys=True) != json.dumps(self.denoiser, sort_keys=True):
            apart.append("another denoiser")
        if apart:
            raise BackboneError(
                f"this head was trained on other features: {'; '.join(apart)}. Give the backbone, weights and denoiser "
                "that it was trained with, or train a head on these features: dvt probe ... --save"
            )


class SavedHead:
    """Hold a trained head together with its card.

    Args:
        card: its description.
        probe: a fitted probe of the card's task.
    """

    def __init__(self, card: HeadCard, probe: Probe) -> None:
        self.card, self.probe = card, probe

    @torch.no_grad()
    def predict(self, tokens: Tensor, image: Tensor, size: Size | None = None) -> Tensor:
        """Predict for one image: classes (H, W), metres (H, W), or a box (4,) in pixels (x0, y0, x1, y1).

        Args:
            tokens: (h, w, C) features of the image, as the card describes them before upsampling.
            image: (3, H, W) RGB in [0, 1]; guides the upsampling, if the head was trained on upsampled features.
            size: (H, W) of the prediction; None takes the image's.
        """
        fine = tokens.float()
        if self.card.upsample > 1:
            centres = self.card.centres((tokens.shape[0], tokens.shape[1])).to(tokens.device)
            fine = upsample(fine, image, self.card.upsample, centres=centres)
        wanted = (image.shape[1], image.shape[2]) if size is None else size
        return self.probe.predict(fine[None], [wanted])[0].cpu()

    def save(self, path: str | Path) -> None:
        """Write the head to a .safetensors file, which is whole or absent.

        Raises:
            ConfigError: the name does not end in .safetensors.
            WeightsError: the file cannot be written.
        """
        check_head_path(path)
        described = {"schema": HEAD_SCHEMA, "card": asdict(self.card)}
        save_state(Path(path), _state(self.probe), {_KEY: json.dumps(described, sort_keys=True, allow_nan=False)})

    @classmethod
    def load(cls, path: str | Path) -> SavedHead:
        """Read a head that :meth:`save` wrote.

        Raises:
            WeightsError: the file is missing or damaged, or is no head.
        """
        described, state = read_described(path, _KEY, "a head of dvt probe")
        parts = described if isinstance(described, dict) else {}
        if parts.get("schema") != HEAD_SCHEMA:
            raise WeightsError(
                f"{str(path)!r} is no head: its metadata has schema {parts.get('schema')!r} instead of "
                f"{HEAD_SCHEMA!r}; `dvt probe ... --save head.safetensors` writes one"
            )
        try:
            card = typed(HeadCard, parts.get("card"))
        except ConfigError as error:
            raise WeightsError(f"the card of {str(path)!r} cannot be used: {error}; was the file edited?") from error
        probe = _restored(card, state, str(path))
        tiles = card.upsample > 1 or card.patch in (None, card.stride)
        return cls(card, probe if tiles else probe.at(card.centres))


def check_head_path(path: str | Path) -> None:
    """Refuse a name that does not end in .safetensors."""
    if Path(path).suffix != ".safetensors":
        raise ConfigError(f"a head is kept in a .safetensors file, got {str(path)!r}")


def kept_head(
    config: ProbeConfig,
    probe: Probe,
    backbone: Backbone,
    layers: Sequence[int],
    channels: int,
    denoiser: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
) -> SavedHead:
    """Describe a fitted probe by its settings and the features that it was fitted on, so that it can be kept.

    Args:
        config: of the probe.
        probe: fitted.
        backbone: source of the raw tokens.
        layers: whose tokens lie side by side in the features; the last one is the backbone's own.
        channels: C of the features.
        denoiser: identity of the denoiser behind it; None for raw features.
        names: of the classes, one each, or none.

    Raises:
        ConfigError: this task keeps no head, its features cannot be made again for another image, or there are more
            or fewer names than classes.
    """
    check_keeps_head(config)
    spec, count = backbone.identity, getattr(probe, "num_classes", 0)
    if names and len(names) != count:
        raise ConfigError(f"{len(names)} names were given for {count} classes; give one for each, in order, or none")
    card = HeadCard(
        config.task,  # type: ignore[arg-type]
        spec.name,
        spec.weights_sha256 or "",
        tuple(layers),
        spec.stride,
        min(spec.image_size),
        channels,
        patch=spec.patch_size,
        denoiser=None if denoiser is None else dict(denoiser),
        upsample=config.upsample,
        num_classes=count,
        classes=tuple(names),
        bins=config.bins,
        depths=getattr(probe, "depths", None) or (0.0, 0.0),
        neighbours=config.neighbours,
        method=config.method,
        centred=config.centred,
        class_token=config.class_token,
    )
    return SavedHead(card, probe)


def check_keeps_head(config: ProbeConfig) -> None:
    """Refuse to keep the head of a task without one, or of features that an image alone does not determine."""
    if config.task not in get_args(KeptTask):
        raise ConfigError(f"{config.task} keeps no head to predict with; {', '.join(get_args(KeptTask))} do")
    if config.position != "none":
        raise ConfigError("a kept head takes the features alone: leave --position out, or --save")


def _state(probe: Probe) -> dict[str, Tensor]:
    if isinstance(probe, KnnSegmentation) and probe.centroids is not None and probe.classes is not None:
        return {"centroids": probe.centroids, "classes": probe.classes}
    head = getattr(probe, "head", None)
    return {} if head is None else head.state_dict()


def _restored(card: HeadCard, state: Mapping[str, Tensor], source: str) -> Probe:
    """Make a fitted probe from its card and tensors."""
    if card.task == "discovery":
        return (Lost if card.method == "lost" else TokenCut)(centred=card.centred)
    if card.task == "knn":
        return _restored_knn(card, state, source)
    smallest = card.channels * max(1, card.num_classes)
    if smallest > sum(value.numel() for value in state.values()):
        raise WeightsError(f"{source} is too small for a head of {card.channels} channels; was the file edited?")
    probe: Any = DepthProbe(card.bins) if card.task == "depth" else LinearSegmentation(card.num_classes)
    outputs = card.depths if card.task == "depth" else card.num_classes
    head = probe.empty_head(card.channels, outputs)
    load_state(head, state, source)
    probe.head = head.eval()
    return probe


def _restored_knn(card: HeadCard, state: Mapping[str, Tensor], source: str) -> Probe:
    count = len(state["classes"]) if "classes" in state and state["classes"].ndim == 1 else 0
    holder = nn.Module()
    with torch.device("meta"):
        holder.register_buffer("centroids", torch.empty(count, card.channels))
        holder.register_buffer("classes", torch.empty(count, dtype=torch.long))
    check_state(holder, state, source)
    classes, centroids = state["classes"].long(), state["centroids"].float()
    if not count or int(classes.min()) < 0 or int(classes.max()) >= card.num_classes or not centroids.isfinite().all():
        raise WeightsError(f"{source} holds no usable centroids of {card.num_classes} classes; was the file edited?")
    probe = KnnSegmentation(card.num_classes, card.neighbours)
    probe.centroids, probe.classes = centroids, classes
    return probe
