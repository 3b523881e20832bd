"""Hold the answer to whether a backbone needs denoising, and write it as a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from dvt.analysis.config import DoctorConfig
from dvt.analysis.metrics.nulls import Score
from dvt.text import counted, shell_lines, wrapped


@dataclass(frozen=True)
class Treated:
    """Hold the measured effect of a denoiser, or of a product of stage one.

    Args:
        name: the name that was given to `diagnose`.
        share: share of the variance that the position still explains within an image.
        outliers: share of tokens that are still norm outliers.
        kept: mean cosine with the raw tokens less their mean at each position, both centred in each image, in [-1, 1].
        milliseconds: added time for an image.
        images: number of images measured.
    """

    name: str
    share: float
    outliers: float
    kept: float
    milliseconds: float
    images: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """Hold the answer; ``print`` it, or take :meth:`to_json`.

    Attributes:
        backbone: its name.
        kind: "none", "position", "norm outliers" or "both".
        remedy: "none", "subtract" (one map for all images), "per image" (``dvt denoise``, or a denoiser trained on
            that) or "denoiser" (a trained one).
        best: the denoiser or product that does best of those given, or None.
        strength: the least strength of the remedy, in [0, 1], that brings the position share below its threshold.
        shared: share of the variance that the position explains in the same way in all images, with its null.
        own: share of the variance that the position explains within each image, with its null.
        outliers: share of tokens that are norm outliers, with its null.
        outlier_images: share of the images that have a norm outlier.
        layout: R^2 of position read from photographs without the artifact, with its null; None with one image.
        treated: the measured effect of each denoiser and product that was given.
        backbone_milliseconds: time of the backbone for an image.
        denoise_seconds: time of a decomposition, if one was tried.
        images: number of images measured.
        config: the thresholds.
        warnings: reasons to doubt the answer.
        command: the command that makes the best one, or the nearest if none is good enough; None if it is unknown.
        raw: the raw tokens, measured in the same terms as those treated.
        products: the names of those treated that are products of stage one.
        one_pass: the best of the denoisers alone, which add no forward pass, or None.
        one_pass_command: the command that makes `one_pass`.
        how: the commands that carry out `remedy`, in order; empty if they are unknown.
        denoise_product: the product whose decomposition took `denoise_seconds`, if it is known.
    """

    backbone: str
    kind: str
    remedy: str
    best: str | None
    strength: float
    shared: Score | None
    own: Score
    outliers: Score
    outlier_images: float
    layout: Score | None
    treated: tuple[Treated, ...]
    backbone_milliseconds: float
    denoise_seconds: float | None
    images: int
    config: DoctorConfig
    warnings: tuple[str, ...] = field(default=())
    command: str | None = None
    raw: Treated | None = None
    products: tuple[str, ...] = ()
    one_pass: str | None = None
    one_pass_command: str | None = None
    how: tuple[str, ...] = ()
    denoise_product: str | None = None

    @property
    def nearest(self) -> str | None:
        """Name the denoiser that leaves least of the artifact, where it leaves less than half."""
        if not self.treated or self.kind not in ("position", "norm outliers"):
            return None
        size, raw = ("share", self.own) if self.kind == "position" else ("outliers", self.outliers)
        least = min(self.treated, key=lambda each: getattr(each, size))
        return least.name if getattr(least, size) < raw.value / 2 else None

    def to_json(self) -> dict[str, Any]:
        """Return all fields, ready for JSON, and the page."""
        return {"schema": "dvt-diagnosis/1", **asdict(self), "text": self.to_text()}

    def to_text(self) -> str:
        """Write the page as text."""
        parts = [self._answer(), self._evidence(), self._what_to_do(), self._costs(), self._harms()]
        return "\n\n".join(part for part in parts if part)

    __str__ = to_text

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.to_text())}</pre>"

    def _answer(self) -> str:
        answers = {
            "none": "No: no artifact above its threshold. None needed.",
            "position": "Yes: part of each token depends on its position, not on the image.",
            "norm outliers": "Yes: some tokens have norms far beyond the others and stand for no place in the image.",
            "both": "Yes: tokens depend on their position, and some have norms far beyond the others.",
        }
        count = counted(self.images, "image")
        return wrapped(f"Does {self.backbone} need denoising? ({count})\n{answers[self.kind]}")

    def _evidence(self) -> str:
        limit, lines = self.config, ["What was measured"]
        lines.append(f"  position share, within an image     {_score_text(self.own)}, limit {limit.share:g}")
        if self.shared is not None:
            lines.append(f"  position share, same in all images  {_score_text(self.shared)}")
        outliers = f"tokens of {limit.ratio:g} times the median norm".ljust(34)
        lines.append(f"  {outliers}  {_score_text(self.outliers, 4)}, limit {limit.outliers:g}")
        if self.images > 1:
            lines.append(f"  images that have such tokens        {self.outlier_images:.0%}")
        if self.layout is not None:
            lines.append(f"  position R² without the artifact    {_score_text(self.layout)}: what the photos share")
        return wrapped("\n".join([*lines, *(f"  ! {each}" for each in self.warnings)]))

    def _what_to_do(self) -> str:
        if self.remedy == "none":
            return ""
        texts = {
            "subtract": "Subtract one map: the artifact is the same in all images. `dvt train` of the kind subtract "
            "finds it in a store of `dvt denoise`; applying it costs nothing.",
            "per image": self._per_image(),
            "denoiser": "A trained denoiser: `dvt denoise` of some hundred images with the product ensembled, then "
            "`dvt train`; a map that is subtracted cannot see norm outliers. Or a backbone with registers, which `dvt "
            "remedy` adds without training; --remedies compares.",
        }
        advice = [texts[self.remedy], f"A strength of {self.strength:g} is the least that is enough; 1 is the default."]
        if self.shared is not None and self.remedy == "subtract":
            advice.append(f"It leaves a position share of {left_share(self.own, self.shared):.3f}.")
        commands = [shell_lines(each) for each in self.how if self.command is None]  # a quoted name is not wrapped
        return "\n".join(["What to do", *(wrapped(f"  {each}") for each in advice), *commands, *self._compared()])

    def _per_image(self) -> str:
        """Write why each image is decomposed: one map for all is not enough, or one image does not tell."""
        if self.shared is None:
            return (
                "`dvt denoise` for this image. Whether the artifact is the same in all images, so that one map could "
                "be subtracted from them, one image does not tell: give ten or more."
            )
        left, limit = left_share(self.own, self.shared), self.config.share
        return (
            f"`dvt denoise` for each image: one map for all images would leave a position share of {left:.3f}, and the "
            f"limit is {limit:g}. Its default product, removed, stays closest to the backbone's own tokens. For many "
            "images train a denoiser: `dvt denoise` with the product ensembled, which suits labelled tasks better, "
            "then `dvt train`."
        )

    def _compared(self) -> list[str]:
        """Write a line for each of those given, and which of them to take."""
        if not self.treated:
            return []
        width = max(len(each.name) for each in self.treated)
        head = f"  {'':<{width}}  at position  outliers  like the content  images"
        lines = [head] if self.raw is None else [head, _row(self.raw, width, "")]
        for each in self.treated:
            lines.append(wrapped(_row(each, width, "  the best" if each.name == self.best else "")))
        if self.best is None:
            least = f" {self.nearest} leaves least." if self.nearest else ""
            lines.append(wrapped(f"  None of those given removes enough.{least}"))
        if self.command is not None:
            lines.append(f"  {'Take' if self.best else 'The nearest'} {self.best or self.nearest}:")
            lines.append(shell_lines(self.command))
        if self.one_pass_command is not None and self.one_pass != self.best:
            lines.append(f"  In one pass an image, {self.one_pass}:")
            lines.append(shell_lines(self.one_pass_command))
        if self.images == 1:
            lines.append("  All of this is about this one image; ten or more would tell about others.")
        return lines

    def _costs(self) -> str:
        lines = [
            "What it costs on this machine",
            f"  backbone                 {self.backbone_milliseconds:.1f} ms an image",
        ]
        for each in self.treated:
            lines.append(f"  {each.name:<24} {each.milliseconds:.1f} ms more an image")
        if self.denoise_seconds is not None:
            made = "dvt denoise" + (f" ({self.denoise_product})" if self.denoise_product else "")
            lines.append(f"  {made:<24} {self.denoise_seconds:.1f} s an image")
        return wrapped("\n".join(lines)) if self.remedy != "none" or len(lines) > 2 else ""

    def _harms(self) -> str:
        if self.remedy == "none":
            return ""
        lines = [
            "What it may hurt",
            "  Tasks that need to know where a patch is: detection, pose, and scenes of one layout. Compare raw and "
            "denoised features on your labels (`dvt probe`), whole frames and crops, before you settle the strength.",
        ]
        if self.layout is not None and self.layout.value >= self.config.layout and self.layout.beyond_chance:
            lines.append("  Here position is a cue: these photos share a layout, so start from a lower strength.")
        return wrapped("\n".join(lines))


def _row(each: Treated, width: int, mark: str) -> str:
    numbers = f"{each.share:>11.3f}  {each.outliers:>8.4f}  {each.kept:>16.2f}  {each.images:>6}"
    return f"  {each.name:<{width}}  {numbers}{mark}"


def left_share(own: Score, shared: Score) -> float:
    """Compute the position share that is left once the map that all images share is subtracted."""
    return max(0.0, own.value - shared.value) / max(1 - shared.value, 1e-6)


def _score_text(score: Score, digits: int = 3) -> str:
    return f"{score.value:.{digits}f} (chance up to {score.high:.{digits}f})"
