"""One way in for every job: of files with equal bytes, the first that can be read stands for all."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.fields.config import DenoiseConfig
from dvt.fields.images import DecomposeWork
from dvt.images import file_sha256, load_image
from dvt.jobs.extract import ExtractConfig, ExtractWork
from dvt.jobs.intake import distinct, read_copies
from dvt.jobs.run import run
from dvt.store import FeatureStore, ImageEntry, Job, plan

WORKS = {
    "extract": lambda backbone: ExtractWork(backbone, ExtractConfig(shard_images=4)),
    "denoise": lambda backbone: DecomposeWork(backbone, DenoiseConfig(views=6), shard_images=4),
}


@pytest.fixture
def copies(tmp_path):
    """Two files of equal bytes, and one of others."""
    rng = np.random.default_rng(0)
    names = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path in (names[0], names[2]):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(path)
    shutil.copy(names[0], names[1])
    return names


@pytest.mark.parametrize("kind", WORKS)
def test_a_copy_that_vanished_is_reported_and_the_other_one_stored(kind, tiny_backbone, copies, tmp_path):
    work = WORKS[kind](tiny_backbone)
    summary = run(work, copies, tmp_path / "out")
    assert summary.done == 3 and not summary.failed

    again = WORKS[kind](tiny_backbone)
    indexed = again.index_image

    def index_then_delete(path):
        entry = indexed(path)
        if path == copies[0]:
            copies[0].unlink()
        return entry

    again.index_image = index_then_delete
    summary = run(again, copies, tmp_path / "again")
    stored = FeatureStore(tmp_path / "again")
    assert [str(path) for path, _ in summary.failed] == [str(copies[0])]
    assert "No such file" in summary.failed[0][1]
    assert stored.images == [str(path) for path in copies[1:]] and summary.done == 2
    whole = FeatureStore(tmp_path / "out")
    np.testing.assert_array_equal(stored.read(0, "raw"), whole.read(1, "raw"))


def test_copies_share_the_pixels_of_the_first_that_can_be_read(copies):
    entries = [ImageEntry(str(path), file_sha256(path), (6, 6)) for path in copies]
    (shard,) = plan(entries, 4, Job("vit", "00"))
    groups = distinct(shard)
    assert [len(group) for group in groups] == [2, 1]
    copies[0].write_bytes(b"no image any more")
    intake = read_copies(groups[0])
    assert intake.used == 1 and list(intake.errors) == [0]
    torch.testing.assert_close(intake.pixels, load_image(copies[1]))
    outcomes = [error for _, error in intake.outcomes(None)]
    assert outcomes[0] is not None and outcomes[1] is None
