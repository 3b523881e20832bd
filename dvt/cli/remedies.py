"""Run `dvt remedy`, which makes denoisers without training, and fit all remedies for `dvt doctor`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dvt.cli.common import progress_bar, resolved, shown
from dvt.cli.settings.common import BackboneOptions, variant_of
from dvt.cli.settings.remedies import FindRemedy
from dvt.denoiser.remedies.config import WITHOUT_IMAGES
from dvt.errors import ImageError
from dvt.files import writable
from dvt.images import find_images

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.progress import Progress


def remedy(command: FindRemedy, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt remedy`; the exit code is 0 when the denoiser is written."""
    from dvt.denoiser.remedies.job import fit_remedy

    if not command.images and command.remedy not in WITHOUT_IMAGES:
        raise ImageError(
            f"the remedy {command.remedy} needs images, and none was given; ten photographs are enough. These remedies "
            f"need no images: {' or '.join(WITHOUT_IMAGES)}"
        )
    paths = find_images(command.images) if command.images else []
    settings = resolved(command, command="remedy", images=paths)
    out, backbone = writable(command.out), command.load()
    with progress_bar(console) as progress:
        denoiser = fit_remedy(command.remedy, backbone, paths, command.settings, progress)
    denoiser.save_pretrained(out)
    found = {key: value for key, value in denoiser.card.items() if key not in _ABOUT_BACKBONE}
    for key, value in found.items():
        console.print(f"{key.replace('_', ' ')}: {shown(value)}")
    console.print(f"denoiser: {shown(str(out))}; give it to any command with --denoiser")
    return 0, {"out": str(out), "card": denoiser.card, "settings": settings}


_ABOUT_BACKBONE = ("backbone", "layer", "stride", "feature_dim", "weights_sha256")


def compared(
    command: BackboneOptions, backbone: Backbone, paths: Sequence[Path], given: Sequence[str], progress: Progress
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Fit each remedy of a backbone for the doctor.

    Remedies are fitted to every second image, so that the doctor also judges them on other images. With a single image,
    only remedies without images are fitted.

    Returns:
        By name: the denoisers as variants, the commands that make them, and the reasons why others are missing.
    """
    from dvt.denoiser.remedies.job import fit_remedies

    found, refused = fit_remedies(backbone, paths[::2] if len(paths) > 1 else [], progress=progress)
    lines = {
        name: shlex.join(["dvt", "remedy", name, *([] if name in WITHOUT_IMAGES else given), *_options(command)])
        + f" --out {name}.safetensors"
        for name in found
    }
    return {name: variant_of(each, backbone) for name, each in found.items()}, lines, refused


def product_command(product: str, command: BackboneOptions, given: Sequence[str]) -> str:
    """Write the command that makes a product of stage one of the images given."""
    return shlex.join(["dvt", "denoise", *given, *_options(command), "--product", product, "--out", "features"])


def remedy_commands(remedy: str, command: BackboneOptions, given: Sequence[str]) -> tuple[str, ...]:
    """Write the commands that carry out what the doctor advises for the images given."""
    train = "dvt train features --out denoiser.safetensors"
    commands = {
        "subtract": (product_command("removed", command, given), f"{train} --kind subtract"),
        "per image": (product_command("removed", command, given),),
        "denoiser": (product_command("ensembled", command, given), train),
    }
    return commands.get(remedy, ())


def _options(command: BackboneOptions) -> list[str]:
    """List the options that name the backbone, as they were given."""
    weights = [] if command.weights is None else ["--weights", command.weights]
    changed = [f"--{name}={value}" for name in ("layer", "stride", "size") if (value := _changed(command, name))]
    return ["--backbone", command.backbone, *weights, *changed]


def _changed(command: BackboneOptions, name: str) -> Any:
    value = getattr(command, name)
    return None if value in (None, BackboneOptions.__dataclass_fields__[name].default) else value
