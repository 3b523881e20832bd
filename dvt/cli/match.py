"""Run `dvt match`: find matching places in two photographs, by raw and by clean features."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from dvt.cli.common import resolved, save_json
from dvt.cli.settings.show import MatchCommand
from dvt.files import writable


def match(command: MatchCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt match`; the exit code is 0 when picture and pairs are written."""
    import torch

    from dvt.analysis.matching import match_images, save_matches
    from dvt.images import load_image
    from dvt.upsampling import upsample

    command.check_clean()
    settings = resolved(command, command="match")
    writable(command.out / "matches.json")
    pixels = load_image(command.first), load_image(command.second)
    backbone = command.load()
    terms = [command.terms_of(backbone, each) for each in pixels]
    points = torch.tensor(command.points) if command.points else None
    found = {}
    for name in terms[0]:
        maps = [term[name] for term in terms]
        centres = [backbone.grid_centres((each.shape[0], each.shape[1])) for each in maps]
        if command.upsample > 1:  # to cells that tile the image
            given = zip(maps, pixels, centres, strict=True)
            maps = [upsample(each, image, command.upsample, centres=places) for each, image, places in given]
        ends = None if command.upsample > 1 else (centres[0], centres[1])
        found[name] = match_images(maps[0], maps[1], points, command.ratio, ends)
        console.print(f"{name}: {len(found[name])} matches")
    picture = save_matches(pixels, found, command.out / "matches.png")
    result = {"matches": {name: each.to_json() for name, each in found.items()}, "settings": settings}
    save_json(command.out / "matches.json", result)
    console.print(f"picture: {escape(str(picture))}")
    return 0, {**result, "picture": str(picture)}
