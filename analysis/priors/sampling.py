"""Draw samples from the folder of a trained prior, as a sheet beside held-out images or as files and arrays."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.pictures import pca_colours, save
from dvt.analysis.priors.config import Sampling
from dvt.analysis.priors.diffusion import Restart, Sampled, ddim, heun, restart
from dvt.analysis.priors.heads import Sampler
from dvt.analysis.priors.prior import Prior, sampling_sigmas
from dvt.analysis.priors.run_folder import PriorRun, open_run
from dvt.analysis.priors.token_set import BATCH, Rows
from dvt.errors import ConfigError
from dvt.files import whole_file

_NOISE_DRAWS = 8  # draws of noise per held-out image in a validation
_SAMPLED = 64  # maps at a time
_TILE, _GAP = 96, 4  # pixels of a picture of samples


_SAMPLERS: dict[str, Sampler] = {
    "heun": heun,
    "ddim": partial(ddim, eta=1.0),
    "restart": partial(restart, intervals=(Restart(0.3, 2.0, 5, 4),)),
}


def draw_maps(sampling: Sampling, prior: Prior, conditions: Tensor | None, count: int) -> Sampled:
    """Draw `count` maps, one per condition (count, M, C), in batches; also return the number of network calls."""
    device = next(prior.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    parts, calls = [], 0
    for start in range(0, count, _SAMPLED):
        many = min(_SAMPLED, count - start)
        given = None if conditions is None else conditions[start : start + many].to(device)
        maps, more = prior.sample(
            given,
            generator,
            many,
            sampler=_SAMPLERS[sampling.sampler],
            sigmas=sampling_sigmas(sampling.steps),
            guidance=sampling.guidance,
            steps=sampling.ar_steps,
            temperature=sampling.temperature,
            rising=sampling.rising,
        )
        parts.append(maps)
        calls += more
    return torch.cat(parts), calls


def sample_prior(
    run_dir: str | Path,
    out: str | Path | None = None,
    images: int = 8,
    samples: int = 4,
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Draw samples for held-out images, each shown beside the image that its condition comes from.

    Args:
        run_dir: a run's folder, from :func:`train_prior`.
        out: the .png file to write; None for samples.png in the run's folder.
        images: the largest number of rows, each with one held-out image.
        samples: number of samples per row.
        sampling: settings for drawing samples.
        device: None takes a GPU if there is one.

    Returns:
        A report ready for JSON: path, counts, calls of the network.
    """
    if out is not None and Path(out).suffix != ".png":
        raise ConfigError(f"a sheet of samples is written to a .png file, got {str(out)!r}")
    if images < 1 or samples < 1:
        raise ConfigError(f"images and samples must be at least 1, got {images} and {samples}")
    run, out = open_run(run_dir, device), Path(out or Path(run_dir) / "samples.png")
    images = min(images, len(run.names))
    # Evenly over the held-out images, which lie in the order of their folders, such as classes.
    shown = [number * len(run.names) // images for number in range(images)]
    rows = [row for row in shown for _ in range(samples)]
    maps, calls = draw_maps(sampling or Sampling(), run.prior, run.conditions(rows), len(rows))
    save(_figure(run, run.target.decode(maps).cpu(), shown, samples), out)
    return {"out": str(out), "images": images, "samples": samples, "calls": calls}


def write_samples(
    run_dir: str | Path,
    out: str | Path,
    conditions: Tensor | None,
    count: int = 4,
    sampling: Sampling | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Draw samples and write them as files: NNNN-SS.png each, and samples.npz with all maps and pictures.

    Args:
        run_dir: a run's folder, from :func:`train_prior`.
        out: a folder, which is created.
        conditions: (n, M, C), each sampled `count` times; None for a prior without a condition.
        count: samples per condition.
        sampling: settings for drawing samples.
        device: None takes a GPU if there is one.

    Returns:
        A report ready for JSON: folder, files, calls of the network.
    """
    from PIL import Image

    if count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    run, out = open_run(run_dir, device), Path(out)
    repeated = None if conditions is None else conditions.repeat_interleave(count, 0)
    maps, calls = draw_maps(sampling or Sampling(), run.prior, repeated, count if repeated is None else len(repeated))
    pictures = run.pictures_of(maps).cpu()
    files = [out / f"{row // count:04}-{row % count:02}.png" for row in range(len(pictures))]
    for path, picture in zip(files, pictures, strict=True):
        with whole_file(path) as part:
            pixels = (255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(part, "PNG")
    with whole_file(out / "samples.npz") as part, part.open("wb") as file:
        np.savez(file, maps=run.target.restore(maps).cpu().numpy(), pictures=pictures.numpy())
    return {"out": str(out), "files": [str(path) for path in files], "calls": calls}


def _figure(run: PriorRun, generated: Tensor, shown: list[int], samples: int) -> Any:
    """Draw rows of some held-out images with their samples; features are coloured like the real ones."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    images = len(shown)
    first = [picture.float().permute(1, 2, 0) for picture in run.held["pictures"][shown]]
    columns = [first]
    if run.target.kind == "features":
        reals = list(run.target.restore(run.held["maps"][shown]))
        colours = pca_colours(reals, *generated)
        columns.append(colours[:images])
        flat = colours[images:]
    else:
        flat = [picture.permute(1, 2, 0) for picture in generated]
    columns += [flat[k::samples] for k in range(samples)]

    condition = (
        "held-out image" if run.prior.config.condition_dim is None else f"condition: {run.prior.card['condition']}"
    )
    titles = [condition, *(["its features"] if len(columns) > samples + 1 else []), "samples"]
    side = math.ceil(_TILE / len(first[0])) * len(first[0])  # a multiple, so that pixels stay squares
    tiles = [_tile(column[row], side) for row in range(images) for column in columns]
    sheet = make_grid(torch.stack(tiles), len(columns), padding=_GAP, pad_value=1.0).permute(1, 2, 0)
    height, width = sheet.shape[0] / 100, sheet.shape[1] / 100
    figure = Figure(figsize=(width, height + 0.25), facecolor="white")
    axis = figure.add_axes((0, 0, 1, height / (height + 0.25)))
    axis.imshow(sheet.numpy(), interpolation="nearest")
    axis.set_axis_off()
    for column, title in enumerate(titles):
        axis.text(column * (side + _GAP) + _GAP, -4, title, fontsize=8)
    return figure


def _tile(picture: Tensor, side: int) -> Tensor:
    """Enlarge (h, w, 3) to (3, side, side), with pixels as squares."""
    return functional.interpolate(picture.clamp(0, 1).permute(2, 0, 1)[None].float(), (side, side), mode="nearest")[0]


@torch.no_grad()
def held_out_loss(prior: Prior, maps: Rows, conditions: Rows | None, draws: int = _NOISE_DRAWS) -> float:
    """Average the loss of held-out images, over images and over `draws` fixed draws of noise for each."""
    device, total, count = next(prior.parameters()).device, 0.0, 0
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(draws):
        for start in range(0, len(maps), BATCH):
            rows = list(range(start, min(start + BATCH, len(maps))))
            part = maps[rows].to(device).float()
            given = None if conditions is None else conditions[rows].to(device)
            total += float(prior.loss(part, given, generator)) * len(part)
            count += len(part)
    return total / count
