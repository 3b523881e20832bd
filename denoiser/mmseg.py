"""Run any backbone of dvt, raw or denoised, in mmsegmentation: a backbone, a linear head and the CamVid data set.

Only this module imports mmseg, and no other module of dvt imports it. A config of mmseg registers its classes by
``custom_imports = dict(imports=["dvt.denoiser.mmseg"], allow_failed_imports=False)``; see ``docs/mmseg.md`` and
``examples/mmseg``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt import demo_weights, grids
from dvt.backbones import Backbone, load_backbone
from dvt.backbones.layers import choose_layers
from dvt.errors import ConfigError

try:
    from mmengine.model import BaseModule
    from mmseg.datasets import BaseSegDataset
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import DATASETS, MODELS
    from mmseg.utils import register_all_modules
except ImportError as error:
    raise ImportError(
        f"dvt.denoiser.mmseg needs mmsegmentation ({error}); in an environment of its own: "
        "pip install 'denoising-vit[mmseg]'"
    ) from error

# This must come before the classes below: mmseg fills a registry only if it is still empty.
register_all_modules(init_default_scope=False)

__all__ = ["CamVidDataset", "DvtBackbone", "DvtLinearHead"]


@MODELS.register_module()
class DvtBackbone(BaseModule):
    """Compute feature maps of a frozen backbone, raw or denoised, for mmseg.

    Args:
        name: a single-scale timm model, as :func:`dvt.load_backbone` takes it.
        weights: a .safetensors or .pth file; "demo" for the small ViT that comes with dvt; None for the hub's weights.
        layer: block whose tokens are read; -1 is the last, after the final norm.
        size: input size in pixels, for models whose size is chosen when they are loaded.
        denoiser: file, folder or hub repository of a denoiser for this backbone and layer; None for raw tokens.
        out_indices: blocks whose tokens are given, one map each, in their order, from one forward pass; the last one is
            the denoiser's, and `layer` must be left out. None gives the one map of `layer`. Blocks before the last
            come without the final norm.
        stride: pixels between patches; below the patch they overlap, and maps are finer.
        factors: enlargement of each map of `out_indices` (4, 2, 1 and 0.5 make a pyramid of a ViT, as heads such as
            UPerHead and FPN expect); None keeps all as they are.
        force: accept a denoiser whose card names another backbone, layer or weights.
        pretrained: False for random weights, for tests.
        init_cfg: an argument of mmengine's; nothing is initialised here, so it must be None.

    Attributes:
        backbone: the :class:`~dvt.backbones.Backbone`, always in evaluation mode.
        feature_dim: C, the channels of a map; the head's `in_channels` must be equal to it, for each map.

    Raises:
        BackboneError, WeightsError: the backbone or the denoiser cannot be made, or they do not fit each other.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        layer: int = -1,
        size: int | tuple[int, int] | None = None,
        denoiser: str | None = None,
        force: bool = False,
        pretrained: bool = True,
        out_indices: Sequence[int] | None = None,
        stride: int | tuple[int, int] | None = None,
        factors: Sequence[float] | None = None,
        init_cfg: None = None,
    ) -> None:
        super().__init__(init_cfg)
        _check_maps(layer, out_indices, factors)
        backbone = load_backbone(
            name,
            weights=demo_weights() if weights == "demo" else weights,
            pretrained=pretrained,
            layer=layer if out_indices is None else out_indices[-1],
            size=size,
            stride=stride,
        )
        self.layers = (backbone.layer,) if out_indices is None else choose_layers(backbone, tuple(out_indices))
        if out_indices is not None and len(self.layers) != len(out_indices):
            raise ConfigError(f"out_indices {tuple(out_indices)} name a block twice; give each once")
        self.factors = tuple(factors or [1] * len(self.layers))
        self.denoiser: nn.Module | None = None
        if denoiser is not None:
            backbone = self._denoised(backbone, denoiser, force)
        self.backbone = backbone.requires_grad_(False)
        self.feature_dim = backbone.feature_dim
        self._range_checked = False

    def _denoised(self, backbone: Backbone, file: str, force: bool) -> Backbone:
        """Put a denoiser behind the last layer: inside the backbone if that is the only one."""
        from dvt.denoiser import Denoiser
        from dvt.denoiser.attach import denoised_backbone
        from dvt.denoiser.config import INSIDE

        denoiser = Denoiser.from_pretrained(file)
        if len(self.layers) == 1 or denoiser.config.kind in INSIDE:
            return denoised_backbone(denoiser, backbone, force)
        denoiser.check_fits(backbone, force)
        self.denoiser = denoiser.requires_grad_(False)
        return backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute maps (B, C, h, w) of images (B, 3, H, W), RGB in [0, 1], of any size.

        An image whose size is not a multiple of the patch is resized to the nearest multiple, so that the map covers
        the whole image, as mmseg's heads assume when they enlarge it. For a model of fixed size every image is resized.
        Maps of overlapping patches are sampled on cells of the stride that tile the image.

        Raises:
            ConfigError: the first images lie outside [0, 1], because the data preprocessor normalises them.
        """
        self._check_range(images)
        size, backbone = (images.shape[2], images.shape[3]), self.backbone
        wanted = backbone.image_size if backbone.fixed_size else grids.fit_size(size, min(size), backbone.patch_size)
        with torch.no_grad():
            if wanted != size:
                images = nnf.interpolate(images, wanted, mode="bilinear", align_corners=False, antialias=True)
            if len(self.layers) == 1:
                return (self._map(backbone(images).patches, wanted, self.factors[0]),)
            found = backbone.at_layers(images, self.layers)
            last = found[self.layers[-1]]
            if self.denoiser is not None:
                found[self.layers[-1]] = last.with_patches(self.denoiser(last.patches, last.prefix))
            pairs = zip(self.layers, self.factors, strict=True)
            return tuple(self._map(found[layer].patches, wanted, factor) for layer, factor in pairs)

    def _map(self, patches: Tensor, size: grids.Size, factor: float) -> Tensor:
        """Move channels first, and sample the map on cells that tile an image of the size, enlarged by a factor."""
        maps, backbone = patches.permute(0, 3, 1, 2).contiguous(), self.backbone
        if backbone.stride == backbone.patch_size and factor == 1:
            return maps
        cells = [max(1, round(side / step * factor)) for side, step in zip(size, backbone.stride, strict=True)]
        tiles = backbone.stride == backbone.patch_size
        return grids.enlarge(maps, (cells[0], cells[1]), None if tiles else backbone.centres(size))

    def train(self, mode: bool = True) -> DvtBackbone:
        """Set the flag that mmengine expects; the frozen model inside stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        if self.denoiser is not None:
            self.denoiser.eval()
        return self

    def init_weights(self) -> None:
        """Do nothing: the weights came with the backbone, and timm's own initialisation must not overwrite them."""
        self._is_init = True

    def _check_range(self, images: Tensor) -> None:
        """Check the range of the first images only, because reading values makes the GPU wait."""
        if self._range_checked:
            return
        low, high = float(images.min()), float(images.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ConfigError(
                f"the images lie in [{low:.2f}, {high:.2f}]; DvtBackbone takes RGB in [0, 1] and normalises by itself: "
                "give the data_preprocessor mean=[0, 0, 0], std=[255, 255, 255] and bgr_to_rgb=True"
            )
        self._range_checked = True


def _check_maps(layer: int, out_indices: Sequence[int] | None, factors: Sequence[float] | None) -> None:
    """Refuse settings of maps that contradict each other."""
    if out_indices is not None and (not len(out_indices) or layer != -1):
        raise ConfigError(f"out_indices {out_indices} name the blocks, one or more: leave layer={layer} out")
    count = 1 if out_indices is None else len(out_indices)
    if factors is not None and (len(factors) != count or not all(factor > 0 for factor in factors)):
        raise ConfigError(f"factors {factors} must be positive, one for each of {count} maps")


@MODELS.register_module()
class DvtLinearHead(BaseDecodeHead):
    """Classify frozen features by BatchNorm and a 1x1 convolution, the linear probe.

    Args:
        in_channels: C of the backbone, or one number per map if `in_index` and `input_transform` select several.
        options: options of mmseg's ``BaseDecodeHead``: num_classes, loss_decode, ignore_index, ...

    Source:
        The linear protocol of DINOv2 (Oquab et al., 2023, section 7.4) and Denoising ViT (arXiv 2401.02957).
    """

    def __init__(self, in_channels: int | Sequence[int], **options: Any) -> None:
        channels = in_channels if isinstance(in_channels, int) else sum(in_channels)
        super().__init__(in_channels, channels, **{"dropout_ratio": 0.0, **options})
        self.bn = nn.BatchNorm2d(channels)  # `sync_bn = "torch"` in the config shares its statistics between GPUs

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute class scores (B, num_classes, h, w) from the backbone's maps."""
        return self.cls_seg(self.bn(self._transform_inputs(inputs)))


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """Read CamVid with its 11 classes; id 11 in the label files is void and becomes mmseg's 255.

    Args:
        options: options of mmseg's ``BaseSegDataset``. The suffixes are .jpg for images and .png for labels.

    Source:
        Brostow, Fauqueur, Cipolla, Pattern Recognition Letters 2009; ids as in the release of SegNet.
    """

    METAINFO: ClassVar[dict[str, Any]] = {
        "classes": (
            *("sky", "building", "pole", "road", "pavement", "tree"),
            *("sign", "fence", "car", "pedestrian", "bicyclist", "void"),
        ),
        "palette": [
            *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0]),
            *([192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192], [0, 0, 0]),
        ],
    }

    def __init__(self, metainfo: dict[str, Any] | None = None, **options: Any) -> None:
        # mmseg maps the classes of METAINFO that are not wanted to 255.
        super().__init__(metainfo=metainfo or {"classes": self.METAINFO["classes"][:-1]}, **options)
