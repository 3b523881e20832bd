"""Save, load and publish denoisers: as one .safetensors file, a folder with a model card, or a hub repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor, nn

from dvt.backbones.hub import hub_or_cache, without_hub
from dvt.backbones.weights import State, check_state, load_state, read_described, save_state
from dvt.denoiser.config import INSIDE, DenoiserConfig, check_strength
from dvt.denoiser.model_card import model_card
from dvt.denoiser.published import DISTILLED_HELP, published_denoiser, published_file
from dvt.errors import BackboneError, ConfigError, WeightsError
from dvt.files import similar, whole_file
from dvt.schema import typed
from dvt.showing import page_part, pca_colours, picture
from dvt.text import visible

if TYPE_CHECKING:
    from PIL.Image import Image

    from dvt.backbones import Backbone

DENOISER_SCHEMA = "dvt-denoiser/1"
#: The key of the safetensors metadata under which schema, config and card are stored as JSON.
METADATA_KEY = "dvt"

D = TypeVar("D", bound="PretrainedDenoiser")


class PretrainedDenoiser(nn.Module, ModelHubMixin):
    """Save, load and publish a denoiser; its file holds the config and the card beside the weights.

    This is the base class of :class:`~dvt.denoiser.model.Denoiser`, and all that attaching needs of it.
    """

    config: DenoiserConfig
    card: dict[str, Any]
    body: Any

    def __init__(self, config: DenoiserConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.card = {}
        self.strength = config.strength

    @property
    def feature_dim(self) -> int:
        """The number of channels of a token, C."""
        return self.config.feature_dim

    @property
    def strength(self) -> float:
        """The share of the change to apply, in [0, 1]: 0 returns the input bit for bit, 1 the denoised tokens."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        check_strength(value)
        self._strength = float(value)

    def __repr__(self) -> str:
        config, count = self.config, sum(value.numel() for value in self.parameters())
        made_for = (
            f" for {self.card['backbone']}, layer {self.card.get('layer', -1)}" if "backbone" in self.card else ""
        )
        size = f"{count / 1e6:.2f} M parameters" if count else "no parameters to train"
        return (
            f"{type(self).__name__}({config.kind}{made_for}: {config.feature_dim} channels, grid {config.grid[0]} x "
            f"{config.grid[1]}, {size}, strength {self.strength:g})"
        )

    def show(self) -> Image:
        """Draw the answer to zero tokens at each position, in PCA colours: what is removed by position alone.

        A notebook shows the picture. It is of one colour if the position makes no difference.
        """
        return picture(self._panels())

    def _repr_html_(self) -> str:
        return page_part(repr(self), {name: value for name, value in self.card.items() if value}, self._panels)

    @torch.no_grad()
    def _panels(self) -> dict[str, Tensor]:
        if self.config.kind in INSIDE:
            raise ConfigError(f"{self.config.kind} act inside a model, so there is no map of them; show its tokens")
        value = next(iter(self.state_dict().values()))
        grid = self.config.grid
        tokens, prefix = value.new_zeros(1, *grid, self.feature_dim), value.new_zeros(1, 1, self.feature_dim)
        return {"answer to zero tokens": pca_colours(self(tokens, prefix)[0])[0]}

    @staticmethod
    def _plan(config: DenoiserConfig) -> nn.Module:
        """Build the modules that hold the values, on the device "meta"."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the denoiser to one file if the name ends in .safetensors, otherwise to a folder.

        Args:
            save_directory: a file, which holds everything; or a folder, for model.safetensors (the same file),
                config.json and, unless it has one, a model card README.md.
            options: options of :meth:`huggingface_hub.ModelHubMixin.save_pretrained`, for a folder only.

        Raises:
            ConfigError: the card holds a value that JSON cannot represent.
        """
        path = Path(save_directory)
        if path.suffix != ".safetensors":
            return super().save_pretrained(path, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(self, path)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        _save(self, save_directory / SAFETENSORS_SINGLE_FILE)
        with whole_file(save_directory / CONFIG_NAME) as part:
            part.write_text(_json(_description(self), indent=2))

    @classmethod
    def from_pretrained(cls: type[D], pretrained_model_name_or_path: str | Path, **options: Any) -> D:
        """Load a denoiser from a file, a folder or a repository of the Hugging Face hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a .safetensors file or a folder written by :meth:`save_pretrained`; a .pth
                file as the authors of Denoising ViT publish them; or a repository such as ``name/repository``.
            options: download options: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            WeightsError: there is no such file or repository, or it does not hold a denoiser's finite weights.
        """
        source = str(pretrained_model_name_or_path)
        if not source:  # as a path, "" is the working folder
            raise WeightsError("no denoiser was named; give a .safetensors file, a folder or a repository")
        path = Path(source)
        if path.suffix in (".pth", ".pt"):
            return cls._build(*published_denoiser(path), source)
        if path.is_dir():
            path = path / SAFETENSORS_SINGLE_FILE
        elif path.suffix != ".safetensors" and not path.is_file():
            path = _download(source, options)
        return cls._build(*_read(path), source)

    @classmethod
    def from_published(cls: type[D], name: str, folder: str = "voc_denoised", **options: Any) -> D:
        """Download a denoiser that the authors of Denoising ViT published, from the Hugging Face hub.

        Args:
            name: the timm model that it was trained for, such as ``vit_base_patch14_dinov2.lvd142m``.
            folder: the data that it was trained on: "voc_denoised" or "imgnet_denoised".
                :data:`dvt.denoiser.published.PUBLISHED` lists all that the authors published.
            options: download options: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            WeightsError: it cannot be downloaded, or is a whole distilled backbone instead of a denoiser.
        """
        if folder.endswith("_distilled"):
            raise WeightsError(DISTILLED_HELP.format(name=name, folder=folder))
        path = published_file(name, folder, **options)
        denoiser = cls._build(*published_denoiser(path), f"{folder}/{name}")
        denoiser.card |= {"backbone": name, "data": folder}
        return denoiser

    @classmethod
    def _build(cls: type[D], config: Mapping[str, Any], card: Mapping[str, Any], state: State, source: str) -> D:
        """Make a denoiser from a config as read from JSON, a card, and weights by name."""
        try:
            settings = typed(DenoiserConfig, config)
            inside = settings.kind in INSIDE  # these hold indices, so their size says nothing of the tokens' width
            if not inside and max(settings.feature_dim, settings.depth) > sum(v.nbytes for v in state.values()):
                raise ConfigError("the file is too small for it")  # even on "meta", building could take hours
            check_state(cls._plan(settings), state, source)  # before memory is allocated
        except WeightsError:
            raise
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
            known = ", ".join(field.name for field in fields(DenoiserConfig))
            raise WeightsError(
                f"{source} describes a denoiser that this version of dvt cannot make: {error}; a description holds "
                f"{known}. Was the file written by a newer dvt, or edited?"
            ) from error
        denoiser = cls(settings, torch.Generator()).eval()  # load_state replaces these initial weights
        load_state(denoiser, state, source)
        denoiser.card = _checked_card(card, source)
        return denoiser

    def check_fits(self, backbone: Backbone, force: bool = False) -> None:
        """Refuse a backbone that this denoiser was not made for.

        Name, layer and weights are compared where the card states them. Weights with the same hash are the same model
        under whatever name. The stride is not compared: a position embedding is resampled to any grid.

        Args:
            backbone: where the tokens come from.
            force: accept everything but another feature size.

        Raises:
            BackboneError: the backbone differs; the message lists the differences.
        """
        own = self.config.feature_dim
        if backbone.feature_dim != own:
            raise BackboneError(
                f"this denoiser takes tokens of {own} channels, {backbone.name} gives {backbone.feature_dim}; "
                "no option makes them fit: train a denoiser for this backbone"
            )
        differences = _differences(self.card, backbone)
        if differences and not force:
            raise BackboneError(
                f"this denoiser was made for another backbone: {'; '.join(differences)}. Use the backbone that it was "
                "made for, train one for this backbone, or pass force=True if you know that they agree"
            )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Write the README.md of a folder or repository: what the denoiser is for, how to use it, and its card."""
        return model_card(self.card, _description(self)["config"])


def _differences(card: Mapping[str, Any], backbone: Backbone) -> list[str]:
    """List the differences between a card's backbone and this one, each as a phrase."""
    hashed = card.get("weights_sha256")
    same = hashed is not None and hashed == backbone.weights_sha256
    stated = {
        "backbone": (card.get("backbone"), backbone.name if not same else card.get("backbone")),
        "layer": (card.get("layer"), backbone.layer),
        "weights": (hashed, backbone.weights_sha256 if hashed else None),
    }
    differing = {what: pair for what, pair in stated.items() if pair[0] is not None and pair[0] != pair[1]}
    return [f"{what} {visible(str(own))}, got {other}" for what, (own, other) in differing.items()]


class _Card(TypedDict, total=False):
    """Type the entries of a card that dvt reads; a card may have any others."""

    backbone: str
    layer: int
    stride: int | list[int]
    feature_dim: int
    weights_sha256: str | None
    remedy: str


def _checked_card(card: Mapping[str, Any], source: str) -> dict[str, Any]:
    try:
        typed(_Card, {name: value for name, value in card.items() if name in _Card.__annotations__})
    except ConfigError as error:
        raise WeightsError(f"the card of {source} cannot be used: {error}. Was the file edited?") from error
    return dict(card)


def _description(denoiser: PretrainedDenoiser) -> dict[str, Any]:
    config = asdict(replace(denoiser.config, strength=denoiser.strength))
    return {"schema": DENOISER_SCHEMA, "config": config, "card": denoiser.card}


def _json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a denoiser's card holds only text, finite numbers, lists and dicts of them: {error}"
        ) from error


