"""Fit the fields to one image's views by gradient descent, as the paper does (DVT, arXiv 2401.02957)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt.devices import free_memory
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields.config import NeuralConfig
from dvt.fields.decomposition import Fit
from dvt.fields.encodings import GridLayout, make_encoding

ViewBatches = Iterable[tuple[Tensor, Tensor]]
OnStep = Callable[[int, int], None]

_HALF_SAFE = 6e4
_RESERVE = 2**31
_CHUNK = 2**14


@dataclass(frozen=True)
class NeuralFit(Fit):
    """Hold one image's fields, as fitted by :class:`NeuralSolver`; the interface and its laws are those of `Fit`.

    Args:
        artifact: (h, w, C) mean zero over positions.
        field: network from coordinates (N, 2) to F in standardised units.
        predictor: network from standardised tokens to h, or None.
        centre: (C,) the vector that standardisation subtracts.
        scale: the number by which it divides.
        gauge: (C,) the constant that centring subtracted from the artifact, and F contains.
    """

    artifact: Tensor
    field: nn.Module
    predictor: nn.Module | None
    centre: Tensor
    scale: float
    gauge: Tensor

    @torch.no_grad()
    def semantic(self, coords: Tensor) -> Tensor:
        """Evaluate F (..., C) at image coordinates (..., 2) in [0, 1]^2; points outside take the border's value."""
        flat = coords.reshape(-1, 2).to(self.artifact)
        values = torch.cat([self.field(chunk) for chunk in flat.split(_CHUNK)]) * self.scale
        return (values + self.centre + self.gauge).view(*coords.shape[:-1], -1)

    @torch.no_grad()
    def residual(self, raw: Tensor) -> Tensor:
        """Compute the residual h (..., C) of raw tokens (..., C); zero if the residual term was off."""
        raw = raw.to(self.artifact)
        if self.predictor is None:
            return torch.zeros_like(raw)
        return self.predictor((raw - self.centre) / self.scale) * self.scale


class NeuralSolver:
    """Fit F (grid encoding and MLP), G (a vector per position) and h (MLP on the token) by Adam.

    Unlike in the paper, tokens are standardised, by one mean vector and one standard deviation for all channels: so the
    learning rate has no unit, and the fields need not learn the mean. The cosine in the loss is that of the tokens with
    their mean. Views are kept in half precision, on the GPU if they fit.

    >>> from dvt.grids import grid_centres
    >>> coords = grid_centres((4, 4))
    >>> views = [(torch.randn(1, 4, 4, 8), coords[None])]
    >>> config = NeuralConfig(levels=2, finest=32, steps=4, tokens_per_step=16)
    >>> fit = NeuralSolver(config).fit(views)
    >>> fit.semantic(coords).shape
    torch.Size([4, 4, 8])
    """

    def __init__(self, config: NeuralConfig | None = None) -> None:
        self.config = config or NeuralConfig()

    def fit(self, views: ViewBatches, artifact: Tensor | None = None, progress: OnStep | None = None) -> NeuralFit:
        """Fit one image.

        Args:
            views: batches of tokens (V, h, w, C) and the image coordinates (V, h, w, 2) of their patch centres,
                consumed once; V may differ from batch to batch. The fit runs on the tokens' device.
            artifact: (h, w, C) a known artifact, which is only centred and not fitted.
            progress: called with (steps done, steps) after each step.

        Raises:
            ConfigError: there is no view.
            ShapeError: batches disagree in shape, or the artifact does not fit them.
            NonFiniteError: tokens, coordinates or the loss are not finite.

        Source: "Per-image denoising with neural fields" in Denoising Vision Transformers (arXiv 2401.02957), where
        raw = F(x) + G(p) + h(raw) is fitted with MSE + (1 - cosine), and 0.1 MSE(h, sg(raw - F - G)) + 0.02 |h|_1.
        """
        tokens, coords, device = _cache(views)
        grid = (tokens.shape[1], tokens.shape[2], tokens.shape[3])
        if artifact is not None and tuple(artifact.shape) != grid:
            raise ShapeError(f"artifact has shape {tuple(artifact.shape)}; these views need {grid}")
        centre, scale = _moments(tokens.flatten(0, 2))
        # Callers often extract features under inference mode or no_grad; the fit itself needs gradients.
        with torch.inference_mode(False), torch.enable_grad():
            fitting = _NeuralFitting(self.config, grid, centre.to(device), scale, artifact, device)
            fitting.train(tokens.flatten(0, 2), coords.flatten(0, 2), progress)
        return fitting.result()

    def fit_many(self, views: Sequence[ViewBatches], artifact: Tensor | None = None) -> list[NeuralFit]:
        """Fit several images one after the other, each by :meth:`fit`."""
        return [self.fit(each, artifact) for each in views]


