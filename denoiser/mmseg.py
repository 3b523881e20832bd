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
from dvt.backbones import load_backbone
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
    """Compute one feature map of a frozen backbone, raw or denoised, for mmseg.

    Args:
        name: a single-scale timm model, as :func:`dvt.load_backbone` takes it.
        weights: a .safetensors or .pth file; "demo" for the small ViT that comes with dvt; None for the hub's weights.
        layer: block whose tokens are read; -1 is the last, after the final norm.
        size: input size in pixels, for models whose size is chosen when they are loaded.
        denoiser: file, folder or hub repository of a denoiser for this backbone and layer; None for raw tokens.
        force: accept a denoiser whose card names another backbone, layer or weights.
        pretrained: False for random weights, for tests.
        init_cfg: an argument of mmengine's; nothing is initialised here, so it must be None.

    Attributes:
        backbone: the :class:`~dvt.backbones.Backbone`, always in evaluation mode.
        feature_dim: C, the channels of the map; the head's `in_channels` must be equal to it.

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
        init_cfg: None = None,
    ) -> None:
        super().__init__(init_cfg)
        backbone = load_backbone(
            name,
            weights=demo_weights() if weights == "demo" else weights,
            pretrained=pretrained,
            layer=layer,
            size=size,
        )
        if denoiser is not None:
            from dvt.denoiser import Denoiser
            from dvt.denoiser.attach import denoised_backbone

            backbone = denoised_backbone(Denoiser.from_pretrained(denoiser), backbone, force)
        self.backbone = backbone.requires_grad_(False)
        self.feature_dim = backbone.feature_dim
        self._range_checked = False

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute one map (B, C, h, w) of images (B, 3, H, W), RGB in [0, 1], of any size.

        An image whose size is not a multiple of the patch is resized to the nearest multiple, so that the map covers
        the whole image, as mmseg's heads assume when they enlarge it. For a model of fixed size every image is resized.

        Raises:
            ConfigError: the first images lie outside [0, 1], because the data preprocessor normalises them.
        """
        self._check_range(images)
        size, backbone = (images.shape[2], images.shape[3]), self.backbone
        wanted = backbone.image_size if backbone.fixed_size else grids.fit_size(size, min(size), backbone.patch_size)
        with torch.no_grad():
            if wanted != size:
                images = nnf.interpolate(images, wanted, mode="bilinear", align_corners=False, antialias=True)
            return (backbone(images).patches.permute(0, 3, 1, 2).contiguous(),)

    def train(self, mode: bool = True) -> DvtBackbone:
        """Set the flag that mmengine expects; the frozen model inside stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
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
