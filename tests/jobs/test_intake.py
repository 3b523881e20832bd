"""One way in for every job: of files with equal bytes, the first that can be read stands for all."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dvt.fields.config import DenoiseConfig
from dvt.fields.images import DecomposeWork
from dvt.images import file_sha256, load_image
from dvt.jobs.extract import ExtractConfig, ExtractWork
from dvt.jobs.intake import distinct, read_copies
from dvt.jobs.run import run, shards_left
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


def test_copies_are_cut_like_other_images_and_a_killed_run_still_owes_them(tiny_backbone, copies, tmp_path, digests):
    """Seven copies in shards of two: memory is that of a shard. Of those left, none is called done for its bytes."""
    paths = [copies[2], *(shutil.copy(copies[0], tmp_path / f"d{i}.png") for i in range(7))]
    work = ExtractWork(tiny_backbone, ExtractConfig(shard_images=2))
    assert run(work, paths, tmp_path / "whole").shards == 4
    made = sorted((tmp_path / "whole").glob("*.h5"))
    assert {len(FeatureStore(path)) for path in made} == {2}
    expected = FeatureStore(tmp_path / "whole").images
    assert expected == sorted(map(str, paths))

    for lost in ([0], [0, 2], [1, 2, 3]):
        shutil.copytree(tmp_path / "whole", tmp_path / "out")
        for number in lost:
            (tmp_path / "out" / made[number].name).unlink()
        summary = run(work, paths, tmp_path / "out")
        assert (summary.done, summary.skipped) == (2 * len(lost), 8 - 2 * len(lost))
        assert digests(tmp_path / "out", "*.h5") == digests(tmp_path / "whole", "*.h5")
        shutil.rmtree(tmp_path / "out")

    more = [*paths, shutil.copy(copies[0], tmp_path / "z.png"), shutil.copy(copies[0], tmp_path / "a0.png")]
    summary = run(work, more, tmp_path / "whole")
    stored = FeatureStore(tmp_path / "whole").images
    assert len(set(stored)) == len(stored), "an image is in the store twice"
    assert set(expected) <= set(stored)


CONTENTS = st.lists(st.integers(0, 8), max_size=30)


@settings(deadline=None)
@given(CONTENTS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_what_a_killed_run_leaves_is_made_in_the_shards_it_would_have_had(contents, shard_images, rng):
    job = Job("vit", "00")
    hashes = [hashlib.sha256(bytes([content])).hexdigest() for content in contents]
    images = [ImageEntry(f"{i:02}.png", sha256, (1 + int(sha256[0], 16) % 2, 2)) for i, sha256 in enumerate(hashes)]
    whole = plan(images, shard_images, job, by_grid=True)
    made = rng.sample(whole, rng.randint(0, len(whole)))
    stored = {image[:2] for shard in made for image in shard.images}
    left = shards_left(images, stored, {shard.name for shard in made}, job, shard_images)
    assert made or left == whole
    missing = [shard for shard in whole if shard not in made]
    # Copies of stored bytes are owed where the plan says that they were not to be in the shards that are there.
    owed = {image for shard in missing for image in shard.images}
    assert sorted(image for shard in left for image in shard.images) == sorted(owed) and set(left) >= set(missing)
