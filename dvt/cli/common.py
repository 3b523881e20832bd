"""What the commands share: options of a backbone, devices, progress, settings on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

import dvt
from dvt.devices import find_device
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.text import visible

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.denoiser import Denoiser
    from dvt.tokens import Tokens

DEFAULT_BACKBONE = "vit_small_patch14_dinov2.lvd142m"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command that computes; the seed is among the settings of each."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one."""
    json: bool = False
    """Print one JSON object on standard output, everything else on standard error."""
    dry_run: bool = False
    """Print the resolved settings, and the images where the command takes some, and stop."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Options):
    """Options of every command that runs a backbone."""

    backbone: str = DEFAULT_BACKBONE
    """Name of a single-scale timm model."""
    weights: str | None = None
    """A .safetensors or .pth file instead of the hub's weights; "demo" means the small ViT that comes with dvt."""
    layer: int = -1
    """Block whose tokens are read; -1 is the last, after the final norm."""
    stride: int | None = None
    """Pixels between patches; smaller than the patch they overlap."""
    size: int | None = None
    """Shorter side of the model's input in pixels; the model's own if not given."""

    def load(self, other: str | None = None) -> Backbone:
        """Load the backbone onto its device; or `other`, with the hub's weights and otherwise the same options."""
        from dvt.backbones import load_backbone

        weights = dvt.demo_weights() if self.weights == "demo" else self.weights
        backbone = load_backbone(
            other or self.backbone,
            weights=None if other else weights,
            layer=self.layer,
            stride=self.stride,
            size=self.size,
        )
        return backbone.to(find_device(self.device))


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions(BackboneOptions):
    """Options of every command that may put a denoiser behind the backbone."""

    denoiser: str | None = None
    """File, folder or hub repository of a denoiser."""
    force: bool = False
    """Take a denoiser that was made for another backbone, layer or weights."""

    def load_denoiser(self, backbone: Backbone) -> Denoiser | None:
        """Load the denoiser onto the backbone's device and check that it belongs to it; None if none was asked for."""
        from dvt.denoiser import Denoiser

        if self.denoiser is None:
            return None
        denoiser = Denoiser.from_pretrained(self.denoiser)
        denoiser.check_fits(backbone, self.force)
        return denoiser.to(backbone.device).eval()

    def variant(self, backbone: Backbone) -> Callable[[Tokens], Tokens] | Backbone | None:
        """Load it as analyses take it: a function of Tokens or, for test-time registers, a backbone with them."""
        denoiser = self.load_denoiser(backbone)
        return None if denoiser is None else variant_of(denoiser, backbone, self.force)

    def token_function(self, backbone: Backbone) -> Callable[[Tokens], Tokens] | None:
        """Load it as a function of Tokens alone.

        Raises:
            ConfigError: the denoiser acts inside the backbone.
        """
        from dvt.backbones import Backbone as Inside

        found = self.variant(backbone)
        if isinstance(found, Inside):
            raise ConfigError(
                f"{self.denoiser} holds test-time registers, which act inside the backbone; this command takes "
                "denoisers of tokens only. export, doctor, analyze and probe take registers, and attach in Python"
            )
        return found


def variant_of(denoiser: Denoiser, backbone: Backbone, force: bool = False) -> Callable[[Tokens], Tokens] | Backbone:
    """Adapt a denoiser to what analyses take: a function of Tokens or a backbone with test-time registers."""
    import torch

    from dvt.denoiser import denoised_backbone
    from dvt.denoiser.config import INSIDE

    if denoiser.config.kind in INSIDE:
        return denoised_backbone(denoiser, backbone, force)

    def clean(tokens: Tokens) -> Tokens:
        with torch.no_grad():
            return tokens.with_patches(denoiser(tokens.patches, tokens.prefix))

    return clean


class DryRun(Exception):
    """Ends a command that was asked to print its settings and stop.

    Args:
        settings: as :func:`resolved` gives them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__("dry run")
        self.settings = settings


def shown(name: object) -> str:
    """Write a name for the terminal, where it is read and not obeyed: neither its control characters nor its markup."""
    return escape(visible(str(name)))


@contextmanager
def progress_bar(console: Console):
    """Show a progress bar; it is a callback (what, done, total)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, rate="")
            elapsed = bar.tasks[tasks[what]].elapsed or 0
            bar.update(tasks[what], completed=done, total=total, rate=f"{done / elapsed:.2f}/s" if elapsed > 0 else "")

        yield update


def plain(settings: Any, /, **found: Any) -> dict[str, Any]:
    """Write a command's settings as JSON has them, with what they were resolved to."""
    return json.loads(json.dumps({**dataclasses.asdict(settings), **found}, default=str))


def resolved(settings: Any, /, **found: Any) -> dict[str, Any]:
    """Write a command's settings as :func:`plain` does, before anything long or lasting is done.

    Raises:
        DryRun: the command was asked to stop here; :func:`dvt.cli.main` prints the settings.
    """
    values = plain(settings, **found)
    if settings.dry_run:
        raise DryRun(values)
    return values


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def quiet_unless_first(console: Console) -> Console:
    """Return the console in the first process of a distributed run, and a silent one in the others."""
    return console if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