def _save(denoiser: PretrainedDenoiser, path: Path) -> None:
    """Write a denoiser to a file, which is whole or absent. Equal denoisers give equal bytes.

    The metadata has only one key, because safetensors writes several keys in random order.
    """
    save_state(path, denoiser.state_dict(), {METADATA_KEY: _json(_description(denoiser))})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], State]:
    """Read (config, card, tensors) from a .safetensors file that :func:`_save` wrote."""
    if not path.is_file():
        hint = similar(path) or "; `dvt train` writes one, save_pretrained saves one"
        raise WeightsError(f"no denoiser at {path}{hint}")
    described, state = read_described(path, METADATA_KEY, "a denoiser")
    parts = described if isinstance(described, dict) else {}
    config, card = parts.get("config"), parts.get("card")
    if parts.get("schema") != DENOISER_SCHEMA or not isinstance(config, dict) or not isinstance(card, dict):
        raise WeightsError(
            f"{path} is not a denoiser of dvt: its metadata has schema {parts.get('schema')!r} instead of "
            f"{DENOISER_SCHEMA!r}, a config and a card. The weights of a backbone are given by --weights (in Python "
            "weights=...)"
        )
    return config, card, state


def _download(repository: str, options: Mapping[str, Any]) -> Path:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise WeightsError(
            f"no denoiser {repository!r}: there is no such file or folder, and no repository of the hub has such a "
            "name; give the path of a .safetensors file, or organisation/name"
        ) from error
    why: str | None = None
    try:
        with hub_or_cache() as why:
            return Path(hf_hub_download(repository, SAFETENSORS_SINGLE_FILE, **options))
    except Exception as error:  # each release of the hub's client raises its own kinds
        if why is not None:
            what = f"the denoiser {repository!r}, which is no file or folder here"
            raise WeightsError(
                without_hub(what, why, repository, SAFETENSORS_SINGLE_FILE, "--denoiser FILE (in Python its path)")
            ) from error
        raise WeightsError(
            f"no denoiser {repository!r}: there is no such file or folder, and the Hugging Face hub gave "
            f"{type(error).__name__}: {error}"
        ) from error
