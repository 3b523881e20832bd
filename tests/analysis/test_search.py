"""Searching a store: planted images and regions, exactness, bad input."""

import pytest
import torch

from dvt.analysis.search import search
from dvt.errors import ConfigError, NonFiniteError, ShapeError
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
