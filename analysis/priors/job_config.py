"""Hold the settings of the jobs that work with priors: comparisons, loops, encoders trained on samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dvt.analysis.priors.config import PriorConfig, PriorTraining
from dvt.errors import ConfigError
from dvt.training.config import TrainingConfig

_COMPARISON_LOOP = TrainingConfig(
    steps=3000,
    batch_size=48,
    learning_rate=2e-3,
    min_learning_rate=2e-3,  # no decay, which would flatten the curves
    warmup=0.02,
    ema=0.99,
    checkpoint_every=3000,
    validate_every=250,
    log_every=250,
)
_COMPARED = PriorTraining(side=32, width=64, depth=2, held_out=0.2, loop=_COMPARISON_LOOP)


@dataclass(frozen=True)
class Comparison:
    """Hold the settings of a comparison of priors with different conditions.

    Args:
        kinds: kinds of tokens to compare, "raw" among them; empty for all.
        seeds: runs per kind; their spread gives the intervals.
        prior: settings for training; the condition must be patches, and `loop.validate_every` is the distance of points
            on the curves.

    Raises:
        ConfigError: a value is outside its range.
    """

    kinds: tuple[str, ...] = ()
    seeds: int = 3
    prior: PriorTraining = _COMPARED

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ConfigError(f"an interval needs 2 seeds or more, got {self.seeds}")
        if self.prior.condition != "patch" or self.prior.target == "features" or self.prior.flips:
            raise ConfigError("a comparison needs the condition 'patch', the target pixels or latents, and no flips")
        if self.kinds and "raw" not in self.kinds:
            raise ConfigError(f"kinds are compared with raw, which is not among {', '.join(self.kinds)}")
        if self.prior.loop.validate_every < 1:
            raise ConfigError("a curve needs validate_every of at least 1")


@dataclass(frozen=True)
class Loop:
    """Hold the settings for refitting a prior on its own samples.

    Args:
        rounds: number of refits.
        mix: synthetic samples per real one.
        corrector: "none"; "centres", which replaces a sample by a random real image of its nearest cluster; or
            "likelihood", which draws again among the samples, more often those that real images make likelier.
        gamma: strength of the correction: a sample is corrected with probability gamma / (1 + gamma).
        clusters: number of the corrector's clusters or, for likelihood, of normal distributions in a mixture.
        round_steps: training steps per round, starting from the previous round's weights.
        seeds: number of loops; their spread gives the intervals.

    Raises:
        ConfigError: a value is outside its range.
    """

    rounds: int = 4
    mix: float = 1.0
    corrector: Literal["none", "centres", "likelihood"] = "none"
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
        if self.corrector not in ("none", "centres", "likelihood"):
            raise ConfigError(f"corrector must be 'none', 'centres' or 'likelihood', got {self.corrector!r}")


@dataclass(frozen=True)
class EncoderConfig:
    """Hold the architecture of a picture encoder, how its pictures are changed at random, and its contrastive loss.

    Args:
        patch: side of a token in pixels.
        width: channels of the transformer and of the features.
        depth: blocks of the transformer.
        project: channels of the vectors that the loss compares.
        temperature: of the contrastive loss; StableRep takes .1, SynCLR .08.
        members: pictures of one condition (or views of one picture) in a batch, at least 2.
        masked: weight of the loss on hidden patches (SynCLR's second part), where there is one; 0 for none.
        prototypes: number of prototypes of that loss.
        crop: smallest share of a picture's area that a random crop keeps.
        flip: probability that a picture is mirrored; 0 for digits and text.
        colour: strength of random changes of colour and brightness.

    Raises:
        ConfigError: a value is outside its range.
    """

    patch: int = 4
    width: int = 64
    depth: int = 2
    project: int = 32
    temperature: float = 0.1
    members: int = 4
    masked: float = 1.0
    prototypes: int = 64
    crop: float = 0.4
    flip: float = 0.5
    colour: float = 0.2

    def __post_init__(self) -> None:
        for name, least in (("patch", 1), ("width", 4), ("depth", 1), ("project", 1), ("members", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.width % 4:
            raise ConfigError(f"width must be a multiple of 4, got {self.width}")
        if not self.temperature > 0 or self.masked < 0 or self.prototypes < 2 or self.colour < 0:
            raise ConfigError(
                "temperature must be positive, masked and colour at least 0 and prototypes at least 2, got "
                f"{self.temperature}, {self.masked}, {self.colour} and {self.prototypes}"
            )
        if not 0 < self.crop <= 1 or not 0 <= self.flip <= 1:
            raise ConfigError(f"crop must lie in (0, 1] and flip in [0, 1], got {self.crop} and {self.flip}")


_ENCODER_LOOP = TrainingConfig(
    steps=600,
    batch_size=64,
    learning_rate=2e-3,
    warmup=0.1,
    weight_decay=0.05,
    ema=0.98,
    checkpoint_every=600,
    validate_every=0,
    log_every=100,
    keep=1,
)


@dataclass(frozen=True)
class Represent:
    """Hold the settings for encoders that are trained on a prior's samples, and for their probes.

    Args:
        samples: samples per condition.
        conditions: largest number of training images whose conditions are sampled; 0 for all.
        sizes: numbers of pictures, synthetic and real, at which the error is measured for the law, at least 5 of them;
            empty for five sizes, each twice the one before, up to the number of real pictures.
        seeds: encoders per row; their spread gives the intervals.
        neighbours: number of neighbours that vote in the kNN probe.
        encoder: the encoder and its loss.
        loop: settings of its training; each size gets the same number of steps.

    Raises:
        ConfigError: a value is outside its range.
    """

    samples: int = 4
    conditions: int = 0
    sizes: tuple[int, ...] = ()
    seeds: int = 3
    neighbours: int = 20
    encoder: EncoderConfig = EncoderConfig()
    loop: TrainingConfig = _ENCODER_LOOP

    def __post_init__(self) -> None:
        if self.samples < 2 or self.seeds < 2 or self.neighbours < 1 or self.conditions < 0:
            raise ConfigError(
                "samples and seeds must be at least 2, neighbours 1 and conditions 0, got "
                f"{self.samples}, {self.seeds}, {self.neighbours} and {self.conditions}"
            )
        if self.sizes and (len(set(self.sizes)) < 5 or min(self.sizes) < 2):
            raise ConfigError(f"a law with a floor needs 5 different sizes of at least 2, got {list(self.sizes)}")
        if self.loop.batch_size % self.encoder.members:
            raise ConfigError(
                f"the batch must be a multiple of the {self.encoder.members} members, got {self.loop.batch_size}"
            )


_TOWER_LOOP = TrainingConfig(
    steps=1000,
    batch_size=64,
    learning_rate=2e-3,
    warmup=0.1,
    weight_decay=0.05,
    ema=0.98,
    checkpoint_every=1000,
    validate_every=250,
    log_every=50,
    keep=1,
)


@dataclass(frozen=True)
class TowerTraining:
    """Hold the settings for training a small image-text tower.

    Args:
        side: side of the pictures in pixels.
        length: number of words of a text that are read.
        rewrites: draw each text among the original and its rewrites (LaCLIP); otherwise always take the original.
        prompts: texts for the name of a class, which takes the place of {}; they are averaged.
        held_out: share of the images to hold out; at least 2.
        encoder: the picture encoder; its width, depth and project are also those of the text encoder.
        loop: settings of the training loop.

    Raises:
        ConfigError: a value is outside its range.
    """

    side: int = 32
    length: int = 12
    rewrites: bool = True
    prompts: tuple[str, ...] = ("a photo of a {}",)
    held_out: float = 0.2
    encoder: EncoderConfig = EncoderConfig()
    loop: TrainingConfig = _TOWER_LOOP

    def __post_init__(self) -> None:
        if self.side < 1 or self.length < 1 or self.side % self.encoder.patch:
            raise ConfigError(
                f"side must be a multiple of the patch {self.encoder.patch} and length at least 1, got {self.side} and "
                f"{self.length}"
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is a share of the images in (0, 1), got {self.held_out}")
        if not self.prompts or any("{}" not in prompt for prompt in self.prompts):
            raise ConfigError(f"a prompt is a text with {{}} in place of the class, got {list(self.prompts)}")


_ITIT_LOOP = TrainingConfig(
    steps=500,
    batch_size=24,
    learning_rate=3e-3,
    warmup=0.1,
    ema=0.98,
    checkpoint_every=500,
    validate_every=0,
    log_every=50,
    keep=1,
)


@dataclass(frozen=True)
class Itit:
    """Hold the settings for two priors of discrete tokens, image to text and text to image, trained in a cycle.

    Args:
        side: side of the pictures in pixels, a multiple of `patch`.
        patch: side of an image token in pixels.
        codes: number of entries of the codebook of image tokens.
        length: number of words of a text that are read.
        pairs: share of the training images whose own text is known; the others and all texts are used without it.
        weight: weight of the cycles' losses.
        seeds: runs per row; their spread gives the intervals.
        width: channels of both transformers.
        depth: blocks of both transformers.
        held_out: share of the images to hold out, where no test images are given.
        loop: settings of the training loop.

    Raises:
        ConfigError: a value is outside its range.
    """

    side: int = 16
    patch: int = 4
    codes: int = 64
    length: int = 6
    pairs: float = 0.1
    weight: float = 0.3
    seeds: int = 3
    width: int = 48
    depth: int = 2
    held_out: float = 0.2
    loop: TrainingConfig = _ITIT_LOOP

    def __post_init__(self) -> None:
        if self.side < 1 or self.patch < 1 or self.side % self.patch:
            raise ConfigError(f"side must be a multiple of the patch {self.patch}, got {self.side}")
        if not 0 < self.pairs <= 1 or not 0 < self.held_out < 1 or not self.weight > 0:
            raise ConfigError(
                "pairs must lie in (0, 1], held_out in (0, 1) and weight above 0, got "
                f"{self.pairs}, {self.held_out} and {self.weight}"
            )
        if self.codes < 2 or self.length < 1 or self.seeds < 2:
            raise ConfigError(
                f"codes and seeds must be at least 2 and length 1, got {self.codes}, {self.seeds} and {self.length}"
            )
        PriorConfig((1, 1), 1, 1, head="token", codes=self.codes, width=self.width, depth=self.depth)
