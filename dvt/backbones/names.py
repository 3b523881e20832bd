"""Resolve the names that users type for timm models: names of other libraries, and misspelt names."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import timm

from dvt.errors import BackboneError, ConfigError
from dvt.schema import read_json

logger = logging.getLogger(__name__)

TRANSFORMERS = "hf:"
LOCAL = "local-dir:"

_DINOV2 = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_DINOV3 = {
    "s": "small",
    "splus": "small_plus",
    "b": "base",
    "l": "large",
    "hplus": "huge_plus",
    "7b": "7b",
}


def _aliases() -> dict[str, str]:
    """List other libraries' names, in lower case, with the timm model of the same weights."""
    names: dict[str, str] = {}
    for letter, size in _DINOV2.items():
        plain, registers = (f"vit_{size}_patch14_{kind}.lvd142m" for kind in ("dinov2", "reg4_dinov2"))
        names |= {f"dinov2_vit{letter}14": plain, f"dinov2_vit{letter}14_reg": registers}
        names |= {f"facebook/dinov2-{size}": plain, f"facebook/dinov2-with-registers-{size}": registers}
    for short, size in _DINOV3.items():
        bias = "" if size == "7b" else "_qkvb"
        target = f"vit_{size}_patch16_dinov3{bias}.lvd1689m"
        names |= {f"dinov3_vit{short}16": target, f"facebook/dinov3-vit{short}16-pretrain-lvd1689m": target}
    names["facebook/dinov3-vitl16-pretrain-sat493m"] = "vit_large_patch16_dinov3_qkvb.sat493m"
    names["facebook/dinov3-vit7b16-pretrain-sat493m"] = "vit_7b_patch16_dinov3.sat493m"
    for letter, size in (("s", "small"), ("b", "base")):
        for patch in (8, 16):
            names |= dict.fromkeys(
                (f"dino_vit{letter}{patch}", f"facebook/dino-vit{letter}{patch}"), f"vit_{size}_patch{patch}_224.dino"
            )
    for size, patch in (("base", 16), ("large", 16), ("huge", 14)):
        names[f"facebook/vit-mae-{size}"] = f"vit_{size}_patch{patch}_224.mae"
    for size, patch, side in (("base", 16, 224), ("base", 32, 224), ("large", 14, 224), ("large", 14, 336)):
        target = f"vit_{size}_patch{patch}_clip_quickgelu_{side}.openai"
        names["openai/clip-vit-" + f"{size}-patch{patch}" + ("-336" if side == 336 else "")] = target
        letter = {"base": "b", "large": "l"}[size]
        names[f"vit-{letter}/{patch}" + ("@336px" if side == 336 else "")] = target
    for size, patch, sides in (
        ("base", 16, (224, 256, 384, 512)),
        ("base", 32, (256,)),
        ("large", 16, (256, 384, 512)),
        ("giantopt", 16, (256, 384)),
        ("so400m", 14, (224,)),
        ("so400m", 16, (256, 384, 512)),
    ):
        for side in sides:
            hub = "giant-opt" if size == "giantopt" else size
            names[f"google/siglip2-{hub}-patch{patch}-{side}"] = f"vit_{size}_patch{patch}_siglip_{side}.v2_webli"
    names["google/siglip2-so400m-patch14-384"] = "vit_so400m_patch14_siglip_378.v2_webli"
    for size, sides in (("base", (224, 256, 384, 512)), ("large", (256, 384))):
        for side in sides:
            names[f"google/siglip-{size}-patch16-{side}"] = f"vit_{size}_patch16_siglip_{side}.webli"
    names["google/siglip-so400m-patch14-384"] = "vit_so400m_patch14_siglip_384.webli"
    return names


#: Maps names of other libraries to timm's names for the same weights.
ALIASES: dict[str, str] = _aliases()


def resolved_name(name: str) -> str:
    """Turn a name that a user typed into one that can be loaded.

    Returns:
        A timm name, ``local-dir:FOLDER`` for a folder that timm saved, or ``hf:NAME_OR_FOLDER`` for transformers.

    Raises:
        BackboneError: the name is a folder that neither library saved.

    >>> resolved_name("facebook/dinov2-small"), resolved_name("dinov2_vits14")
    ('vit_small_patch14_dinov2.lvd142m', 'vit_small_patch14_dinov2.lvd142m')
    """
    if name.startswith(TRANSFORMERS):
        return name
    if (target := ALIASES.get(name.lower())) is not None:
        logger.info("%s: timm's %s (transformers' own is hf:%s)", name, target, name)
        return target
    path = Path(name).expanduser()
    if not path.is_dir():
        return name
    described = _config(path)
    if "model_type" in described:
        return f"{TRANSFORMERS}{path}"
    if "architecture" in described:
        return f"{LOCAL}{path}"
    raise BackboneError(f"{path} is a folder without a config.json of timm or transformers, so it holds no model")


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / "config.json")
    except (OSError, ConfigError):
        return {}
    return content if isinstance(content, dict) else {}


def check_timm_name(name: str) -> None:
    """Check that timm knows a name; names with a source, such as hf-hub:, are checked by that source.

    Raises:
        BackboneError: timm does not know the name; the message lists the closest names, its family's first.
    """
    if ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = suggestions(name)
        hint = f"close: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise BackboneError(
            f"timm has no model {name!r}; {hint}. Models of transformers are named hf:NAME_OR_FOLDER, timm's of the "
            "hub hf-hub:organisation/model"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")] if tag else []
    if tag and tag not in tags:
        raise BackboneError(f"timm has no weights {tag!r} of {architecture}; it has: {', '.join(tags) or 'none'}")


#: Words that name a family, with timm's word for it.
FAMILIES = ("dinov3", "dinov2", "siglip", "clip", "mae", "dino", "deit3", "deit", "beit", "eva02", "sam")


def suggestions(name: str) -> list[str]:
    """List the four names closest to an unknown name; models of a family named in it come first."""
    typed = name.lower().rpartition("/")[2].replace("-", "_")
    family = next((word for word in FAMILIES if word in typed.replace("_", "")), None)
    of_family = [full for full in timm.list_pretrained() if family and family in full] if family else []
    known = [alias for alias in ALIASES if family and family in alias] + of_family
    found = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.3)
    return found or _by_beginning(typed.partition(".")[0])


def _by_beginning(typed: str) -> list[str]:
    """List the four models whose names begin most like a typed one, which is often shorter; short names first."""
    matcher = difflib.SequenceMatcher(b=typed)

    def likeness(name: str) -> float:
        matcher.set_seq1(name[: len(typed) + 1])
        return matcher.ratio()

    found = {name: likeness(name) for name in timm.list_models()}
    best = sorted(found, key=lambda name: (-round(found[name], 2), len(name), name))[:4]
    return [name for name in best if found[name] >= 0.6]
