"""Run `dvt search`: find images of a store that look like a photograph, or like a part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape

from dvt.cli.common import progress_bar, resolved, save_json
from dvt.cli.settings.show import SearchCommand
from dvt.errors import ConfigError, ImageError
from dvt.files import writable


def search(command: SearchCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt search`; the exit code is 0 when picture and list are written."""
    from dvt.analysis.pictures import save
    from dvt.analysis.search import search as found_in
    from dvt.analysis.search import search_figure
    from dvt.analysis.search_index import SearchIndex
    from dvt.images import load_image
    from dvt.store import FeatureStore

    command.check_clean()
    if command.upsample > 1:
        raise ConfigError("search compares whole patches; leave --upsample out")
    settings = resolved(command, command="search")
    held = FeatureStore(command.store)
    backbone = command.load()
    _check_backbone(held, backbone)
    writable(command.out / "search.json")
    pixels = load_image(command.query)
    maps = _as_the_store(command, held).terms_of(backbone, pixels)
    terms = [term for term in maps if term in held.terms]
    found = {}
    with progress_bar(console) as progress:
        for term in terms:
            stored = FeatureStore(command.store, term)
            centres = backbone.grid_centres
            index = None if command.index is None else SearchIndex.opened(command.index, stored, progress)
            found[term] = found_in(stored, maps[term], command.box, command.count, centres, progress, index)

    def photograph(path: str) -> Any:
        try:
            return load_image(path)
        except ImageError:
            return None

    picture = save(search_figure(pixels, command.box, found, photograph), command.out / "search.png")
    result = {"found": {term: [each.to_json() for each in best] for term, best in found.items()}, "settings": settings}
    save_json(command.out / "search.json", result)
    for term, best in found.items():
        for each in best:
            console.print(f"{term}  {each.cosine:.3f}  {escape(each.path)}", highlight=False)
    console.print(f"picture: {escape(str(picture))}")
    return 0, {**result, "picture": str(picture)}


def _as_the_store(command: SearchCommand, held: Any) -> SearchCommand:
    """Take the store's product and number of views: a photograph cleaned in another way is not even like itself."""
    config = held.job.config
    product = config.get("product") if command.product is None else command.product
    views = config.get("views", {}).get("count", 0) if command.views is None else command.views
    return replace(command, product=product, views=views)


def _check_backbone(held: Any, backbone: Any) -> None:
    """Refuse a store of another backbone, whose features cannot be compared."""
    from dvt.store import Job

    own, other = Job.of(backbone, {}), held.job
    for name in ("backbone", "weights_sha256", "layer"):
        if getattr(own, name) != getattr(other, name):
            raise ConfigError(
                f"the store {str(held.path)!r} was made with {name} {getattr(other, name)}, not {getattr(own, name)}: "
                "give the --backbone, --weights and --layer that it was made with"
            )
