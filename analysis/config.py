"""Settings of the analyses: what is measured, what counts as an artifact, how features are probed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dvt.errors import ConfigError
from dvt.schema import check_ranges

AnnotationKind = Literal["labels", "depth", "boxes", "category"]
Task = Literal["segmentation", "knn", "depth", "classification", "knn-classification", "discovery", "correspondence"]
TARGETS: dict[str, AnnotationKind] = {
    "segmentation": "labels",
    "knn": "labels",
    "depth": "depth",
    "classification": "category",
    "knn-classification": "category",
    "discovery": "boxes",
}

DepthCrop = Literal["none", "nyu", "eigen", "garg"]
Baseline = Literal["position-only", "random", "subtract", "linear-removal", "view-averaging", "ph-reg"]
BASELINES = ("position-only", "random", "subtract", "linear-removal", "view-averaging", "ph-reg")


@dataclass(frozen=True)
class AnalyzeConfig:
    """Choose what an analysis computes.

    Args:
        images: largest size of the sample, which is evenly spread over the given images.
        layers: "all", or block indices (-1 is the final block). The backbone's own layer is always
            measured. All layers come from one forward pass.
        layer_images: images of the sample that other layers are measured on; their position share and shift
            stability come from half of the images below.
        share_images: images that the position share and the map of the artifact come from.
        windows: torus windows per image, an even number.
        shift_images: images that shift stability is measured on, six windows per image.
        mic_images: images that MIC is computed on (a quarter of them for other layers).
        mic_channels: number of channels that MIC scores per axis: those with most information on fixed cuts; None
            scores all.
        draws: random draws for the nulls of position R2, position share, grid peak and blank correlation, at least 2;
            other nulls have one draw per image.
        shown: images whose token maps are kept for pictures.
        batch: images per forward pass.
        seed: seed of windows, nulls and bootstraps.
    """

    images: int = 120
    layers: Literal["all"] | tuple[int, ...] = ()
    layer_images: int = 12
    share_images: int = 24
    windows: int = 16
    shift_images: int = 16
    mic_images: int = 8
    mic_channels: int | None = 4
    draws: int = 5
    shown: int = 12
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("images", "layer_images", "share_images", "shift_images", "mic_images", "batch")
        check_ranges(
            self,
            {
                **{name: (getattr(self, name) >= 1, "1 or more") for name in counts},
                "windows": (self.windows >= 2 and self.windows % 2 == 0, "an even number of 2 or more"),
                "draws": (self.draws >= 2, "2 or more"),
                "shown": (self.shown >= 0, "0 or more"),
                "mic_channels": (self.mic_channels is None or self.mic_channels >= 1, "1 or more, or None for all"),
                "layers": (not isinstance(self.layers, str) or self.layers == "all", "'all' or block indices"),
            },
        )


@dataclass(frozen=True)
class DoctorConfig:
    """Set what counts as an artifact, and how many images are measured.

    Args:
        images: largest number of images, evenly spread over the given ones.
        windows: torus windows per image, an even number.
        product_images: largest number of images that products of stage one are compared on; each window of each takes
            dozens of passes of the backbone.
        product_windows: torus windows of each of these images, an even number.
        share: least share of the variance that stays at the position for a position artifact. Two patches of equal
            content at different positions then have a cosine of .95 instead of 1, about the size of what
            quantising or resizing does; a random ViT has .01, trained ones with the artifact .2 and more.
        outliers: least share of tokens for a norm artifact, a tenth of the 2.37 % that Darcet et al. count in
            DINOv2-g.
        ratio: least norm of an outlier, as a multiple of the median norm.
        layout: R^2 of position predicted from photographs without the artifact; from this value on, the content
            itself counts as a cue of position.
        draws: random draws for the nulls.
        seed: seed of windows and nulls.
    """

    images: int = 16
    windows: int = 16
    product_images: int = 4
    product_windows: int = 4
    share: float = 0.05
    outliers: float = 0.0025
    ratio: float = 2.0
    layout: float = 0.2
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        even = "an even number of 2 or more"
        check_ranges(
            self,
            {
                "images": (self.images >= 1, "1 or more"),
                "windows": (self.windows >= 2 and self.windows % 2 == 0, even),
                "draws": (self.draws >= 2, "2 or more"),
                "product_images": (self.product_images >= 1, "1 or more"),
                "product_windows": (self.product_windows >= 2 and self.product_windows % 2 == 0, even),
                "share": (0 < self.share < 1, "between 0 and 1"),
                "outliers": (0 < self.outliers < 1, "between 0 and 1"),
                "ratio": (self.ratio > 1, "above 1"),
            },
        )


@dataclass(frozen=True)
class HeadConfig:
    """Set how a head is trained on frozen tokens.

    Args:
        epochs: passes over the training images.
        batch: images per step.
        learning_rate: peak learning rate of AdamW, in a one-cycle schedule.
        weight_decay: weight decay of AdamW.
        labels_per_patch: training targets are reduced (nearest) to this many per patch side; 0 keeps every pixel.
            Scores are always computed at every pixel.
        seed: seed of the head's initial weights and of the order of the images.
    """

    epochs: int = 25
    batch: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    labels_per_patch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "epochs": (self.epochs >= 1, "1 or more"),
                "batch": (self.batch >= 1, "1 or more"),
                "labels_per_patch": (self.labels_per_patch >= 0, "0 or more"),
                "learning_rate": (self.learning_rate > 0, "above 0"),
                "weight_decay": (self.weight_decay >= 0, "0 or more"),
            },
        )

    def with_seed(self, seed: int) -> HeadConfig:
        """Copy the settings with another seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class ProbeConfig:
    """Choose a probe, its data and its protocol.

    Args:
        task: "segmentation" (linear head), "knn" (segmentation by nearest centroids), "depth", "classification"
            (linear, whole images), "knn-classification", "discovery" (one box per image, nothing is learnt) or
            "correspondence" (matches between an image and warped views of it, nothing is learnt).
        data: folder of the labelled data; any images for correspondence.
        layout: the layout of the folder: cityscapes, voc, ade20k, camvid, nyuv2, folder or categories; "auto"
            recognises it.
        ignore: further label ids to ignore, besides those of the layout.
        classes: number of classes; None finds it in the labels.
        protocol: "frames" takes whole images; "crops" takes one random square of each image, .5 to .65 of its height,
            in training and test, so that layout is less of a cue.
        evaluate: the split to score; None means test, or val if there is no test.
        train_images, test_images: largest number of images, evenly spaced; None takes all.
        seeds: number of runs of a probe that draws random numbers, or of draws of the warps of correspondence.
        head: training settings of a linear head.
        bins: spacing of depth bins, even in the logarithm of depth or in depth.
        neighbours: number of neighbours that vote in the probes without training.
        method: method of discovery.
        centred: for discovery, subtract each image's mean token first [ours]. Denoised tokens are known only up to a
            constant vector, and both methods depend on the origin; False takes tokens as the papers take keys.
        position: put the position back into all features: "none", "concatenate" or "add".
        baselines: rows beside raw: "position-only" (coordinates alone), "random" (noise), "subtract" (less the
            training images' mean map), "linear-removal" (without the directions that tell position),
            "view-averaging" (the mean over `views` random crops of .1 to .5) and "ph-reg" (over as many shifts of at
            most 15 %, mirrored or not, at one scale, as PH-Reg's teacher takes).
        upsample: also score each row's features this many times finer, guided by the images (:func:`dvt.upsample`), in
            a row of its own; without it only the scores of classes are enlarged, bilinearly. For label and depth maps.
        transfer: also score the probe of raw features on each variant, and each variant's probe on raw features.
        views: number of views for view averaging, besides the whole image.
        depth_scale: units of a depth map per metre (KITTI 256, NYU 1000); None means 1000 for whole numbers and 1 for
            floats.
        min_depth, max_depth: range in metres of the depths that are learnt and scored; None sets no upper end. The
            field takes 1e-3 to 10 in NYU and to 80 in KITTI.
        depth_crop: part of the image that depth is scored in: "nyu" (Eigen's, of 480 x 640), "eigen" or "garg" (of
            KITTI), as shares of the image's sides.
        masks: label maps are masks: 0 is class 0, whatever else (1, 255, a set bit) is class 1.
        class_token: append each image's class token to each of its patch tokens, as DINOv2's linear depth head does.
        seed: seed of the crops, the views and the first probe.
        cache: folder for features and crops; None is the user's cache folder.
    """

    task: Task
    data: Path
    layout: str = "auto"
    ignore: tuple[int, ...] = ()
    classes: int | None = None
    protocol: Literal["frames", "crops"] = "frames"
    evaluate: Literal["val", "test"] | None = None
    train_images: int | None = None
    test_images: int | None = None
    seeds: int = 3
    head: HeadConfig = HeadConfig()
    bins: Literal["log", "linear"] = "log"
    neighbours: int = 20
    method: Literal["lost", "tokencut"] = "lost"
    centred: bool = True
    position: Literal["none", "concatenate", "add"] = "none"
    baselines: tuple[Baseline, ...] = ("position-only",)
    upsample: int = 1
    transfer: bool = False
    views: int = 10
    depth_scale: float | None = None
    min_depth: float = 0.0
    max_depth: float | None = None
    depth_crop: DepthCrop = "none"
    masks: bool = False
    class_token: bool = False
    seed: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        choices = {
            "task": (*TARGETS, "correspondence"),
            "method": ("lost", "tokencut"),
            "protocol": ("frames", "crops"),
            "evaluate": (None, "val", "test"),
            "bins": ("log", "linear"),
            "depth_crop": get_args(DepthCrop),
            "position": ("none", "concatenate", "add"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise ConfigError(f"there is no baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")
        for name in ("seeds", "neighbours", "views", "train_images", "test_images", "upsample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if not 0 <= self.min_depth < (self.max_depth or float("inf")):
            raise ConfigError(f"depths from {self.min_depth} to {self.max_depth} m hold nothing; give a wider range")
        if self.depth_crop != "none" and self.protocol == "crops":
            raise ConfigError("depth_crop is a part of whole frames; leave it or --protocol crops out")
        if self.class_token and self.task in ("discovery", "correspondence"):
            raise ConfigError(f"{self.task} compares patches, whose class token is the same; leave class_token out")
        if self.protocol == "crops" and TARGETS.get(self.task) not in ("labels", "depth"):
            raise ConfigError(f"{self.task} takes whole images only; crops need label or depth maps")
        if self.upsample > 1 and TARGETS.get(self.task) not in ("labels", "depth"):
            raise ConfigError(f"{self.task} has no map to score at a finer grid; upsample is for label and depth maps")
        if self.transfer and self.task in ("discovery", "correspondence"):
            raise ConfigError(f"{self.task} learns nothing, so there is no probe to transfer")
