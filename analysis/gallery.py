"""Show token maps of many images in the same colours, as pictures and as one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.files import whole_file
from dvt.upsampling import upsample

_LEVELS = 256  # candidates of a threshold on the first component
_PHOTO = 320  # pixels of a photograph's longer side on a page
_FILM, _FRAME_MS = 240, 100  # height of a film in pixels, and milliseconds of one of its frames


@dataclass(frozen=True)
class ShownImage:
    """Hold one image of a gallery.

    Args:
        name: the title.
        maps: (h, w, C) token maps by term, in the order in which they are shown.
        pixels: (3, H, W) RGB in [0, 1]; None if the photograph is not available.
        film: the video that the image is a frame of; None for other images.
        centres: (h, w, 2) of the patches, if they overlap; None means that they tile the image.
    """

    name: str
    maps: Mapping[str, Tensor]
    pixels: Tensor | None = None
    film: str | None = None
    centres: Tensor | None = None


def pca(images: Sequence[ShownImage], foreground: bool = False, factor: int = 1) -> list[dict[str, Tensor]]:
    """Colour the token maps of many images jointly: three principal components as red, green and blue.

    The same colour is the same feature in all images. Each term is centred and scaled over all images together; the
    components come from all terms, with equal weight, so that terms can be compared, too. To colour one image's maps,
    each centred by itself, see :func:`dvt.analysis.pca_colours`.

    Args:
        images: images with the same terms; grids may differ.
        foreground: split the tokens by the first component of the last term (Otsu's threshold), show only the side with
            the smaller share at the images' borders, and compute the components from it. The rest is white.
        factor: upsampling factor per side, guided by the photograph (:func:`dvt.upsample`).

    Returns:
        For each image, the (factor h, factor w, 3) colours in [0, 1] by term.

    Raises:
        ShapeError: terms or numbers of channels differ.
        ConfigError: there is no image, or an image is to be upsampled without its photograph.
        NonFiniteError: a token is NaN or infinite.

    Source: the figures of DINOv2 (Oquab et al., 2023, figure 1); the choice of the side is ours.
    """
    _check_shown(images, factor)
    scaled = _jointly_scaled(images)
    last = list(images[0].maps)[-1]
    masks = _foreground([each[last] for each in scaled]) if foreground else None
    rows = [_rows_of(each, masks, i) for i, maps in enumerate(scaled) for each in maps.values()]
    flat = torch.cat(rows)
    directions = torch.linalg.eigh(flat.T @ flat / len(flat)).eigenvectors.flip(1)[:, :3]
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    seen = flat @ directions
    low, high = torch.quantile(seen[:: max(1, len(seen) // 10**6)], seen.new_tensor([0.01, 0.99]), dim=0)
    span = (high - low).clamp_min(1e-9)
    shown = []
    for i, (image, maps) in enumerate(zip(images, scaled, strict=True)):
        part = {}
        for term, tokens in maps.items():
            colours = (tokens @ directions - low) / span
            if masks is not None:  # upsample the mask with the colours, so that its edge follows the photograph
                colours = torch.cat((colours, masks[i][..., None].to(colours)), dim=-1)
            if factor > 1:
                colours = upsample(colours, image.pixels, factor, centres=image.centres)  # type: ignore[arg-type]
            part[term] = _painted(colours, directions.shape[1], masks is not None)
        shown.append(part)
    return shown


def _check_shown(images: Sequence[ShownImage], factor: int) -> None:
    if not images:
        raise ConfigError("there is no image to show")
    if factor < 1:
        raise ConfigError(f"factor is {factor}; it must be 1 or more")
    first = {term: each.shape[-1] for term, each in images[0].maps.items()}
    for image in images:
        found = {term: each.shape[-1] for term, each in image.maps.items()}
        if found != first or not first or any(each.ndim != 3 for each in image.maps.values()):
            raise ShapeError(
                f"{image.name} has terms of channels {found} and {images[0].name} {first}; all must be (h, w, C) and "
                "the same terms, to be coloured together"
            )
        if len(set(first.values())) > 1:
            raise ShapeError(f"terms differ in channels ({first}) and have no components in common")
        if factor > 1 and image.pixels is None:
            raise ConfigError(f"the photograph of {image.name}, which guides the upsampling, is not available")
        if not all(bool(each.isfinite().all()) for each in image.maps.values()):
            raise NonFiniteError(f"tokens of {image.name} hold NaN or infinity; leave it out, or compute them again")


def _jointly_scaled(images: Sequence[ShownImage]) -> list[dict[str, Tensor]]:
    """Scale the maps of each term to mean 0 and unit variance over all images."""
    scaled: list[dict[str, Tensor]] = [{} for _ in images]
    for term in images[0].maps:
        flat = torch.cat([image.maps[term].cpu().float().flatten(0, 1) for image in images])
        mean = flat.mean(0)
        spread = (flat - mean).square().sum(-1).mean().sqrt().clamp_min(1e-9)
        for image, part in zip(images, scaled, strict=True):
            part[term] = (image.maps[term].cpu().float() - mean) / spread
    return scaled


def _foreground(maps: Sequence[Tensor]) -> list[Tensor]:
    """Split tokens by the first component, and mask (h, w) the side with the smaller share at the images' borders."""
    flat = torch.cat([each.flatten(0, 1) for each in maps])
    direction = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -1]
    values = flat @ direction
    split = _otsu(values)
    masks = [each @ direction > split for each in maps]
    border = torch.cat([torch.cat((m[0], m[-1], m[:, 0], m[:, -1])) for m in masks]).float().mean()
    inside = (values > split).float().mean()
    return masks if border <= inside else [~mask for mask in masks]


