"""Random conditions against integrals, counts and brute force; rewrite files good and bad."""

import importlib.util
import json
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binomtest, chisquare
from torch.nn import functional

from dvt.analysis.priors.codebook import Codebook
from dvt.analysis.priors.contrast import contrast
from dvt.analysis.priors.pseudo_text import PseudoText, pseudo_text
from dvt.analysis.priors.texts import draw_texts, read_texts
from dvt.analysis.priors.tower import OpenClipTower
from dvt.analysis.priors.trunk import drop
from dvt.errors import ConfigError, NonFiniteError, ShapeError

OPEN_CLIP = importlib.util.find_spec("open_clip") is not None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# --- LAFITE


def expected_cosine(dim, xi):
    """E (1 + xi u) / sqrt(1 + xi^2 + 2 xi u) over a coordinate u of random unit vectors: (1-u^2)^((d-3)/2)."""

    def density(u):
        return (1 - u * u) ** ((dim - 3) / 2)

    top = quad(lambda u: density(u) * (1 + xi * u) / math.sqrt(1 + xi * xi + 2 * xi * u), -1, 1, limit=200)[0]
    return top / quad(density, -1, 1, limit=200)[0]


def test_the_integral_gives_the_known_values():
    """Its expansion at d = 16: (1 - .765 / 16) / sqrt(10) = .301, and a little less by higher orders."""
    assert expected_cosine(16, 3.0) == pytest.approx(0.3005, abs=1e-4)
    assert expected_cosine(512, 3.0) == pytest.approx(1 / math.sqrt(10), abs=1e-3)


@pytest.mark.parametrize(("dim", "xi"), [(4, 1.0), (16, 3.0), (512, 3.0), (512, 0.5)])
def test_fixed_pseudo_text_has_the_expected_cosine(dim, xi):
    features = 5 * noise(8000, dim)
    cosines = torch.cosine_similarity(pseudo_text(features, generator(1), xi), features)
    error = float(cosines.std()) / math.sqrt(len(cosines))
    assert float(cosines.mean()) == pytest.approx(expected_cosine(dim, xi), abs=4 * error)


def test_pseudo_text_is_of_unit_length_and_ignores_the_features_scale():
    features = noise(2, 5, 7)
    found = pseudo_text(features, generator(1))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(pseudo_text(30 * features, generator(1)), found)
    torch.testing.assert_close(pseudo_text(features, generator(1), xi=0), functional.normalize(features, dim=-1))
    assert not torch.allclose(pseudo_text(features, generator(2)), found)


def test_trained_pseudo_text_starts_as_the_fixed_kind():
    features = noise(4000, 512)
    cosines = torch.cosine_similarity(PseudoText(512)(features, generator(1)), features)
    assert float(cosines.detach().mean()) == pytest.approx(1 / math.sqrt(10), abs=0.005)


