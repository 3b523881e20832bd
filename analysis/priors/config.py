"""Set what a prior is made of and how it is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

TargetKind = Literal["pixels", "latents", "features"]
TARGET_KINDS = ("pixels", "latents", "features")
Condition = Literal["cls", "mean", "patch", "both"]
CONDITIONS = ("cls", "mean", "patch", "both")
SAMPLERS = ("heun", "ddim", "restart")
MOST_GUIDANCE = 100.0

_PRIOR_LOOP = TrainingConfig(
    steps=20_000,
    batch_size=64,
    learning_rate=5e-4,
    warmup=0.05,
    ema=0.999,
    checkpoint_every=2000,
    log_every=20,
)


_COMPARISON_LOOP = TrainingConfig(
    steps=3000,
    batch_size=48,
    learning_rate=2e-3,
    min_learning_rate=2e-3,  # no decay: a curve that flattens does so by itself
    warmup=0.02,
    ema=0.99,
    checkpoint_every=3000,
    validate_every=250,
    log_every=250,
)


def check_target(kind: str, vae: str | None) -> None:
    """Raise ConfigError unless there is such a target, with a VAE where it needs one."""
    if kind not in TARGET_KINDS:
        raise ConfigError(f"there is no target {kind!r}; it must be one of {', '.join(TARGET_KINDS)}")
    if (vae is None) == (kind == "latents"):
        raise ConfigError(f"latents, and only they, need a VAE; the target is {kind!r} and vae {vae!r}")


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

    grid: tuple[int, int]
    token_dim: int
    condition_dim: int | None = None
    condition_grid: tuple[int, int] | None = None
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


@dataclass(frozen=True)
class PriorTraining:
    """Say what a prior generates, from which tokens, and how it is trained.

    Args:
        condition: tokens of the frozen backbone that it is given: "cls" (a picture's kind, no layout), "mean" (the mean
            patch), "patch" (the layout), "both"; "label" for the name of each image's folder; or None for an
            unconditional prior.
        target: what it generates: "pixels", "latents" of a VAE, or the backbone's "features".
        head: "image" denoises all target tokens at once (Lumos), "token" one after the other (MAR, Fluid).
        order: of a token head: "random" (MAR) or "raster" (causal).
        side: of the square pictures generated, in pixels; of features, of the pictures shown.
        patch: pixels, or cells of the latent, along the side of a target token.
        vae: folder of a diffusers AutoencoderKL, for latents.
        width: channels of the transformer.
        depth: its blocks.
        heads: attention heads.
        drop: share of conditions dropped in training, for guidance.
        codes: of a token head: 0 for continuous tokens, else the entries of a k-means codebook (Fluid).
        centred: whether the prior learns what it takes off each condition token's place.
        pseudo: noise that makes image features pass for a text's, "fixed" or "trained"; with the condition "mean" or
            "cls" (LAFITE).
        flips: whether each training image is also seen mirrored.
        pairs: share of the training images that are used, as of pairs in a second stage.
        held_out: share of the images that is held out; at least 2 images, and at most 64.
        loop: the optimizer's steps, learning rate, averaging and checkpoints. Its seed is also that of the initial
            weights, the order of the images, the noise and the choice of those held out; each checkpoint comes with
            a picture of samples.

    Raises:
        ConfigError: a value is outside its range.
    """

    condition: Condition | Literal["label"] | None = "patch"
    target: TargetKind = "pixels"
    head: Literal["image", "token"] = "image"
    order: Literal["random", "raster"] = "random"
    side: int = 64
    patch: int = 4
    vae: str | None = None
    width: int = 256
    depth: int = 6
    heads: int = 4
    drop: float = 0.1
    codes: int = 0
    centred: bool = False
    pseudo: Literal["fixed", "trained"] | None = None
    flips: bool = False
    pairs: float = 1.0
    held_out: float = 0.1
    loop: TrainingConfig = _PRIOR_LOOP

    def __post_init__(self) -> None:
        if self.condition not in (None, "label", *CONDITIONS):
            known = ", ".join((*CONDITIONS, "label"))
            raise ConfigError(f"there is no condition {self.condition!r}; it is one of {known} or None")
        if self.pseudo and self.condition not in ("cls", "mean"):
            raise ConfigError(
                f"pseudo-text needs one feature an image: the condition 'cls' or 'mean', got {self.condition!r}"
            )
        if not 0 < self.pairs <= 1:
            raise ConfigError(f"pairs is a share of the images in (0, 1], got {self.pairs}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share of the images in (0, 1), got {self.held_out}")
        if self.side < 1 or self.patch < 1 or (self.target == "pixels" and self.side % self.patch):
            raise ConfigError(f"side must be a multiple of the patch {self.patch}, got {self.side} pixels")
        check_target(self.target, self.vae)
        self.prior((1, 1), 1, 1, (1, 1) if self.condition in ("patch", "both") else None)

    def to_json(self) -> dict[str, Any]:
        """List all settings as a prior's card holds them: those of the loop beside the others, not inside."""
        flat = asdict(self)
        return flat | flat.pop("loop")

    def prior(
        self,
        grid: tuple[int, int],
        token_dim: int,
        condition_dim: int | None,
        condition_grid: tuple[int, int] | None,
    ) -> PriorConfig:
        """Describe the prior for tokens of this size."""
        names = ("head", "order", "width", "depth", "heads", "drop", "codes", "centred", "pseudo")
        return PriorConfig(
            grid, token_dim, condition_dim, condition_grid, **{name: getattr(self, name) for name in names}
        )


