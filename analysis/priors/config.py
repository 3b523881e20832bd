"""Hold the settings of priors: architecture, training, sampling, comparison and loops."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dvt.errors import ConfigError
from dvt.schema import check_ranges
from dvt.training.config import TrainingConfig

TargetKind = Literal["pixels", "latents", "features"]
TARGET_KINDS = ("pixels", "latents", "features")
Condition = Literal["cls", "mean", "patch", "both"]
CONDITIONS = ("cls", "mean", "patch", "both")
OtherCondition = Literal["label", "text", "pseudo-text"]
OTHER_CONDITIONS = ("label", "text", "pseudo-text")
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


def check_target(kind: str, vae: str | None) -> None:
    """Check that there is such a target, with a VAE if and only if it needs one; else raise ConfigError."""
    if kind not in TARGET_KINDS:
        raise ConfigError(f"there is no target {kind!r}; it must be one of {', '.join(TARGET_KINDS)}")
    if (vae is None) == (kind == "latents"):
        raise ConfigError(f"the target 'latents', and no other, needs a VAE; the target is {kind!r} and vae {vae!r}")


@dataclass(frozen=True)
class PriorConfig:
    """Hold the architecture of a prior.

    Args:
        grid: (h, w), the number of target tokens per side.
        token_dim: D, channels of a target token.
        condition_dim: C, channels of a condition token; None for a prior without a condition.
        condition_grid: (h, w) if the last h w condition tokens lie on a grid, so that the prior can embed their
            positions; None for class tokens, labels and texts.
        head: "image" denoises all target tokens at once; "token" denoises each one, given the trunk's output for it.
        order: for a token head, "random" (masked, full attention) or "raster" (causal).
        width: channels of the trunk, a multiple of 4 and of `heads`.
        depth: blocks of the trunk.
        heads: attention heads.
        drop: share of conditions replaced by a learned null in training, for guidance.
        levels: noise levels per token and training step of a token head.
        codes: for a token head, 0 for continuous tokens, else the number of entries of a codebook to which tokens are
            rounded; they are then predicted by cross-entropy.
        centred: let the embedder of conditions learn, for each position of the grid, a vector that it subtracts from
            the token before normalising it.
        pseudo: "fixed" or "trained" noise, which turns image features into pseudo-text features in training (LAFITE);
            None for no noise.

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
            raise ConfigError("centred=True needs condition tokens on a grid, such as patches")
        for name in ("token_dim", "width", "depth", "heads", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 4 or self.width % self.heads:
            raise ConfigError(f"width must be a multiple of 4 and of the {self.heads} heads, got {self.width}")
        if len(self.grid) != 2 or min(self.grid) < 1 or not 0 <= self.drop <= 1:
            raise ConfigError(f"grid must be (h, w) and drop a share in [0, 1], got {self.grid} and {self.drop}")


@dataclass(frozen=True)
class PriorTraining:
    """Hold the settings for training a prior: condition, target, architecture and training loop.

    Args:
        condition: tokens of the frozen backbone that condition the prior: "cls" (the kind of picture, no layout),
            "mean" (the mean patch), "patch" (the layout), "both"; "label" for the name of each image's folder; "text"
            for its text; "pseudo-text" for its own feature with noise, in place of a text (LAFITE); or None for an
            unconditional prior. The last four need no backbone.
        target: what the prior generates: "pixels", "latents" of a VAE, or the backbone's "features".
        head: "image" denoises all target tokens at once (Lumos), "token" one after the other (MAR, Fluid).
        order: for a token head, "random" (MAR) or "raster" (causal).
        side: side in pixels of the square pictures to generate or, for features, to show.
        patch: side of a target token, in pixels or in cells of the latent.
        vae: folder of a diffusers AutoencoderKL, for latents.
        width: channels of the transformer.
        depth: blocks of the transformer.
        heads: attention heads.
        drop: share of conditions dropped in training, for guidance.
        codes: for a token head, 0 for continuous tokens, else the number of entries of a k-means codebook (Fluid).
        centred: let the prior learn, for each position, a vector to subtract from condition tokens.
        tower: for texts and pseudo-texts, a file of `dvt prior tower`, or open_clip:MODEL or open_clip:MODEL:WEIGHTS.
        texts: for the condition "text", a file of JSON lines with the text of each image.
        pseudo: noise of pseudo-texts: "fixed", "trained", or "none" as a control; None means "fixed".
        flips: also train on each image mirrored.
        pairs: share of the training images to use, as for the few pairs of a second stage.
        held_out: share of the images to hold out; at least 2 images and at most 64 are held out.
        loop: the optimizer's steps, learning rate, averaging and checkpoints. Its seed also seeds the initial weights,
            the order of the images, the noise and the choice of held-out images; a picture of samples is written with
            each checkpoint.

    Raises:
        ConfigError: a value is outside its range.
    """

    condition: Condition | OtherCondition | None = "patch"
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
    tower: str | None = None
    texts: str | None = None
    pseudo: Literal["fixed", "trained", "none"] | None = None
    flips: bool = False
    pairs: float = 1.0
    held_out: float = 0.1
    loop: TrainingConfig = _PRIOR_LOOP

    def __post_init__(self) -> None:
        if self.condition not in (None, *CONDITIONS, *OTHER_CONDITIONS):
            known = ", ".join((*CONDITIONS, *OTHER_CONDITIONS))
            raise ConfigError(f"there is no condition {self.condition!r}; it is one of {known} or None")
        if (self.tower is None) == (self.condition in ("text", "pseudo-text")):
            raise ConfigError(
                "the conditions 'text' and 'pseudo-text', and no other, need a tower; the condition is "
                f"{self.condition!r} and the tower {self.tower!r}"
            )
        if (self.texts is None) == (self.condition == "text"):
            raise ConfigError(
                f"the condition 'text', and no other, needs a file of texts; the condition is {self.condition!r} and "
                f"the file {self.texts!r}"
            )
        if self.pseudo not in (None, "fixed", "trained", "none") or (self.pseudo and self.condition != "pseudo-text"):
            raise ConfigError(
                "pseudo is the noise of the condition 'pseudo-text': fixed, trained or none, got "
                f"{self.pseudo!r} with {self.condition!r}"
            )
        if not 0 < self.pairs <= 1:
            raise ConfigError(f"pairs is a share of the images in (0, 1], got {self.pairs}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share of the images in (0, 1), got {self.held_out}")
        if self.side < 1 or self.patch < 1 or (self.target == "pixels" and self.side % self.patch):
            raise ConfigError(f"side must be a multiple of the patch {self.patch}, got {self.side} pixels")
        check_target(self.target, self.vae)
        self.prior((1, 1), 1, 1, (1, 1) if self.condition in ("patch", "both") else None)

    @property
    def token_condition(self) -> Condition | None:
        """The backbone's tokens that are the condition; None if they are not."""
        return next((kind for kind in get_args(Condition) if kind == self.condition), None)

    @property
    def needs_backbone(self) -> bool:
        """True if a backbone's tokens are the condition or the target."""
        return self.token_condition is not None or self.target == "features"

    def to_json(self) -> dict[str, Any]:
        """List all settings in one flat dictionary, as a prior's card holds them."""
        flat = asdict(self)
        return flat | flat.pop("loop")

    def prior(
        self,
        grid: tuple[int, int],
        token_dim: int,
        condition_dim: int | None,
        condition_grid: tuple[int, int] | None,
    ) -> PriorConfig:
        """Make the architecture of a prior for target and condition tokens of these sizes."""
        names = ("head", "order", "width", "depth", "heads", "drop", "codes", "centred")
        noise = (self.pseudo or "fixed") if self.condition == "pseudo-text" else None
        given = {name: getattr(self, name) for name in names} | {"pseudo": None if noise == "none" else noise}
        return PriorConfig(grid, token_dim, condition_dim, condition_grid, **given)


@dataclass(frozen=True)
class Sampling:
    """Hold the settings for drawing samples.

    Args:
        steps: noise levels of the sampler.
        ar_steps: how often a token head in random order calls its trunk.
        sampler: "heun", "ddim" (ancestral), or "restart" (four returns between noise levels .3 and 2).
        guidance: classifier-free guidance in [0, 100]; 1 for none.
        rising: let the guidance rise from 1 to its value in the course of sampling, instead of being constant.
        temperature: in (0, 10]; below 1 samples vary less.
        seed: seed of the samples.

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
        check_ranges(self, {name: (getattr(self, name) >= 1, "1 or more") for name in ("steps", "ar_steps")})
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"there is no sampler {self.sampler!r}; it is one of {', '.join(SAMPLERS)}")
        if not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ConfigError(f"guidance must lie in 0 ... {MOST_GUIDANCE:g}; 1 is none, got {self.guidance}")
        if not 0 < self.temperature <= 10:
            raise ConfigError(f"temperature must lie above 0 and be at most 10, got {self.temperature}")
