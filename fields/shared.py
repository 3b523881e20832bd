"""One artifact for many images of a grid shape, by adding their reduced equations."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from dvt.backbones import Backbone
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import TokenViews, closed_form
from dvt.grids import Size
from dvt.images import load_image, read_image
from dvt.jobs.reduction import Reduction, tree_sum
from dvt.store import ImageEntry

log = logging.getLogger(__name__)

#: Reduced normal equations of a shared artifact, summed over one or more images: the matrix (n, n), the right-hand side
#: (n, C), and the grid shape (h, w) of the images.
SharedEquations = tuple[tuple[Tensor, Tensor], Size]


class SharedArtifact(Reduction):
    """Fit the artifact that best explains the first images of a grid shape, in closed form.

    Each image keeps a field of its own; their reduced equations for the artifact add up.

    Args:
        backbone: its device is used.
        config: settings; `shared_images` is how many images take part.
    """

    def __init__(self, backbone: Backbone, config: DenoiseConfig):
        super().__init__(config.shared_images)
        self.backbone, self.config = backbone, config

    def part(self, image: ImageEntry) -> SharedEquations | None:
        """Compute one image's reduced equations; None if the image cannot be used."""
        try:
            return self.equations(load_image(image.path, image.sha256))
        except (ImageError, NonFiniteError) as error:  # the job reports it when it comes to this image
            log.debug("left out of the shared artifact: %s", error)
            return None

    def equations(self, pixels: Tensor) -> SharedEquations:
        """Compute the reduced equations of an image (3, H, W)."""
        views = TokenViews(self.backbone, pixels, self.config.views, self.config.dtype)
        left, right = closed_form(self.config).artifact_equations(views)
        return (left.cpu(), right.cpu()), views.whole.grid

    @staticmethod
    def add(first: SharedEquations, second: SharedEquations) -> SharedEquations:
        """Add the equations of two sets of images.

        Raises:
            ConfigError: the images differ in grid shape.
        """
        (left, grid), (right, other) = first, second
        if grid != other:
            raise ConfigError(f"a shared artifact needs images of one grid shape, got {grid} and {other}")
        return (left[0] + right[0], left[1] + right[1]), grid

    def finish(self, total: SharedEquations) -> Tensor:
        """Solve the summed equations for the artifact (h, w, C)."""
        (left, right), grid = total
        device = self.backbone.device
        return closed_form(self.config).solve_shared((left.to(device), right.to(device)), grid)


def shared_artifact(backbone: Backbone, images: Iterable[str | Path | Tensor], config: DenoiseConfig) -> Tensor:
    """Fit the one artifact (h, w, C) that explains many images of one grid shape best.

    Args:
        backbone: its device is used.
        images: paths, or (3, H, W) RGB in [0, 1]; all are used.
        config: settings of views and of the linear solver.

    Raises:
        ImageError: there is no image.
        ConfigError: the images differ in grid shape.
    """
    shared = SharedArtifact(backbone, config)
    pixels = (read_image(image) for image in images)
    if (total := tree_sum((shared.equations(each) for each in pixels), shared.add)) is None:
        raise ImageError("no image was given; a shared artifact needs at least one")
    return shared.finish(total)
