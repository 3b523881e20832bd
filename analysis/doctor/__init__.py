"""Examine a backbone for artifacts, and say on one page if it needs denoising and which denoiser is best."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from dvt.analysis.config import DoctorConfig
from dvt.analysis.doctor.diagnosis import Diagnosis, Treated
from dvt.analysis.doctor.examination import Examination, settled_time
from dvt.analysis.measure.sample import read_pixels, spread
from dvt.analysis.measure.types import Decompose, DenoiserLike
from dvt.errors import ImageError
from dvt.images import ImageLike, image_list, usable_images
from dvt.progress import Progress, silent

if TYPE_CHECKING:
    from dvt.backbones import Backbone

__all__ = ["Diagnosis", "DoctorConfig", "Treated", "diagnose"]


def diagnose(
    backbone: Backbone,
    images: Sequence[ImageLike] | Tensor,
    denoisers: Mapping[str, DenoiserLike] | None = None,
    config: DoctorConfig | None = None,
    *,
    commands: Mapping[str, str] | None = None,
    decompose: Decompose | None = None,
    products: Mapping[str, Decompose] | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Tell whether a backbone's tokens have artifacts, of which kind, and what to do about them.

    To separate position from layout, the content is moved: windows are cut from each image, mirrored into a torus. An
    artifact is reported if its size is above a threshold *and* its bootstrap interval lies above its null.

    Args:
        backbone: examined at its own layer, on its device.
        images: paths, or images (3, H, W) in [0, 1]; ten or more are better.
        denoisers: denoisers to try and to time, by name: functions of Tokens, or backbones with a changed model.
        config: thresholds and other settings.
        commands: for each denoiser or product, the command that makes it; the page ends with that of the best one.
        decompose: computes one image's terms, as in :func:`dvt.analysis.analyze`; called once, to time it.
        products: such functions by name, to compare with the denoisers on the first few images.
        progress: called with (what, done, total) after every image.

    Raises:
        ImageError: no image is given, or none can be read. If only some cannot be read, they are left out and logged.

    >>> import dvt
    >>> import torch
    >>> from dvt.tokens import Tokens
    >>> net = torch.nn.Conv2d(3, 8, 16, 16)
    >>> plain = dvt.wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="a convolution")
    >>> diagnose(plain, torch.rand(3, 3, 224, 224), config=DoctorConfig(windows=4)).kind
    'none'
    """
    config, denoisers = config or DoctorConfig(), dict(denoisers or {})
    given = image_list(images)
    if not given:
        raise ImageError("no image was given; the doctor needs at least one, ten or more are better")
    exam = Examination(backbone, config, denoisers, dict(products or {}))
    chosen = spread(len(given), config.images)
    chosen = [chosen[i] for i in usable_images([given[index] for index in chosen], backbone.input_size)]
    for done, index in enumerate(chosen):
        exam.add(read_pixels(given[index]), done)  # the windows of analyze
        (progress or silent)(f"doctor {backbone.name}", done + 1, len(chosen))
    seconds = None
    if decompose is not None:
        pixels, start = read_pixels(given[chosen[0]]).to(backbone.device), time.perf_counter()
        decompose(pixels)
        seconds = settled_time(backbone) - start
    found = exam.conclude(seconds)
    taken, known = found.best or found.nearest, commands or {}
    return replace(found, command=known.get(taken or ""), one_pass_command=known.get(found.one_pass or ""))
