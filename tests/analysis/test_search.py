"""Searching a store: planted images and regions, exactness, bad input."""

import sys

import pytest
import torch

from dvt.analysis.search import search
from dvt.analysis.search_index import SearchIndex
from dvt.errors import ConfigError, NonFiniteError, ShapeError, StoreError
from dvt.store import FeatureStore, Job, Record, StoreWriter


@pytest.fixture(scope="module")
def maps():
    """Twelve images, of which the seventh holds the object (2 x 3 patches) and is the third turned brighter."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(6, 8, 16, generator=generator) for _ in range(12)]
    found[7] = found[3] + 0.05 * torch.randn(6, 8, 16, generator=generator)
    found[7][1:3, 4:7] = 3 * torch.randn(16, generator=generator)
    return found


@pytest.fixture(scope="module")
def store(maps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "store"
    with StoreWriter(folder, Job("vit", "ab")) as writer:
        writer.write("a", [Record(f"{i:02}.jpg", f"{i:064x}", (96, 128), {"raw": m + 5}) for i, m in enumerate(maps)])
    return FeatureStore(folder)


def test_whole_images_are_in_the_order_of_a_naive_search(store, maps):
    means = torch.stack([each.mean((0, 1)) for each in maps])
    centred = means - means.mean(0)
    expected = torch.cosine_similarity(centred, centred[3][None]).argsort(descending=True)
    found = search(store, maps[3] + 5, count=12)
    assert [each.path for each in found] == [f"{int(i):02}.jpg" for i in expected]
    assert found[0].path == "03.jpg" and found[0].cosine == pytest.approx(1, abs=1e-3)
    assert [each.path for each in search(store, maps[3] + 5, count=2)] == [each.path for each in found[:2]]


def test_a_region_is_found_in_the_other_image_where_it_lies(store, maps):
    query = maps[0].clone()
    query[3:5, 1:4] = maps[7][1:3, 4:7]
    found = search(store, query + 5, box=(1 / 8, 3 / 6, 4 / 8, 5 / 6), count=3)
    assert found[0].path == "07.jpg" and found[0].cosine > 0.95 > found[1].cosine + 0.1
    assert found[0].box == pytest.approx((4 / 8, 1 / 6, 7 / 8, 3 / 6))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(6, 8, 15)}, ShapeError, "16"),
        ({"query": torch.full((6, 8, 16), torch.nan)}, NonFiniteError, "NaN"),
        ({"box": (0.5, 0, 0.5, 1)}, ConfigError, "box"),
        ({"box": (0, 0, 1.5, 1)}, ConfigError, "box"),
        ({"count": 0}, ConfigError, "count"),
    ],
)
def test_bad_input_is_refused(store, change, error, words):
    with pytest.raises(error, match=words):
        search(**({"store": store, "query": torch.zeros(6, 8, 16)} | change))


# -- an index


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Three hundred images in twenty kinds, and the maps."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(20, 1, 1, 16, generator=generator)
    maps = [kinds[i % 20] + torch.randn(8, 8, 16, generator=generator) for i in range(300)]
    folder = tmp_path_factory.mktemp("many") / "store"
    with StoreWriter(folder, Job("vit", "ab")) as writer:
        for start in range(0, 300, 100):
            records = [
                Record(f"{i:03}.jpg", f"{i:064x}", (96, 96), {"raw": maps[i]}) for i in range(start, start + 100)
            ]
            writer.write(f"s{start}", records)
    return FeatureStore(folder), maps


def test_an_index_chooses_what_the_exact_search_finds(many, tmp_path):
    pytest.importorskip("faiss")
    store, maps = many
    index = SearchIndex.opened(tmp_path / "index", store)
    same = regions = 0
    for i in range(0, 300, 30):
        exact, near = (search(store, maps[i], count=5, index=each) for each in (None, index))
        assert near[0] == exact[0] and near[0].path == f"{i:03}.jpg"
        same += len(set(exact) & set(near))
        box = (0.25, 0.0, 0.5, 0.25)  # one of the cells that the index holds
        regions += search(store, maps[i], box, 1, index=index) == search(store, maps[i], box, 1)
    assert same >= 45 and regions >= 9  # of 50, and of 10
    read = []
    search(store, maps[0], count=2, index=index, progress=lambda what, done, total: read.append(total))
    assert set(read) == {16}


def test_an_index_is_kept_and_made_anew_for_other_images(many, store, tmp_path):
    pytest.importorskip("faiss")
    looked = []

    def progress(what, done, total):
        looked.append(what)

    made = SearchIndex.opened(tmp_path / "index", many[0], progress)
    assert len(looked) == 300
    kept = SearchIndex.opened(tmp_path / "index", many[0], progress)
    assert len(looked) == 300 and torch.equal(kept.centre, made.centre)
    assert kept.candidates(many[1][7].mean((0, 1)), 3)[0] == 7
    assert len(SearchIndex.opened(tmp_path / "index", store).candidates(torch.ones(16), 50)) == 12
    (tmp_path / "index" / "raw.faiss").write_bytes(b"damage")
    with pytest.raises(StoreError, match=r"raw.faiss.*is damaged.*delete"):
        SearchIndex.opened(tmp_path / "index", store)


def test_without_faiss_the_message_says_what_to_install(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"denoising-vit\[search\]"):
        SearchIndex.opened(tmp_path, store)