def _otsu(values: Tensor) -> float:
    """Compute Otsu's threshold: the split of numbers into two groups with the largest variance between groups."""
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, _LEVELS, low, high).double()
    centres = low + (torch.arange(_LEVELS) + 0.5).double() * (high - low) / _LEVELS
    below, total = counts.cumsum(0), (counts * centres).cumsum(0)
    above = below[-1] - below
    apart = total / below.clamp_min(1) - (total[-1] - total) / above.clamp_min(1)
    best = int((below * above * apart.square()).argmax())
    return low + (best + 1) * (high - low) / _LEVELS


def _rows_of(tokens: Tensor, masks: Sequence[Tensor] | None, i: int) -> Tensor:
    return tokens.flatten(0, 1) if masks is None else tokens[masks[i]]


def _painted(colours: Tensor, components: int, masked: bool) -> Tensor:
    """Return colours in [0, 1], grey for missing components and white outside of the mask."""
    found = colours[..., :components].clamp(0, 1)
    found = torch.nn.functional.pad(found, (0, 3 - components), value=0.5)
    return torch.where(colours[..., -1:] > 0.5, found, 1.0) if masked else found


def _placed(image: ShownImage, colours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the colours at the places where overlapping patches look; upsampled ones are there already."""
    if any(each.shape[:2] != image.maps[term].shape[:2] for term, each in colours.items()):
        return colours
    return {term: grids.drawn_cells(each, image.centres) for term, each in colours.items()}


def save_gallery(images: Sequence[ShownImage], colours: Sequence[Mapping[str, Tensor]], out: str | Path) -> list[Path]:
    """Write one picture per image, with photograph and maps side by side, and one page, index.html, for offline use.

    Args:
        images: the images given to :func:`pca`.
        colours: the colours that it returned.
        out: a folder; existing pictures of the same names are replaced.

    Returns:
        The files written; each is whole or absent.
    """
    out, written, parts = Path(out), [], []
    for number, (image, maps) in enumerate(zip(images, map(_placed, images, colours), strict=True)):
        path = out / f"{number:04}-{image.name.replace('/', '_')}.png"
        _save_strip(image, maps, path)
        written.append(path)
        cells = [] if image.pixels is None else [_cell("photograph", _photo(image.pixels), "image/jpeg")]
        cells += [_cell(term, _png(each), "image/png") for term, each in maps.items()]
        parts.append(f"<section><h2>{escape(image.name)}</h2><div>{''.join(cells)}</div></section>")
    page = out / "index.html"
    with whole_file(page) as part:
        part.write_text(_PAGE.replace("BODY", "\n".join(parts)), encoding="utf-8")
    return [*written, page]


def save_clip(images: Sequence[ShownImage], colours: Sequence[Mapping[str, Tensor]], path: str | Path) -> Path:
    """Write images as an animation (WebP): in each frame the photograph and its maps side by side.

    The colours are those of :func:`pca`, so a colour means the same in all frames.
    """
    frames = [_film_frame(image, _placed(image, maps)) for image, maps in zip(images, colours, strict=True)]
    with whole_file(path) as part:
        frames[0].save(part, "WEBP", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0, quality=90)
    return Path(path)


def _film_frame(image: ShownImage, maps: Mapping[str, Tensor]) -> Any:
    from PIL import Image

    panels = [] if image.pixels is None else [image.pixels.cpu().clamp(0, 1).movedim(0, -1)]
    panels += maps.values()
    width = round(_FILM * panels[0].shape[1] / panels[0].shape[0])
    frame = Image.new("RGB", (len(panels) * width, _FILM))
    for number, values in enumerate(panels):
        smooth = Image.Resampling.LANCZOS if values.shape[0] > _FILM else Image.Resampling.NEAREST
        drawn = Image.fromarray(values.mul(255).round().byte().numpy())
        frame.paste(drawn.resize((width, _FILM), smooth), (number * width, 0))
    return frame


_PAGE = """<!doctype html><meta charset="utf-8"><title>Features in PCA colours</title><style>
body{font:15px system-ui,sans-serif;margin:2rem;color:#222;background:#fff}h2{font-size:1rem;margin:1.4rem 0 .4rem}
div{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0}img{width:320px;display:block;image-rendering:pixelated}
figcaption{color:#555}</style><h1>Features in PCA colours</h1>
<p>The same colour is the same feature in all images; with a foreground mask, what it leaves out is white.</p>
BODY
"""


def _cell(title: str, data: bytes, kind: str) -> str:
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(title)}"><figcaption>{escape(title)}</figcaption></figure>'


def _encoded(values: Tensor, form: str, longest: int = 0) -> bytes:
    from PIL import Image

    picture, content = Image.fromarray(values.mul(255).round().byte().numpy()), io.BytesIO()
    if longest:
        picture.thumbnail((longest, longest))
    picture.save(content, form)
    return content.getvalue()


def _png(colours: Tensor) -> bytes:
    return _encoded(colours, "PNG")


def _photo(pixels: Tensor) -> bytes:
    return _encoded(pixels.cpu().clamp(0, 1).movedim(0, -1), "JPEG", _PHOTO)


def _save_strip(image: ShownImage, maps: Mapping[str, Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    from dvt.analysis.pictures import save

    panels = {} if image.pixels is None else {"photograph": image.pixels.cpu().clamp(0, 1).movedim(0, -1)}
    panels |= maps
    shape = next(iter(panels.values())).shape
    ratio = min(max(shape[0] / shape[1], 0.3), 2.0)
    figure = Figure(figsize=(3.2 * len(panels), 3.2 * ratio + 0.4), layout="constrained", facecolor="white")
    for axis, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.imshow(values.numpy(), extent=(0, 1, 1, 0), interpolation="nearest", aspect=ratio)
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.set_axis_off()
    save(figure, path)
