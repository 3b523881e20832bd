"""Define the modules of the remedies of norm outliers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvt.denoiser.config import DenoiserConfig
from dvt.errors import BackboneError


class DefectRemoval(nn.Module):
    """Move tokens that lie beyond a limit along a unit direction d back to the others, which do not change.

    With a = (x - mean)'d, a token with |a - centre| > limit becomes mean + centre d + scale (x - mean - a d).
    """

    mean: Tensor
    direction: Tensor
    bounds: Tensor  # limit, centre and scale

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(config.feature_dim))
        self.register_buffer("direction", torch.empty(config.feature_dim))
        self.register_buffer("bounds", torch.empty(3))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start as the identity: no token lies beyond the limit."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        limit, centre, scale = self.bounds.unbind()
        centred = patches - self.mean
        along = (centred @ self.direction)[..., None]
        mended = self.mean + centre * self.direction + scale * (centred - along * self.direction)
        return torch.where((along - centre).abs() > limit, mended, patches)


class RegisterNeurons(nn.Module):
    """Hold the neurons whose activations move to an appended register token, as (n, 2) pairs (block, neuron)."""

    places: Tensor

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.register_buffer("places", torch.empty(config.rank, 2, dtype=torch.long))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start with no neuron of any block."""
        self.places.fill_(-1)

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        raise BackboneError(
            "test-time registers act inside the model, and cannot be applied to its tokens: attach "
            "them to the timm model (denoiser.attach(model)), or make a backbone with them "
            "(dvt.denoiser.denoised_backbone(denoiser, backbone))"
        )

    def move(self, hidden: Tensor, block: int, prefix: int, strength: float = 1.0) -> Tensor:
        """Move activations (B, P + n + 1, D) of a block's MLP from the n patches to the last token.

        The last token gets the patches' activation of largest magnitude (arXiv 2506.08010 takes the largest value; GELU
        has no large negative ones), the patches get 0, and prefix tokens keep theirs. A strength s moves the share s.
        """
        wide = torch.arange(hidden.shape[-1], device=hidden.device)[:, None]
        chosen = ((wide == self.places[:, 1]) & (self.places[:, 0] == block)).any(1)
        own, patches, register = hidden[:, :prefix], hidden[:, prefix:-1], hidden[:, -1:]
        largest = patches.gather(1, patches.abs().argmax(1, keepdim=True))
        register = torch.where(chosen, strength * largest, register)
        return torch.cat((own, torch.where(chosen, (1 - strength) * patches, patches), register), dim=1)
