"""Settings of the training loop, counted in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from dvt.errors import ConfigError

_PAPER_BATCH = 256  # images a step at which Denoising ViT states its learning rate


@dataclass(frozen=True)
class TrainingConfig:
    """Hold the settings of the training loop; all lengths are in optimizer steps.

    Args:
        steps: the length of the whole run.
        batch_size: examples per step, in all processes together.
        learning_rate: the highest learning rate, at the end of the warm-up; None for 2e-4 sqrt(batch_size / 256), as in
            Denoising ViT (arXiv 2401.02957), which suits tens of thousands of images and long runs.
        min_learning_rate: the learning rate at the last step.
        warmup: share of the steps, in [0, 1), during which the learning rate rises linearly.
        weight_decay: decoupled (AdamW); only on parameters with two or more dimensions.
        betas: decay of the first and second moment.
        clip: largest L2 norm of the gradient; 0 for no limit.
        ema: decay of the averaged weights, in [0, 1); 0 for none. The first steps forget faster: the decay
            of step n is at most (1 + n) / (10 + n).
        precision: "no" for float32, "bf16" or "fp16" for autocast; fp16 needs a GPU.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        log_every: steps between rows of the log; a row's losses are means since the previous row.
        validate_every: steps between validations; 0 validates at the last step only.
        keep: how many checkpoints are kept, the newest ones.
        seed: seed of everything random: initial weights, order and augmentation of the examples, the choice of held-out
            ones, and random numbers inside the model.
        trackers: where to log beside log.csv: "tensorboard", "wandb", both or none.

    Raises:
        ConfigError: a value is outside its range.

    >>> config = TrainingConfig(steps=100, batch_size=8, learning_rate=1e-3, warmup=0.1)
    >>> [round(config.learning_rate_at(step), 6) for step in (0, 9, 99)]
    [0.0001, 0.001, 1e-06]
    """

    steps: int
    batch_size: int
    learning_rate: float | None
    min_learning_rate: float = 1e-6
    warmup: float = 0.15
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_every: int = 1000
    log_every: int = 10
    validate_every: int = 500
    keep: int = 2
    seed: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("validate_every", "weight_decay", "clip", "seed"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0")
        for name in ("warmup", "ema"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two, in [0, 1)")
        _require(0 < self.peak_rate < math.inf, "learning_rate", self.learning_rate, "above 0")
        least = self.min_learning_rate
        _require(0 <= least <= self.peak_rate, "min_learning_rate", least, f"0 to {self.peak_rate}")
        _require(self.precision in ("no", "bf16", "fp16"), "precision", self.precision, "no, bf16 or fp16")
        known = set(self.trackers) <= {"tensorboard", "wandb"}
        _require(known, "trackers", self.trackers, "some of tensorboard and wandb")

    @classmethod
    def of(cls, job: Any, **changes: Any) -> TrainingConfig:
        """Make a config from the fields of a job's dataclass that have the same names, with changes."""
        names = {each.name for each in fields(cls)} & {each.name for each in fields(job)}
        return cls(**{name: getattr(job, name) for name in names} | changes)

    @property
    def peak_rate(self) -> float:
        """The highest learning rate, computed from the batch size if it is not set."""
        if self.learning_rate is None:
            return 2e-4 * math.sqrt(self.batch_size / _PAPER_BATCH)
        return self.learning_rate

    def learning_rate_at(self, step: int) -> float:
        """Compute the learning rate of a step, counted from 0: linear warm-up, then a cosine down to the last step."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.peak_rate * (step + 1) / rising
        done = (step - rising + 1) / (self.steps - rising)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.min_learning_rate + (self.peak_rate - self.min_learning_rate) * cosine


def flat_settings(job: Any) -> dict[str, Any]:
    """List the settings of a job and of its `loop` in one flat dictionary, as cards hold them.

    Args:
        job: a dataclass with a field `loop`, a TrainingConfig.
    """
    own = asdict(job)
    loop = own.pop("loop")
    return {**own, **loop}


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")
