"""Run `dvt show`: draw features in PCA colours that are the same over all images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from dvt.cli.common import progress_bar, resolved
from dvt.cli.settings.show import Show
from dvt.errors import BackboneError, ConfigError, ImageError
from dvt.images.members import film_of, member_title
from dvt.images.own import is_store
from dvt.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from dvt.analysis.gallery import ShownImage
    from dvt.grids import Size
    from dvt.progress import Progress
    from dvt.store import FeatureStore


def show(command: Show, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt show`; the exit code is 0 when the pictures are written."""
    command.check_clean()
    if command.count < 1:
        raise ConfigError(f"count is {command.count}; it must be 1 or more")
    from dvt.analysis.gallery import pca, save_clip, save_gallery

    stored = len(command.sources) == 1 and is_store(command.sources[0])
    with progress_bar(console) as progress:
        images = list((_stored if stored else _computed)(command, progress))
    colours = pca(images, command.foreground, command.upsample)
    written = save_gallery(images, colours, command.out)
    if len(images) > 1 and images[0].film is not None and len({image.film for image in images}) == 1:
        written.append(save_clip(images, colours, command.out / "clip.webp"))
        console.print(f"the frames as a film: {escape(str(written[-1]))}")
    what = f"{counted(len(images), 'image')}, {', '.join(images[0].maps)}"
    console.print(f"{what}: {escape(str(command.out / 'index.html'))}")
    result = {"images": len(images), "terms": list(images[0].maps), "files": [str(path) for path in written]}
    return 0, {**result, "settings": resolved(command, command="show")}


def _stored(command: Show, progress: Progress) -> Iterator[ShownImage]:
    """Yield each image of a store, with its photograph if the file is still at its path."""
    import torch

    from dvt.analysis.gallery import ShownImage
    from dvt.analysis.probes.datasets import pick
    from dvt.images import load_image
    from dvt.store import FeatureStore

    store = FeatureStore(command.sources[0])
    resolved(command, command="show", images=store.images)
    terms = command.terms or store.terms
    chosen = pick(range(len(store)), command.count)
    centres = _patch_centres(store, needed=command.upsample > 1)
    for done, i in enumerate(chosen, 1):
        record = store.record(i)
        maps = {term: torch.from_numpy(store.read(i, term)).float() for term in terms}
        try:
            pixels = load_image(record.path)
        except ImageError:
            pixels = None
        places = None if centres is None else centres(store.grids[i])
        yield ShownImage(member_title(record.path), maps, pixels, film_of(record.path), places)
        progress("images", done, len(chosen))


def _patch_centres(store: FeatureStore, needed: bool) -> Callable[[Size], Tensor] | None:
    """Return what finds the patch centres of a store's grids; None where patches tile the image."""
    from functools import partial

    from dvt import grids
    from dvt.backbones.families import pair
    from dvt.backbones.load import overlapping_patches

    try:
        found = overlapping_patches(store.job, store.grids[0], needed)
        return None if found is None else partial(grids.overlapping_centres, patch=found[0], stride=found[1])
    except BackboneError as error:
        stride = pair(store.job.stride)  # type: ignore[arg-type]
        raise ConfigError(
            f"the patches of {str(store.path)!r} overlap (stride {stride[0]} x {stride[1]}), and to upsample their "
            f"maps the size of a patch is needed, which the name {store.job.backbone!r} does not tell: {error}. Show "
            "the maps without --upsample, or in Python call dvt.upsample(..., centres=backbone.grid_centres(grid))"
        ) from error


def _computed(command: Show, progress: Progress) -> Iterator[ShownImage]:
    """Yield each photograph's raw features, and its clean features from a denoiser or from stage one."""
    from dvt.analysis.gallery import ShownImage
    from dvt.analysis.probes.datasets import pick
    from dvt.images import find_images, load_image

    paths = pick(find_images(command.sources), command.count)
    resolved(command, command="show", images=paths)
    backbone = command.load()
    for done, path in enumerate(paths, 1):
        pixels = load_image(path)
        maps = command.terms_of(backbone, pixels)
        if unknown := set(command.terms) - set(maps):
            raise ConfigError(f"there is no term {sorted(unknown)[0]!r}; choose from {', '.join(maps)}")
        chosen = {term: maps[term] for term in command.terms or maps}
        grid = next(iter(maps.values())).shape
        centres = backbone.grid_centres((grid[0], grid[1]))
        yield ShownImage(member_title(path), chosen, pixels, film_of(path), centres)
        progress("images", done, len(paths))
