"""Stage one for many images into a feature store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dvt.backbones import Backbone
from dvt.errors import ImageError, NonFiniteError
from dvt.fields import LinearSolver
from dvt.grids import Size
from dvt.images import load_image
from dvt.pipeline import DenoiseConfig, Denoised, SharedEquations, denoise_image, equations
from dvt.store import Job, Record, Shard
from dvt.work import THREADS, Made, Planned, Progress, Summary, Work, log, run

ALL_TERMS = ("raw", "semantic", "artifact", "residual")

Each = Callable[[Path, Tensor, Denoised], None]


def denoise_images(
    backbone: Backbone,
    paths: Sequence[Path],
    out: str | Path,
    config: DenoiseConfig,
    *,
    keep_terms: bool = False,
    shard_images: int = 16,
    strict: bool = False,
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
    each: Each | None = None,
) -> Summary:
    """Stage one for many images into a feature store; the same call again does what is left.

    Args:
        backbone: its device is used.
        paths: image files, from :func:`dvt.images.find_images`.
        out: the store's folder.
        config: settings.
        keep_terms: also store the artifact and the residual.
        shard_images: images a shard; a killed run loses at most the shard in hand and the one being written.
        strict: raise on the first image that cannot be used, instead of reporting it at the end.
        wait: wait for another writer of the same store, instead of refusing.
        started: called with the job once the folder is locked and known to hold nothing else.
        progress: called with (what, done, total) after every image.
        each: called with (path, pixels, result) for every image computed, for pictures.

    Raises:
        StoreError: the folder cannot be written, or holds another job's tokens.
        ImageError: with strict, an image cannot be read.
        NonFiniteError: with strict, an image's tokens hold NaN or infinity.
        ConfigError: not even half a batch of views fits into the memory.
    """
    work = Denoising(backbone, config, keep_terms=keep_terms, shard_images=shard_images, strict=strict, each=each)
    return run(work, paths, out, wait=wait, started=started, progress=progress)


def denoise_job(backbone: Backbone, config: DenoiseConfig, keep_terms: bool) -> Job:
    """The store's job: everything that the tokens depend on."""
    terms = list(ALL_TERMS if keep_terms else ALL_TERMS[:2])
    return Job(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        stride=backbone.stride,
        size=backbone.image_size,
        config={"verb": "denoise", "terms": terms, **config.numbers()},
    )


class Denoising(Work):
    """Stage one as the work of a job; see :func:`denoise_images` for the arguments."""

    def __init__(
        self,
        backbone: Backbone,
        config: DenoiseConfig,
        *,
        keep_terms: bool = False,
        shard_images: int = 16,
        strict: bool = False,
        each: Each | None = None,
    ):
        super().__init__(
            backbone,
            denoise_job(backbone, config, keep_terms),
            shard_images=shard_images,
            threads=THREADS,
            strict=strict,
            shared_images=config.shared_images if config.shared_artifact else 0,
        )
        self.config, self.each = config, each
        self.terms = ALL_TERMS if keep_terms else ALL_TERMS[:2]

    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[Made]:
        """Each shard, computed."""
        device = self.backbone.mean.device
        for shard, artifact in shards:
            made = Made(shard, artifact=artifact)
            made.records = list(self._records(made, None if artifact is None else artifact.to(device), tick))
            yield made

    def _records(self, made: Made, artifact: Tensor | None, tick: Callable[[], None]) -> Iterator[Record]:
        """Records of a shard's images; copies of the same bytes, which lie next to each other, are computed once."""
        last: str = ""
        found: tuple[Denoised, Size] | None = None
        for image in made.shard.images:
            path, sha256, _ = image
            if sha256 != last or found is None:  # a copy that cannot be read is reported under its own path
                last, found = sha256, self._denoise(image, artifact, made)
            tick()
            if found is None:
                continue
            result, size = found
            maps = result.decomposition.terms()
            yield Record(path, sha256, size, {term: maps[term].cpu() for term in self.terms}, result.prefix.cpu())

    def _denoise(self, image: Planned, artifact: Tensor | None, made: Made) -> tuple[Denoised, Size] | None:
        path, sha256, _ = image
        with self.reported(path, made.failed):
            pixels = load_image(path, sha256)
            if self.shared_images and artifact is None:
                raise ImageError(
                    f"no artifact that {path!r} could share was fitted: none of the images for it was usable"
                )
            result = denoise_image(self.backbone, pixels, self.config, artifact)
            made.extraction_seconds += result.extraction_seconds
            made.fitting_seconds += result.fitting_seconds
            if self.each:
                self.each(Path(path), pixels, result)
            return result, (pixels.shape[1], pixels.shape[2])
        return None

    def equations(self, image: Planned) -> SharedEquations | None:
        """The image's share of a shared artifact's equations; None where it cannot be used."""
        path, sha256, _ = image
        try:
            return equations(self.backbone, load_image(path, sha256), self.config)
        except (ImageError, NonFiniteError) as error:  # reported when its own turn comes
            log.debug("left out of the shared artifact: %s", error)
            return None

    def solve(self, equations: SharedEquations) -> Tensor:
        """The artifact (h, w, C) that many images share, from the sum of their equations."""
        return LinearSolver(self.config.linear).solve_shared(*equations)
