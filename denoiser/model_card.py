"""Write the model card of a denoiser: the README.md of its folder or repository."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dvt.text import counted, flat, markdown

CARD = """---
{data}
---

# Denoiser for {title}

It takes the patch tokens of the backbone and gives them back without the artifacts that depend on their position.

```python
import dvt
from dvt.denoiser import Denoiser

{load}
clean = Denoiser.from_pretrained("this folder or repository").attach(backbone)
```

{about}

{licence}

## Settings

| setting | value |
|---|---|
{settings}

## How it was made

| entry | value |
|---|---|
{rows}
"""


def model_card(card: Mapping[str, Any], config: Mapping[str, Any]) -> ModelCard:
    """Write what a denoiser is for, how to load it with the weights that it was made for, its data and licence.

    Args:
        card: the denoiser's card. Of its entries, "license" and "dataset" are the author's to set.
        config: its settings.
    """
    backbone = str(card.get("backbone", "the backbone it was made for"))
    data = ModelCardData(
        library_name="denoising-vit",
        pipeline_tag="image-feature-extraction",
        tags=["denoising-vit", "vision-transformer", "dense-features"],
        base_model=f"timm/{backbone}" if re.fullmatch(r"[\w-]+\.[\w.-]+", backbone, re.ASCII) else None,
        license=_word(card.get("license")),
        datasets=_word(card.get("dataset")),
    )
    return ModelCard(
        CARD.format(
            data=data.to_yaml(),
            title=markdown(backbone),
            load=_load_line(backbone, card),
            about=_about_data(card),
            licence=_about_licence(card),
            settings=_table(config),
            rows=_table(card),
        )
    )


def _word(value: Any) -> str | None:
    """Take a licence or a data set into the card's header if it is one plain name."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w./-]{1,96}", value, re.ASCII) else None


def _load_line(backbone: str, card: Mapping[str, Any]) -> str:
    """Write the line that loads the backbone with the weights that the denoiser was made for."""
    hashed = card.get("weights_sha256")
    if hashed is not None and hashed == _demo_hash(backbone):
        return f"backbone = dvt.load_backbone({backbone!a}, weights=dvt.demo_weights())"
    line = f"backbone = dvt.load_backbone({backbone!a})"
    if hashed is None:
        return line
    return f"{line}  # weights= where its weights, of SHA-256 {ascii(str(hashed)[:12])[1:-1]}..., are not timm's own"


def _demo_hash(backbone: str) -> str | None:
    """Compute the hash of the weights that come with dvt, if this is their model."""
    import dvt

    file = dvt.demo_weights()
    if not file.name.startswith(f"{backbone}."):
        return None
    return dvt.load_backbone(backbone, weights=file).weights_sha256


def _about_data(card: Mapping[str, Any]) -> str:
    named, counts = card.get("dataset"), card.get("data")
    named = counts if named is None and isinstance(counts, str) else named
    said = f"Data: {markdown(str(named))}." if named else "Data: not named (set `denoiser.card['dataset']`)."
    if isinstance(counts, Mapping) and isinstance(counts.get("images"), int):
        said += (
            f" {counted(counts['images'], 'image')}, {counts.get('held_out', 0)} of them held out; no labels were used."
        )
    return said


def _about_licence(card: Mapping[str, Any]) -> str:
    named = card.get("license")
    if named:
        return f"Licence: {markdown(str(named))}."
    return (
        "Licence: not stated. It is for the author to choose (set `denoiser.card['license']`); the backbone's weights "
        "and the images have licences of their own."
    )


def _table(values: Mapping[str, Any]) -> str:
    """Write settings as rows of a table, nested ones by their full names, without JSON."""
    rows = []
    for name, value in sorted(flat(values).items()):
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        number = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(f"| {markdown(name.replace('_', ' '))} | {markdown(number)} |")
    return "\n".join(rows)