@dataclass(frozen=True)
class Sampling:
    """Say how samples are drawn.

    Args:
        steps: noise levels of the sampler.
        ar_steps: how often a token head in random order asks its trunk.
        sampler: "heun", "ddim" (ancestral), or "restart" (four returns between noise levels .3 and 2).
        guidance: classifier-free guidance in [0, 100]; 1 for none.
        rising: whether the guidance rises from 1 to its value on the way, or is the same all along.
        temperature: in (0, 10]; below 1 samples vary less.
        seed: of the samples.

    Raises:
        ConfigError: a value is outside its range.
    """

    steps: int = 18
    ar_steps: int = 16
    sampler: Literal["heun", "ddim", "restart"] = "heun"
    guidance: float = 1.0
    rising: bool = False
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.ar_steps < 1:
            raise ConfigError(f"steps and ar_steps must be at least 1, got {self.steps} and {self.ar_steps}")
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"there is no sampler {self.sampler!r}; it is one of {', '.join(SAMPLERS)}")
        if not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ConfigError(f"guidance must lie in 0 ... {MOST_GUIDANCE:g}; 1 is none, got {self.guidance}")
        if not 0 < self.temperature <= 10:
            raise ConfigError(f"temperature must lie above 0 and be at most 10, got {self.temperature}")


@dataclass(frozen=True)
class Comparison:
    """Say what is compared, and with which budget.

    Args:
        kinds: some of those that there are, "raw" among them; empty for all.
        seeds: runs of each kind; their spread gives the intervals.
        prior: what is trained and how; the condition is patches, and `loop.validate_every` is how often the curves
            have a point.

    Raises:
        ConfigError: a value is outside its range.
    """

    kinds: tuple[str, ...] = ()
    seeds: int = 3
    prior: PriorTraining = PriorTraining(side=32, width=64, depth=2, held_out=0.2, loop=_COMPARISON_LOOP)

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ConfigError(f"an interval needs 2 seeds or more, got {self.seeds}")
        if self.prior.condition != "patch" or self.prior.target == "features" or self.prior.flips:
            raise ConfigError("a comparison is of patch tokens as conditions, of pixels or latents, and without flips")
        if self.kinds and "raw" not in self.kinds:
            raise ConfigError(f"kinds are compared with raw, which is not among {', '.join(self.kinds)}")
        if self.prior.loop.validate_every < 1:
            raise ConfigError("a curve needs validate_every of at least 1")


@dataclass(frozen=True)
class Loop:
    """Say how a prior is refitted on its own samples.

    Args:
        rounds: refits.
        mix: synthetic samples for each real one.
        corrector: "none", or "centres": a sample becomes a random real image of the nearest of `clusters` centres.
        gamma: strength of the correction: a sample is corrected with chance gamma / (1 + gamma).
        clusters: of the corrector.
        round_steps: training steps of each round, from the weights of the round before.
        seeds: loops; their spread gives the intervals.

    Raises:
        ConfigError: a value is outside its range.
    """

    rounds: int = 4
    mix: float = 1.0
    corrector: Literal["none", "centres"] = "none"
    gamma: float = 1.0
    clusters: int = 16
    round_steps: int = 200
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("rounds", "clusters", "round_steps", "seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.mix <= 100 or not 0 <= self.gamma < float("inf"):
            raise ConfigError(f"mix must lie in (0, 100] and gamma be at least 0, got {self.mix} and {self.gamma}")
        if self.corrector not in ("none", "centres"):
            raise ConfigError(f"corrector must be 'none' or 'centres', got {self.corrector!r}")
