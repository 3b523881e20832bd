"""`dvt denoise`, `dvt inspect` and `dvt demo`: stage one and its store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import dvt
from dvt.cli.beside import check_upsample, fine_suffix, load_upsampler, names_beside, write_index, write_map
from dvt.cli.common import progress_bar, resolved, shown
from dvt.cli.jobs import print_job, run_job
from dvt.cli.settings.denoise import Demo, Denoise, Inspect
from dvt.devices import find_device
from dvt.errors import ConfigError, DvtError
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import DecomposedImage
from dvt.fields.images import DecomposeWork
from dvt.fields.tiled import TiledDecomposeWork
from dvt.images import find_sources, is_url, read_image
from dvt.images.own import is_store
from dvt.jobs.work import Work
from dvt.progress import is_first_process
from dvt.store import FeatureStore, damaged_shards
from dvt.text import counted, visible
from dvt.tokens import Tokens

if TYPE_CHECKING:
    import torch

_ABOUT_R2 = (
    "position R²: how well a patch's place is read from its features, on images not seen: 1 is exactly, 0 or less not "
    "at all, as it should be"
)
# Enough images for a stable probe; more would only take memory.
SCORED_IMAGES = 100

# Cells a side of a map, and pixels a side of a photograph, that are drawn and scored; of more, every n-th.
MOST_CELLS, _MOST_PIXELS = 200, 2000


def denoise(command: Denoise, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt denoise`; the exit code is 0 if every image is in the store, 2 if some could not be read."""
    check_upsample(command.upsample, command.ray, command.upsampler)
    if command.views is not None and command.views < 1:
        raise ConfigError(f"views is {command.views}; it must be 1 or more: one view cannot tell F from G, use dozens")
    config = _config(command)
    paths = find_sources(command.images)
    _check_terms(command)
    settings = resolved(command, command="denoise", images=paths)
    views = f"{config.views.count} {config.views.kind}"
    head = f"{shown(command.backbone)}: {counted(len(paths), 'image')}, {views}, {command.solver} solver"
    each = None if command.ray is not None else _Writer(command, paths)
    with progress_bar(console) as bar:
        make, begun = partial(_denoising, command, config, each), partial(console.print, head)
        summary, seconds = run_job(command, make, paths, settings, bar, begun)
    if not is_first_process():
        return (2 if summary.failed else 0), {}
    rows = [
        ("precision", settings["dtype"]),
        ("seconds in extraction", f"{summary.extraction_seconds:.1f}"),
        ("seconds in fitting", f"{summary.fitting_seconds:.1f}"),
    ]
    known = summary.done + summary.skipped > 0 and not is_url(command.out)
    position = _position(Path(command.out)) if known else {}
    for term, score in position.items():
        text = f"{score['value']:.3f} (chance {score['low']:.3f} to {score['high']:.3f})"
        rows.append((f"position R², {term}", text))
    result = print_job(console, command, summary, seconds, rows)
    if each is not None:
        each.finish(console, summary.failed)
    if position:
        few = "With one image the probe is scored on its own tokens, which flatters it: use ten or more."
        console.print(f"[dim]{_ABOUT_R2 if summary.done + summary.skipped > 1 else few}[/]")
    return (2 if summary.failed else 0), {**result, **({"position": position} if known else {})}


def _check_terms(command: Denoise) -> None:
    """Refuse --keep-terms for a store whose shards lack the terms: they stay as they are."""
    made = command.keep_terms and not is_url(command.out) and is_store(command.out)
    if made and "artifact" not in FeatureStore(command.out).terms:
        raise ConfigError(
            f"the store {command.out!r} was made without --keep-terms, and its shards are not made again: leave "
            "--keep-terms out, or give another --out"
        )


def _denoising(command: Denoise, config: DenoiseConfig, on_image: _Writer | None) -> Work:
    common: dict[str, Any] = {
        "keep_terms": command.keep_terms,
        "shard_images": command.images_a_shard,
        "strict": command.strict,
        "on_image": on_image if command.pictures or command.upsample > 1 else None,
    }
    if command.tiling is not None:
        return TiledDecomposeWork(command.load_exact(), config, command.tiling, **common)
    return DecomposeWork(command.load_exact(), config, profile=command.profile, **common)


