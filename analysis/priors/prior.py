"""Make a generative prior of a transformer trunk and one of two heads; write and read its file.

It generates standardised maps of target tokens (B, h, w, D): patches of pixels or of latents, or features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvt.analysis.priors.config import MOST_GUIDANCE, PriorConfig
from dvt.analysis.priors.contrast import contrast
from dvt.analysis.priors.diffusion import Sampled, heun, karras_sigmas
from dvt.analysis.priors.heads import ImageHead, Sampler, SampleRequest, TokenHead
from dvt.analysis.priors.pseudo_text import PseudoText, pseudo_text
from dvt.analysis.priors.trunk import ConditionEmbedder, drop, reset_weights
from dvt.backbones.weights import State, check_state, load_state, read_described, save_state
from dvt.errors import ConfigError, WeightsError
from dvt.grids import Size
from dvt.schema import typed

PRIOR_SCHEMA = "dvt-prior/1"
_KEY = "dvt"
_LAFITE = 0.5  # temperature and weight of its contrastive loss


def sampling_sigmas(steps: int = 18) -> Tensor:
    """List noise levels (steps + 1,) for data of standard deviation 1."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    return karras_sigmas(steps, low=0.004)


class Prior(nn.Module):
    """Model maps of target tokens (B, h, w, D) that have mean 0 and standard deviation 1: a generative prior.

    Args:
        config: its architecture.
        generator: draws the initial weights, on the CPU.

    Attributes:
        config: as given; :meth:`swap_condition` changes it.
        card: the prior's origin, as plain JSON values; saved with it.

    >>> prior = Prior(PriorConfig((4, 4), 3, condition_dim=8, width=32, depth=1), torch.Generator().manual_seed(0))
    >>> maps, calls = prior.sample(torch.rand(2, 5, 8), torch.Generator().manual_seed(1))
    >>> maps.shape, calls
    (torch.Size([2, 4, 4, 3]), 35)
    """

    def __init__(self, config: PriorConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.card = config, dict[str, Any]()
        # Built without values, so that only reset_weights draws numbers, and from the generator given.
        self.head = _planned_head(config).to_empty(device="cpu")
        reset_weights(self.head, generator)
        self.embed = _embedder(config, generator)
        self.pseudo = PseudoText(config.condition_dim) if config.condition_dim and config.pseudo == "trained" else None
        if self.pseudo is not None:
            reset_weights(self.pseudo.hidden, generator)

    def loss(self, clean: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """Compute the training loss, a mean over dimensions that starts near 1.

        Args:
            clean: (B, h, w, D) standardised target tokens.
            condition: (B, M, C); None if and only if the prior has no condition.
            generator: draws noise, masks and dropped conditions; on the device of the prior.
        """
        added: Tensor | float = 0.0
        if self.config.pseudo is not None and condition is not None:
            feature = condition[:, 0].float()
            text = pseudo_text(feature, generator) if self.pseudo is None else self.pseudo(feature, generator)
            if self.pseudo is not None and self.training and len(text) > 1:
                # Without this term, training would reduce the noise to nothing.
                added = _LAFITE * contrast(text, feature, temperature=_LAFITE)
            condition = text[:, None]
        context = self.context(condition)
        if self.embed is not None and context is not None and self.training:
            context = drop(context, self.embed.null.to(context), self.config.drop, generator)
        return self.head.loss(clean, context, generator) + added

    def context(self, condition: Tensor | None) -> Tensor | None:
        """Embed condition tokens (B, M, C) to the trunk's width: (B, M, W)."""
        if (condition is None) != (self.embed is None):
            raise ConfigError(
                f"this prior has {'no' if self.embed is None else 'a'} condition, and was given "
                f"{'none' if condition is None else 'one'}"
            )
        return None if self.embed is None else self.embed(condition)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | None,
        generator: torch.Generator,
        count: int | None = None,
        sampler: Sampler = heun,
        sigmas: Tensor | None = None,
        guidance: float = 1.0,
        steps: int = 16,
        temperature: float = 1.0,
        rising: bool = False,
    ) -> Sampled:
        """Draw new maps of target tokens.

        Args:
            condition: (B, M, C), one map each; None for a prior without a condition.
            generator: draws everything; on the device of the prior.
            count: the number of maps B, for a prior without a condition.
            sampler: a sampler from :mod:`dvt.analysis.priors.diffusion`.
            sigmas: the sampler's noise levels; None for 18 steps of :func:`sampling_sigmas`.
            guidance: 1 for none; larger values follow the condition more closely and vary less.
            steps: how often a token head in random order calls its trunk; in raster order it is once per token.
            temperature: positive; below 1 samples vary less: it multiplies the starting noise and divides the logits.
            rising: let the guidance rise from 1 to its scale in the course of sampling.

        Returns:
            (B, h, w, D), and the number of calls of the denoising network.
        """
        context = self.context(condition)
        null = None
        if self.embed is not None and context is not None:
            null, count = self.embed.null.expand_as(context), len(context)
        if count is None or count < 1 or steps < 1:
            raise ConfigError(f"sampling needs a condition or a count, and a step, got count {count}, steps {steps}")
        if not 0 <= guidance <= MOST_GUIDANCE:
            raise ConfigError(f"guidance must lie in 0 ... {MOST_GUIDANCE:g}; 1 is none, got {guidance}")
        if not 0 < temperature <= 10:
            raise ConfigError(f"temperature must lie above 0 and be at most 10, got {temperature}")
        if guidance != 1 and context is None:
            raise ConfigError("guidance needs a prior with a condition; leave it at 1")
        sigmas = sampling_sigmas() if sigmas is None else sigmas
        request = SampleRequest(count, context, null, generator, sampler, sigmas, guidance, steps, temperature, rising)
        return self.head.sample(request)

    def swap_condition(self, dim: int, generator: torch.Generator, grid: Size | None = None) -> None:
        """Replace the embedder by a new one for conditions (B, M, dim), such as one-hot labels; keep all other weights.

        Args:
            dim: channels of a condition token.
            generator: draws the embedder's initial weights, on the CPU.
            grid: (h, w) if the conditions lie on a grid.

        Source:
            Lumos, 2024: the second stage, fine-tuned on a tenth of the pairs.
        """
        device = next(self.parameters()).device
        self.config = replace(self.config, condition_dim=dim, condition_grid=grid, centred=False, pseudo=None)
        self.pseudo = None
        fresh = _embedder(self.config, generator)
        assert fresh is not None  # dim is a number
        self.embed = fresh.to(device)

    def save(self, path: str | Path) -> None:
        """Write weights, config and card to one .safetensors file, which is whole or absent."""
        metadata = {_KEY: json.dumps({"schema": PRIOR_SCHEMA, "config": asdict(self.config), "card": self.card})}
        save_state(Path(path), self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> Prior:
        """Read a prior that :meth:`save` wrote, in evaluation mode.

        Raises:
            WeightsError: the file is missing, damaged or no prior.
        """
        about, state = read_described(path, _KEY, "a prior")
        about = about if isinstance(about, dict) else {}
        settings, card = about.get("config"), about.get("card")
        known = {field.name for field in fields(PriorConfig)}
        if about.get("schema") != PRIOR_SCHEMA or not isinstance(settings, dict) or not set(settings) <= known:
            raise WeightsError(f"{str(path)!r} holds no prior of {PRIOR_SCHEMA}; train one with this version")
        if not isinstance(card, dict):
            raise WeightsError(
                f"{str(path)!r} has no card, the record of its prior's origin; train one with this version"
            )
        prior = cls(_checked(settings, state, str(path)), torch.Generator().manual_seed(0))
        load_state(prior, state, str(path))
        prior.card = card
        return prior.eval()


def _checked(settings: Mapping[str, Any], state: State, source: str) -> PriorConfig:
    """Check that a file's tensors fit its config, and return the config, before anything large is allocated."""
    try:
        config = typed(PriorConfig, settings)
        if max(config.depth, config.width, config.heads) > sum(value.nbytes for value in state.values()):
            raise ConfigError("the file is too small for it")  # even on "meta", building could take hours
        planned = nn.ModuleDict({"head": _planned_head(config)})
        if (embedder := _planned_embedder(config)) is not None:
            planned["embed"] = embedder
        if config.condition_dim is not None and config.pseudo == "trained":
            with torch.device("meta"):
                planned["pseudo"] = PseudoText(config.condition_dim)
        check_state(planned, state, source)
    except WeightsError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise WeightsError(f"{source} describes a prior that cannot be made: {error}; train one again") from error
    return config


def _planned_head(config: PriorConfig) -> Any:
    """Build the trunk and its head on the device "meta"."""
    with torch.device("meta"):
        return ImageHead(config) if config.head == "image" else TokenHead(config)


def _planned_embedder(config: PriorConfig) -> ConditionEmbedder | None:
    if config.condition_dim is None:
        return None
    with torch.device("meta"):
        return ConditionEmbedder(config.condition_dim, config.width, config.condition_grid, config.centred)


def _embedder(config: PriorConfig, generator: torch.Generator) -> ConditionEmbedder | None:
    if (embedder := _planned_embedder(config)) is None:
        return None
    embedder.to_empty(device="cpu")
    reset_weights(embedder, generator)
    return embedder
