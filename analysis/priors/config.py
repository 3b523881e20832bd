"""Set what a prior is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvt.errors import ConfigError
from dvt.grids import Size


@dataclass(frozen=True)
class PriorConfig:
    """Set what a prior is made of.

    Args:
        grid: (h, w) target tokens.
        token_dim: D, channels of a target token.
        condition_dim: C, channels of a condition token; None for a prior without a condition.
        condition_grid: (h, w) if the last h w condition tokens lie on a grid, whose places the prior is then given;
            None for class tokens, labels and texts.
        head: "image" denoises all target tokens at once; "token" each by itself, given the trunk's answer for it.
        order: of a token head: "random" (masked, all see all) or "raster" (causal).
        width: channels of the trunk, a multiple of 4 and of `heads`.
        depth: its blocks.
        heads: attention heads.
        drop: share of conditions replaced by a learned null in training, for guidance.
        levels: noise levels for each token and step of a token head.
        codes: of a token head: 0 for continuous tokens, else the number of entries of a codebook that tokens are
            rounded to, predicted by cross-entropy.
        centred: whether the embedder of conditions learns what it takes off each place of the grid before it
            normalises a token.
        pseudo: "fixed" or "trained" noise turns image features into pseudo-text features in training (LAFITE); None
            for none.

    Raises:
        ConfigError: a setting is outside its range.
    """

    grid: Size
    token_dim: int
    condition_dim: int | None = None
    condition_grid: Size | None = None
    head: Literal["image", "token"] = "image"
    order: Literal["random", "raster"] = "random"
    width: int = 256
    depth: int = 6
    heads: int = 4
    drop: float = 0.1
    levels: int = 4
    codes: int = 0
    centred: bool = False
    pseudo: Literal["fixed", "trained"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "condition_grid", self.condition_grid and tuple(self.condition_grid))
        if self.head not in ("image", "token") or self.order not in ("random", "raster"):
            raise ConfigError(
                f"head must be 'image' or 'token' and order 'random' or 'raster', got {self.head!r}, {self.order!r}"
            )
        if self.codes < 0 or self.codes == 1 or (self.codes and self.head != "token"):
            raise ConfigError(f"codes must be 0, or at least 2 with the head 'token', got {self.codes}, {self.head!r}")
        if self.pseudo not in (None, "fixed", "trained") or (self.pseudo and self.condition_dim is None):
            raise ConfigError(f"pseudo must be None, or 'fixed' or 'trained' with a condition, got {self.pseudo!r}")
        if self.centred and self.condition_grid is None:
            raise ConfigError("centring needs condition tokens on a grid, such as patches")
        for name in ("token_dim", "width", "depth", "heads", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 4 or self.width % self.heads:
            raise ConfigError(f"width must be a multiple of 4 and of the {self.heads} heads, got {self.width}")
        if len(self.grid) != 2 or min(self.grid) < 1 or not 0 <= self.drop <= 1:
            raise ConfigError(f"grid must be (h, w) and drop a share in [0, 1], got {self.grid} and {self.drop}")