def inspect(command: Inspect, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt inspect`; the exit code is 0 if the store is sound, 2 if it is damaged or no store."""
    if is_url(command.store):
        raise ConfigError(f"{command.store!r} is a URL; `dvt inspect` reads folders only: copy the store to one first")
    damaged = {str(path): reason for path, reason in damaged_shards(command.store).items()} if command.verify else {}
    summary = {} if damaged else FeatureStore(command.store).summary()
    if summary:
        _print_summary(console, command.store, summary)
    for path, reason in damaged.items():
        console.print(f"[bold red]damaged[/] {shown(path)}: {shown(reason)}")
    if command.verify and not damaged:
        console.print("all checksums are correct")
    return (2 if damaged else 0), {**summary, "damaged": damaged}


def _print_summary(console: Console, store: str, summary: dict[str, Any]) -> None:
    console.print(shown(store))
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # nothing is cut off
    for name, value in summary.items():
        text = json.dumps(value, indent=1) if isinstance(value, dict) else visible(str(value))
        table.add_row(name.replace("_", " "), escape(text))
    console.print(table)


def demo(command: Demo, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt demo`: all of stage one, on bundled photographs."""
    photos = Path(dvt.__file__).parent / "data" / "photos"
    job = Denoise(
        images=(str(photos),),
        out=str(command.out),
        weights="demo",
        views=command.views,
        device=command.device,
        json=command.json,
        keep_terms=True,
    )
    code, result = denoise(job, console)
    console.print(f"point at its patches with `dvt view {shown(str(command.out))}`; `dvt inspect` lists it")
    return code, result


def _config(command: Denoise) -> DenoiseConfig:
    config = DenoiseConfig(
        views=command.views,  # type: ignore[arg-type]
        product=command.product,  # type: ignore[arg-type]
        strength=command.strength,
        solver=command.solver,
        linear=dataclasses.replace(command.linear, seed=command.seed),
        neural=dataclasses.replace(command.neural, seed=command.seed),
        shared_artifact=command.shared_artifact,
        shared_images=command.shared_images,
        dtype=command.precision,
        solve_images=command.solve_images,
        overlap={"auto": None, "on": True, "off": False}[command.overlap],
    )
    return dataclasses.replace(config, views=dataclasses.replace(config.views, seed=command.seed, batch=command.batch))


class _Writer:
    """Write each image's picture and upsampled features next to the store."""

    def __init__(self, command: Denoise, paths: Sequence[Path | str]):
        self.command, self.out = command, Path(command.out)
        self.names = names_beside(paths)
        self.suffix = fine_suffix(command.upsample, command.upsampler)
        self.finer = load_upsampler(command.upsampler, find_device(command.device))

    def __call__(self, path: Path, pixels: torch.Tensor, result: DecomposedImage) -> None:
        name = self.names[path]
        if self.command.pictures:
            self._picture(self.out / "pictures" / f"{name}.png", pixels, result)
        if self.command.upsample > 1:
            semantic = result.decomposition.semantic.float()
            fine = self.finer(semantic, read_image(pixels), self.command.upsample, result.coords)
            write_map(self.out / "upsampled" / f"{name}{self.suffix}", fine)

    def finish(self, console: Console, failed: Sequence[tuple[str, str]]) -> None:
        """Write the index of each folder, and report the files that are missing there though their images are not."""
        wanted = {
            "pictures": (".png", self.command.pictures),
            "upsampled": (self.suffix, self.command.upsample > 1),
        }
        for folder, (suffix, asked) in wanted.items():
            if asked:
                write_index(console, self.out / folder, self.names, suffix, failed)

    def _picture(self, target: Path, pixels: torch.Tensor, result: DecomposedImage) -> None:
        from dvt.analysis.pictures import decomposition_figure, save

        raw, semantic, artifact, residual = (_thinned(each).cpu() for each in result.decomposition.terms().values())
        pixels = read_image(_thinned(pixels.movedim(0, -1), _MOST_PIXELS).movedim(-1, 0)).cpu()
        terms = (raw, semantic, artifact, residual if residual.any() else None)
        save(decomposition_figure(pixels, *terms, centres=_thinned(result.coords).cpu()), target)


def _thinned(values: torch.Tensor, most: int = MOST_CELLS) -> torch.Tensor:
    """Take every n-th cell of a map (h, w, C) that has more than a number of rows or columns."""
    every = -(-max(values.shape[:2]) // most)
    return values[::every, ::every]


def _position(store: Path) -> dict[str, dict[str, float]]:
    """Measure how well a linear probe reads the patch position from raw and semantic tokens, beside the null."""
    import torch

    from dvt.analysis import position_decodability, with_null

    scores = {}
    for term in ("raw", "semantic"):
        maps = FeatureStore(store, term, dtype=None)
        some = [_thinned(maps[index].patches[0])[None].float() for index in range(min(len(maps), SCORED_IMAGES))]
        tokens = [Tokens(each, each.new_empty(1, 0, each.shape[-1])) for each in some]
        if min(min(each.grid) for each in tokens) >= 2:
            generator = torch.Generator().manual_seed(0)
            with suppress(DvtError):  # a handful of tokens may not be enough for a score
                scores[term] = dataclasses.asdict(with_null(position_decodability, tokens, generator))
    return scores