class _NeuralFitting:
    """Hold the networks of one fit, in standardised units, and train them."""

    def __init__(
        self,
        config: NeuralConfig,
        grid: tuple[int, int, int],
        centre: Tensor,
        scale: float,
        artifact: Tensor | None,
        device: torch.device,
    ) -> None:
        self.config, self.grid, self.centre, self.scale = config, grid, centre, scale
        generator = torch.Generator(device).manual_seed(config.seed)
        layout, channels = GridLayout.of(config), grid[2]
        encoding = make_encoding(config.encoding, layout, layout.initial_table(generator))
        self.field = nn.Sequential(encoding, *_mlp((layout.features, max(channels // 2, 1), channels), generator))
        hidden = max(channels // 4, 1)
        widths = (channels, hidden, hidden, channels)
        self.predictor = nn.Sequential(*_mlp(widths, generator)) if config.residual else None
        known = torch.zeros(grid) if artifact is None else artifact.detach().float() / scale
        known = (known - known.mean((0, 1))).flatten(0, 1).to(device)
        self.artifact = nn.Parameter(known, requires_grad=artifact is None)

    def train(self, tokens: Tensor, coords: Tensor, progress: OnStep | None) -> None:
        """Run all steps on tokens (N, C) and coordinates (N, 2), ordered by view and then by position."""
        config = self.config
        modules = [self.field] + ([self.predictor] if self.predictor is not None else [])
        parameters = [p for module in modules for p in module.parameters()] + [self.artifact]
        # For the large tables, fused Adam is many times faster than the default, also on the CPU.
        optimizer = torch.optim.Adam(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        generator = torch.Generator(tokens.device).manual_seed(config.seed)
        for step in range(config.steps):
            second_half = step >= config.steps // 2
            if step == config.steps // 2:
                self.artifact.requires_grad_(False)
                self.artifact.grad = None
            optimizer.param_groups[0]["lr"] = config.learning_rate(step)
            chosen = torch.randint(len(tokens), (config.tokens_per_step,), generator=generator, device=tokens.device)
            loss = self.loss(tokens[chosen], coords[chosen], chosen, second_half)
            # Reading the loss waits for the GPU, so it is read only now and then; once NaN, it stays NaN.
            if (step % 50 == 0 or step == config.steps - 1) and not math.isfinite(loss.item()):
                raise NonFiniteError(
                    f"the loss is {loss.item()} at step {step + 1} of {config.steps}; use a smaller lr"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, config.steps)

    def loss(self, tokens: Tensor, coords: Tensor, chosen: Tensor, second_half: bool) -> Tensor:
        """Compute the loss of drawn tokens (n, C): squared error and cosine, and in the second half the residual's."""
        device, config = self.centre.device, self.config
        raw = (tokens.to(device).float() - self.centre) / self.scale
        position = (chosen % len(self.artifact)).to(device)
        explained = self.field(coords.to(device)) + nnf.embedding(position, self.artifact)
        if self.predictor is None or not second_half:
            return self.reconstruction(explained, raw)
        residual = self.predictor(raw)
        target = (raw - explained).detach()
        return (
            self.reconstruction(explained + residual.detach(), raw)
            + config.residual_weight * nnf.mse_loss(residual, target)
            + config.sparsity * residual.abs().mean()
        )

    def reconstruction(self, estimate: Tensor, raw: Tensor) -> Tensor:
        """Compute MSE + (1 - cosine), where the cosine is that of tokens with their mean."""
        offset = self.centre / self.scale
        cosine = nnf.cosine_similarity(estimate + offset, raw + offset, dim=-1)
        return nnf.mse_loss(estimate, raw) + 1 - cosine.mean()

    def result(self) -> NeuralFit:
        """Return the fit in the tokens' units, with a centred artifact."""
        artifact = self.artifact.detach() * self.scale
        gauge = artifact.mean(0)
        for module in (self.field, self.predictor):
            if module is not None:
                module.requires_grad_(False)
        centred = (artifact - gauge).view(self.grid)
        return NeuralFit(centred, self.field, self.predictor, self.centre, self.scale, gauge)


def _mlp(widths: tuple[int, ...], generator: torch.Generator) -> Iterator[nn.Module]:
    """Make linear layers with ReLU between them, with torch's initial distribution drawn from an explicit generator.

    The last layer starts at zero, so all terms start at zero, and remain there if the tokens do not vary.
    """
    for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if k:
            yield nn.ReLU()
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, device=generator.device)
        bound = fan_in**-0.5 if k < len(widths) - 2 else 0.0
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        yield layer


def _cache(views: ViewBatches) -> tuple[Tensor, Tensor, torch.device]:
    """Join all tokens (V, h, w, C), in half precision, and coordinates (V, h, w, 2); also return the first device."""
    kept: list[tuple[Tensor, Tensor]] = []
    device = None
    for tokens, coords in views:
        _check_batch(tokens, coords, kept[0][0] if kept else None)
        device = device or tokens.device
        # Half precision ends at 65504; batches with larger values stay in single precision.
        half = tokens.detach().half() if tokens.abs().max() < _HALF_SAFE else tokens.detach().float()
        stays = _has_room(half, sum(batch.nbytes for batch, _ in kept)) and (not kept or kept[-1][0].device == device)
        place = device if stays else torch.device("cpu")
        kept.append((half.to(place), coords.detach().to(place, torch.float32)))
    if not kept or device is None:
        raise ConfigError("there are no views to fit; give at least one")
    home = kept[-1][0].device
    tokens, coords = (torch.cat([batch[k].to(home) for batch in kept]) for k in (0, 1))
    return tokens, coords, device


def _has_room(batch: Tensor, kept: int) -> bool:
    """Tell if the GPU can keep one more batch: joining needs the kept bytes once more, training needs the reserve."""
    free = free_memory(batch.device)
    return free is None or free > kept + batch.nbytes + _RESERVE


def _check_batch(tokens: Tensor, coords: Tensor, first: Tensor | None) -> None:
    if tokens.ndim != 4 or tokens.numel() == 0 or tuple(coords.shape) != (*tokens.shape[:3], 2):
        raise ShapeError(
            f"a batch has tokens {tuple(tokens.shape)} and coords {tuple(coords.shape)}; it needs (V, h, w, C) and "
            f"(V, h, w, 2), none of them empty"
        )
    if first is not None and tokens.shape[1:] != first.shape[1:]:
        raise ShapeError(
            f"a batch has token maps of shape {tuple(tokens.shape[1:])} after others of {tuple(first.shape[1:])}; all "
            f"views of an image need one grid and feature size"
        )
    if not (torch.isfinite(tokens).all() and torch.isfinite(coords).all()):
        raise NonFiniteError("the views hold NaN or infinity; check the backbone's weights and the image")


def _moments(tokens: Tensor) -> tuple[Tensor, float]:
    """Compute the mean (C,) of tokens (N, C), and one standard deviation around it over all channels."""
    chunks = tokens.split(_CHUNK)
    centre = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(tokens)
    variance = sum(((chunk - centre) ** 2).sum().item() for chunk in chunks) / tokens.numel()
    # Tokens that do not vary differ only by rounding, which must not be scaled to unit variance.
    floor = 1e-3 * math.sqrt((centre**2).mean().item())
    return centre.float(), max(math.sqrt(variance), floor) or 1.0
