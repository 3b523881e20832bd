"""Define the kinds of denoisers, and hold the settings of a denoiser and of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

#: "block", a transformer block with a position embedding; "conv1x1" and "conv3x3", trained baselines;
#: "linear", removal of the directions that encode position; "subtract", removal of a stored artifact.
DENOISER_KINDS = ("block", "conv1x1", "conv3x3", "linear", "subtract")
#: Remedies of norm outliers: "defect", removal of one direction from the tokens that lie far along it (others do not
#: change); "registers", test-time registers, which act inside the model and not on its tokens.
OUTLIER_KINDS = ("defect", "registers")
INSIDE = ("registers",)

#: Channels of an attention head if the number of heads is not given (Denoising ViT, stage 2).
HEAD_DIM = 64


@dataclass(frozen=True)
class DenoiserConfig:
    """Hold the architecture of a denoiser.

    Args:
        kind: one of :data:`DENOISER_KINDS` or :data:`OUTLIER_KINDS`.
        feature_dim: C, channels of a token.
        grid: (h, w) of the stored position embedding or artifact; for tokens of another grid it is resampled.
        num_heads: attention heads of a block; None means C / 64, at least 1, lowered until it divides C.
        depth: number of blocks.
        mlp_ratio: hidden size of a block's MLP over C.
        position: give a block a position embedding.
        use_prefix: let a block also attend to the prefix tokens, which then must be given.
        rank: number of directions that "linear" can remove, or of neurons that "registers" moves.
        strength: initial strength of the denoiser, in [0, 1].

    Raises:
        ConfigError: a setting is outside its range.

    >>> DenoiserConfig("block", 384, (37, 37)).heads
    6
    """

    kind: str
    feature_dim: int
    grid: tuple[int, int]
    num_heads: int | None = None
    depth: int = 1
    mlp_ratio: float = 4.0
    position: bool = True
    use_prefix: bool = False
    rank: int = 8
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in (*DENOISER_KINDS, *OUTLIER_KINDS):
            known = ", ".join((*DENOISER_KINDS, *OUTLIER_KINDS))
            raise ConfigError(f"there is no denoiser of kind {self.kind!r}; it must be one of {known}")
        object.__setattr__(self, "grid", tuple(self.grid))
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ConfigError(f"grid must be (h, w), each at least 1, got {self.grid}")
        for name in ("feature_dim", "depth", "mlp_ratio", "rank"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads is not None and (self.num_heads < 1 or self.feature_dim % self.num_heads):
            raise ConfigError(f"num_heads must divide feature_dim {self.feature_dim}, got {self.num_heads}")
        check_strength(self.strength)

    @property
    def heads(self) -> int:
        """The number of attention heads of a block."""
        if self.num_heads is not None:
            return self.num_heads
        return next(n for n in range(max(1, self.feature_dim // HEAD_DIM), 0, -1) if self.feature_dim % n == 0)


def check_strength(value: float) -> None:
    """Check that a strength lies in [0, 1]; else raise ConfigError."""
    if not 0 <= value <= 1:
        raise ConfigError(f"strength must lie between 0 (raw tokens) and 1 (denoised tokens), got {value}")


_DENOISER_LOOP = TrainingConfig(
    steps=1000, batch_size=16, learning_rate=1e-3, ema=0.99, validate_every=200, checkpoint_every=500
)


@dataclass(frozen=True)
class DenoiserTraining:
    """Hold the settings for making a denoiser from a store of `dvt denoise`.

    Args:
        kind: "block", "conv1x1" or "conv3x3", which are trained; "linear" or "subtract", which are fitted in
            closed form and use only `validation` and `target` of the settings below.
        depth: number of transformer blocks.
        heads: attention heads of a block; None for C / 64.
        position: give a block a position embedding.
        use_prefix: let a block attend to the class token and the registers.
        target: the term of the store that the denoiser learns to compute from "raw".
        strength: share of its change that the denoiser applies unless told otherwise, from 0 to 1; it is kept in the
            file, and trained and scored at 1.
        validation: share of the images to hold out, in (0, 1); at least one image and at most 256 are held out.
        loop: steps, batch size, learning rate and the rest of the training loop; its averaged weights are the result.

    Raises:
        ConfigError: a value is outside its range.
    """

    kind: Literal["block", "conv1x1", "conv3x3", "linear", "subtract"] = "block"
    depth: int = 1
    heads: int | None = None
    position: bool = True
    use_prefix: bool = False
    target: str = "semantic"
    strength: float = 1.0
    validation: float = 0.1
    loop: TrainingConfig = _DENOISER_LOOP

    def __post_init__(self) -> None:
        if self.kind not in DENOISER_KINDS:
            known = ", ".join(DENOISER_KINDS)
            raise ConfigError(f"there is no denoiser of kind {self.kind!r}; it must be one of {known}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation is a share of the images in (0, 1), got {self.validation}")
        check_strength(self.strength)

    def denoiser(self, feature_dim: int, grid: tuple[int, int]) -> DenoiserConfig:
        """Make the architecture of a denoiser for tokens of C channels on a grid (h, w)."""
        return DenoiserConfig(
            self.kind,
            feature_dim,
            grid,
            num_heads=self.heads,
            depth=self.depth,
            position=self.position,
            use_prefix=self.use_prefix,
        )
