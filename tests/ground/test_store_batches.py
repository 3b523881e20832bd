"""A feature store in a training loop: batches, their origin and labels, and the checksums of chunks."""

import hashlib
import json
import logging
import os

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.utils.data import DataLoader, Subset

from dvt.errors import ConfigError, StoreError
from dvt.store import FeatureStore, Job, Record, StoreWriter, batches, collate_tokens
from dvt.store.chunks import Fletcher32
from dvt.store.tools import export_store

JOB = Job("vit_tiny", "ab" * 32)


def written(folder, grids, shard_images=4, channels=6, terms=("raw", "semantic"), prefix=2):
    """A store whose image i, photos/i.jpg, has random tokens of grids[i]; and the maps."""
    rng, maps = np.random.default_rng(0), []
    with StoreWriter(folder, JOB) as writer:
        for start in range(0, len(grids), shard_images):
            records = []
            for i in range(start, min(start + shard_images, len(grids))):
                values = {term: rng.standard_normal((*grids[i], channels)).astype(np.float16) for term in terms}
                tokens = rng.standard_normal((prefix, channels)).astype(np.float16) if prefix else None
                sha256 = hashlib.sha256(str(i).encode()).hexdigest()
                records.append(Record(f"photos/{i:03}.jpg", sha256, (40, 60), values, tokens))
                maps.append((values, tokens))
            writer.write(f"shard-{start:03}", records)
    return maps


@pytest.fixture
def even(tmp_path):
    return tmp_path, written(tmp_path, [(4, 5)] * 10)


@pytest.fixture
def ragged(tmp_path):
    return tmp_path, written(tmp_path, [(4, 5), (5, 4), (2, 3)] * 4)


def same(batch, maps, numbers, term="raw"):
    """Whether a batch holds these images' tokens, each in its corner."""
    assert batch.indices.tolist() == list(numbers) and batch.paths == tuple(f"photos/{i:03}.jpg" for i in numbers)
    for slot, i in enumerate(numbers):
        values, prefix = maps[i]
        h, w, _ = values[term].shape
        assert np.array_equal(batch.patches[slot, :h, :w], values[term].astype(np.float32))
        assert np.array_equal(batch.prefix[slot], prefix.astype(np.float32))
        if batch.mask is not None:
            assert batch.mask[slot, :h, :w].all() and batch.mask[slot].sum() == h * w
            assert not batch.patches[slot][~batch.mask[slot]].any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70_000), st.integers(0, 2**32 - 1), st.sampled_from(["random", "zeros", "ones", "one"]))
def test_checksums_are_those_of_hdf5(count, seed, kind):
    words = np.random.default_rng(seed).integers(0, 65536, count, dtype=np.uint16)
    words[:] = {"random": words, "zeros": 0, "ones": 65535, "one": np.arange(count) == seed % count}[kind]
    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("x", data=words, chunks=(count,), fletcher32=True)
        dataset.file.flush()
        _, content = dataset.id.read_direct_chunk((0,))
    sums = Fletcher32()
    for number, part in enumerate((words[::-1], words)):
        assert sums.takes(count)
        sums.add(part, ("x", number))
    assert sums.takes(count) and not sums.takes(count + 1)
    _, (mark, found) = sums.finished()
    assert (mark, found) == (("x", 1), int.from_bytes(content[-4:], "little"))
    assert sums.finished() == [] and sums.takes(count + 1)


def test_numbers_slices_lists_arrays_and_paths(even):
    folder, maps = even
    features = FeatureStore(folder)
    same(features[3], maps, [3])
    same(features[np.int64(-1)], maps, [9])
    same(features[torch.tensor(4)], maps, [4])
    same(features[2:7:2], maps, [2, 4, 6])
    same(features[[9, 0, 9]], maps, [9, 0, 9])
    same(features[np.array([5, 1])], maps, [5, 1])
    same(features[torch.arange(10) > 7], maps, [8, 9])
    for path in ("photos/006.jpg", "006.jpg"):
        same(features[path], maps, [6])
    batch = features[[9, 0]]
    same(batch[1], maps, [0])
    assert [item.paths for item in batch] == [("photos/009.jpg",), ("photos/000.jpg",)]
    assert batch.sha256s[0] == features.sha256s[9]


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (10, IndexError, "image 10 of a store of 10"),
        ([0, 10], IndexError, "image 10 of"),
        ([0.5], StoreError, "chosen by numbers, a slice or a path"),
        ([], StoreError, "by numbers|no image"),
        ("07.jpg", StoreError, "holds no image '07.jpg' among its 10; close names are 007.jpg"),
    ],
)
def test_images_that_are_not_there(even, index, error, words):
    with pytest.raises(error, match=words):
        FeatureStore(even[0])[index]


def test_a_name_of_several_images_is_refused(tmp_path):
    values = {"raw": np.zeros((1, 1, 2), np.float16)}
    with StoreWriter(tmp_path, JOB) as writer:
        writer.write("one", [Record(f"{name}/x.jpg", name * 64, (4, 4), values) for name in "ab"])
    features = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="stands for 2 images"):
        features["x.jpg"]
    assert features.index_of("b/x.jpg") == 1