def test_trained_pseudo_text_learns_how_texts_differ_from_images():
    """Texts are images turned by 90 degrees in every plane, where the untrained kind finds nothing; held-out pairs."""
    images = functional.normalize(noise(600, 16), dim=-1)
    texts = torch.stack((-images[:, 1::2], images[:, ::2]), dim=-1).flatten(1)
    model = PseudoText(16)
    optimizer, draws = torch.optim.Adam(model.parameters(), lr=1e-2), generator(2)

    def aligned():
        return float(torch.cosine_similarity(model(images[500:], generator(5)), texts[500:]).mean())

    assert abs(aligned()) < 0.1
    for _ in range(150):
        rows = torch.randint(500, (64,), generator=draws)
        loss = contrast(model(images[rows], draws), texts[rows], temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert aligned() > 0.5
    assert float(model.log_scale.bias.mean()) < math.log(3 / 4) - 0.2  # noise only harms here, so it shrinks


# --- texts and rewrites

LINES = (
    {"image": "a.jpg", "text": "a cat", "rewrites": ["a kitten", "a small cat"]},
    {"image": "b.jpg", "text": "ein Hund äöü"},
    {"image": "c.jpg", "text": "a tree", "rewrites": []},
)


def write(folder, *lines):
    path = folder / "texts.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines), encoding="utf-8")
    return path


def test_texts_come_in_the_order_of_the_images(tmp_path):
    path = write(tmp_path, *LINES[:2], "", LINES[2])
    found = read_texts(path, ["c.jpg", "a.jpg", "b.jpg", "a.jpg"])
    cat = ("a cat", "a kitten", "a small cat")
    assert found == [("a tree",), cat, ("ein Hund äöü",), cat]


@pytest.mark.parametrize(
    ("lines", "images", "message"),
    [
        (LINES, "ab", r"does not fit the 2 images: 1 line without an image \(c.jpg\); .* relative to the file"),
        (LINES, "abcd", r"does not fit the 4 images: 1 image without a line \(d.jpg\)"),
        (LINES, "vwxyz", r"5 images without a line \(v.jpg, w.jpg, x.jpg, ...\) and 3 lines without"),
        ((*LINES, LINES[0]), "abc", "line 4: image 'a.jpg' has a line already"),
        ((*LINES[:1], "{broken"), "a", "line 2: it is not JSON"),
        (('["a.jpg", "a cat"]',), "a", "line 1: a line is"),
        (({"image": "a.jpg"},), "a", "line 1: a line is"),
        (({"image": "a.jpg", "text": "x", "rewrite": ["y"]},), "a", "line 1: a line is"),
        (({"image": "a.jpg", "text": ""},), "a", "not empty"),
        (({"image": "a.jpg", "text": 3},), "a", "not empty"),
        (({"image": "a.jpg", "text": "x", "rewrites": "y"},), "a", "not empty"),
        (({"image": "a.jpg", "text": "x", "rewrites": ["y", None]},), "a", "not empty"),
    ],
)
def test_a_bad_file_of_texts_is_refused(tmp_path, lines, images, message):
    with pytest.raises(ConfigError, match=message):
        read_texts(write(tmp_path, *lines), [f"{name}.jpg" for name in images])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        read_texts(tmp_path / "none.jsonl", [])
    (tmp_path / "latin.jsonl").write_bytes("{'image': 'ä'}".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        read_texts(tmp_path / "latin.jsonl", [])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_texts_are_drawn_uniformly(count):
    texts = [tuple(str(number) for number in range(count))] * 6000
    drawn = draw_texts(texts, generator(count))
    assert chisquare([drawn.count(str(number)) for number in range(count)]).pvalue > 1e-3


def test_rewrites_of_one_image_move_no_other_draw():
    texts = [("a", "b", "c")] * 20
    more = [*texts[:10], ("a", "b", "c", "d", "e"), *texts[11:]]
    first, second = draw_texts(texts, generator(4)), draw_texts(more, generator(4))
    assert first[:10] == second[:10] and first[11:] == second[11:] and len(set(first)) == 3


def test_without_rewrites_the_loss_is_bit_for_bit_plain_clip():
    """A step of training with drawn texts against one with the originals; with rewrites it differs."""
    originals = ["a cat", "a dog", "a tree", "a house"]
    words = sorted({word for text in [*originals, "one cat"] for word in text.split()})

    def tower(texts):
        return torch.stack([sum(noise(8, seed=words.index(word)) for word in text.split()) for text in texts])

    images = noise(4, 8, seed=50)
    plain = contrast(images, tower(originals), temperature=0.07, symmetric=True)
    drawn = draw_texts([(text,) for text in originals], generator())
    assert torch.equal(contrast(images, tower(drawn), temperature=0.07, symmetric=True), plain)
    rewritten = next(
        drawn for seed in range(20) if (drawn := draw_texts([("a cat", "one cat")], generator(seed))) == ["one cat"]
    )
    moved = contrast(images, tower(rewritten + originals[1:]), temperature=0.07, symmetric=True)
    assert not torch.equal(moved, plain)


@pytest.mark.skipif(not OPEN_CLIP, reason="open_clip is not installed")
def test_the_text_tower_encodes_texts():
    tower = OpenClipTower("ViT-B-32")
    found, seen = tower.texts(["a cat", "a dog", "a cat"]), tower.pictures(torch.rand(2, 3, 40, 40))
    assert found.shape == (3, 512) and seen.shape == (2, 512) and found.dtype == torch.float32
    torch.testing.assert_close(torch.cat((found, seen)).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not any(each.requires_grad for each in tower.parameters())
    with pytest.raises(ConfigError, match="no model 'ViT-Z-99'"):
        OpenClipTower("ViT-Z-99")


@pytest.mark.skipif(OPEN_CLIP, reason="open_clip is installed")
def test_a_missing_open_clip_is_explained():
    with pytest.raises(ConfigError, match="pip install"):
        OpenClipTower("ViT-B-32")


# --- drops


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_conditions_are_dropped_whole(share):
    given = noise(4000, 3, 2)
    null = torch.nn.Parameter(torch.full((3, 2), 7.0))
    found = drop(given, null, share, generator(1))
    dropped = (found == 7).flatten(1).all(1)
    assert torch.equal(found[~dropped], given[~dropped])
    assert binomtest(int(dropped.sum()), 4000, share).pvalue > 1e-3
    found.sum().backward()
    torch.testing.assert_close(null.grad, torch.full((3, 2), float(dropped.sum())))


def test_dropping_none_or_all():
    given = noise(5, 3)
    assert torch.equal(drop(given, torch.zeros(3), 0.0, generator()), given)
    assert not drop(given, torch.zeros(3), 1.0, generator()).any()
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        drop(given, torch.zeros(3), 1.1, generator())


# --- discrete tokens


def test_the_codebook_finds_planted_clusters():
    centres = 10 * noise(5, 6)
    ids = torch.randint(5, (4, 8, 9), generator=generator(1))
    features = centres[ids] + 0.1 * noise(4, 8, 9, 6, seed=2)
    book = Codebook.fit(features, 5)
    distance, match = torch.cdist(centres, book.centres).min(1)
    assert sorted(match.tolist()) == list(range(5)) and float(distance.max()) < 0.1
    assert torch.equal(book.encode(features), match[ids])
    assert book.decode(book.encode(features)).shape == features.shape


def test_encoding_is_the_nearest_centre_by_brute_force():
    features, book = noise(3, 50, 4), Codebook(noise(9, 4, seed=1))
    brute = ((features[..., None, :] - book.centres) ** 2).sum(-1).argmin(-1)
    assert torch.equal(book.encode(features), brute)
    assert torch.equal(book.encode(book.centres), torch.arange(9))


def test_the_codebook_is_repeatable_and_refuses_what_it_cannot_cluster():
    features = noise(40, 3)
    assert torch.equal(Codebook.fit(features, 4, seed=3).centres, Codebook.fit(features, 4, seed=3).centres)
    with pytest.raises(ConfigError, match=r"1 \.\.\. 40"):
        Codebook.fit(features, 41)
    with pytest.raises(NonFiniteError):
        Codebook.fit(features / 0, 4)
    with pytest.raises(ShapeError, match="3 channels"):
        Codebook(noise(2, 4)).encode(features)


@pytest.mark.parametrize("call", [lambda: pseudo_text(noise(1, 2), generator(), -1.0), lambda: PseudoText(4, 0.0)])
def test_a_disturbance_out_of_range_is_refused(call):
    with pytest.raises(ConfigError, match="xi must be"):
        call()
