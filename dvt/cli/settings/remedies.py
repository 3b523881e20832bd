"""Hold the settings of `dvt remedy`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dvt.cli.settings.common import BackboneOptions
from dvt.denoiser.remedies.config import Remedy, RemedyConfig


@dataclass(frozen=True)
class FindRemedy(BackboneOptions):
    """Make a denoiser without training: one of the remedies that `dvt doctor --remedies` compares.

    registers and defect remove tokens of outlying norm; noise, insid3 and rasa remove artifacts of position. noise and
    insid3 need no images. Use the file like a trained denoiser, with --denoiser.
    """

    remedy: tyro.conf.Positional[Remedy]
    """registers: test-time registers; defect: remove the direction of outliers; noise: subtract the mean of noise
    images; insid3: remove directions of position in noise images; rasa: remove directions from which probes read
    position."""
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders (searched recursively), globs, or a .txt list of paths; no labels are needed, ten are enough."""
    out: Path = Path("denoiser.safetensors")
    """The .safetensors file to write."""
    settings: Annotated[RemedyConfig, tyro.conf.arg(name="")] = field(default_factory=RemedyConfig)
    """Settings of the remedy."""