def test_terms_prefix_and_type_are_chosen_when_opened(even):
    folder, maps = even
    features = FeatureStore(folder, ("semantic", "raw"), prefix=False, dtype=None)
    batch = features[[1, 7]]
    assert batch.patches.dtype == torch.float16 and batch.prefix.shape == (2, 0, 6)
    for term in ("semantic", "raw"):
        assert np.array_equal(batch.terms[term][1], maps[7][0][term])
    assert torch.equal(batch.patches, batch.terms["semantic"])
    assert batch.to(torch.float64).terms["raw"].dtype == torch.float64
    with pytest.raises(StoreError, match="holds the terms"):
        FeatureStore(folder, ("raw", "denoised"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader(even, workers):
    folder, maps = even
    got = list(DataLoader(FeatureStore(folder), batch_size=4, num_workers=workers))
    assert [len(batch) for batch in got] == [4, 4, 2]
    for batch, numbers in zip(got, ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]), strict=True):
        same(batch, maps, numbers)
        assert batch.mask is None
    subset = next(iter(DataLoader(Subset(FeatureStore(folder), [7, 2]), batch_size=2)))
    same(subset, maps, [7, 2])


def test_a_collate_function_of_ones_own_sees_items(ragged):
    folder, maps = ragged
    own = lambda items: [tuple(item.grid) for item in items]  # noqa: E731
    got = [grid for batch in DataLoader(FeatureStore(folder), batch_size=5, collate_fn=own) for grid in batch]
    assert got == [values["raw"].shape[:2] for values, _ in maps]


def test_maps_of_several_grids_are_filled_up_and_it_is_said(ragged, caplog):
    folder, maps = ragged
    batches._warn_of_padding.cache_clear()
    with caplog.at_level(logging.WARNING):
        first, *_ = DataLoader(FeatureStore(folder), batch_size=5)
    same(first, maps, range(5))
    assert first.grid == (5, 5) and first.mask.shape == (5, 5, 5)
    assert "filled up with zeros" in caplog.text and "ragged='pad'" in caplog.text
    assert torch.equal(collate_tokens([first[i] for i in range(5)]).mask, first.mask)


def test_the_loader_groups_by_grid_and_shuffles(ragged):
    folder, maps = ragged
    features = FeatureStore(folder)
    loader = features.loader(3, shuffle=True, seed=1)
    epochs = [list(loader) for _ in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(loader) == 6
        assert sorted(i for batch in epoch for i in batch.indices.tolist()) == list(range(12))
        for batch in epoch:
            same(batch, maps, batch.indices.tolist())
            assert batch.mask is None
    orders = [[i for batch in epoch for i in batch.indices.tolist()] for epoch in epochs]
    assert orders[0] != orders[1] and orders[0] != list(range(12))
    again = [i for batch in features.loader(3, shuffle=True, seed=1) for i in batch.indices.tolist()]
    assert again == orders[0]
    assert [len(batch) for batch in features.loader(3, drop_last=True)] == [3, 3, 3]
    padded = list(features.loader(12, ragged="pad"))
    same(padded[0], maps, range(12))
    for options, words in ({"batch_size": 0}, "at least 1"), ({"ragged": "crop"}, "'group' or 'pad'"):
        with pytest.raises(ConfigError, match=words):
            features.loader(**options)


def test_labels_are_joined_beside(even):
    folder, _ = even
    by_name = FeatureStore(folder, labels={f"{i:03}.jpg": i % 3 for i in range(10)})
    assert by_name[[5, 1]].labels.tolist() == [2, 1] and by_name[[5, 1]][1].labels.tolist() == [1]
    assert [batch.labels.tolist() for batch in by_name.loader(5)] == [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0]]
    words = FeatureStore(folder, labels=os.path.dirname)
    assert next(iter(DataLoader(words, batch_size=2))).labels == ["photos", "photos"]
    shapes = FeatureStore(folder, labels=lambda path: torch.zeros(int(path[-5]) + 1))
    assert [len(label) for label in shapes[:3].labels] == [1, 2, 3]
    with pytest.raises(StoreError, match=r"no label for 9 of 10 images of .*, such as 'photos/001\.jpg'"):
        FeatureStore(folder, labels={"000.jpg": 1})


def test_a_chunk_that_was_changed_is_refused_in_a_batch_too(even):
    folder, _ = even
    features = FeatureStore(folder)
    assert len(features[:]) == 10  # places of chunks and open files are known from here on
    path = folder / "shard-004.h5"
    with h5py.File(path) as file:
        place = file["tokens/raw"].id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 3] ^= 16
    path.write_bytes(content)
    assert len(features[[0, 4, 9]]) == 3  # image 5's chunk is the damaged one
    for index in (5, slice(None), [0, 5]):
        with pytest.raises(StoreError, match=r"shard-004\.h5.*damaged.*checksum.*delete it and run"):
            features[index]
        assert len(features[[0, 4, 9]]) == 3  # nothing is left over from the batch that was refused
    path.write_bytes(content[:place])
    with pytest.raises(StoreError, match=r"shard-004\.h5.*damaged"):
        features[5]


def test_export_to_safetensors(ragged, monkeypatch):
    folder, maps = ragged
    monkeypatch.setattr("dvt.store.tools._TENSOR_FILE_BYTES", 1000)  # several files
    assert export_store(folder, folder / "out", "safetensors") == 12
    index = json.loads((folder / "out" / "index.json").read_text())
    assert len({image["file"] for image in index["images"]}) > 1
    for image, (values, prefix) in zip(index["images"], maps, strict=True):
        tensors = load_file(folder / "out" / image["file"])
        for term, expected in values.items():
            assert np.array_equal(tensors[f"{term}/{image['tensor']}"], expected)
        assert np.array_equal(tensors[f"prefix/{image['tensor']}"], prefix)
