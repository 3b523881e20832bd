"""Stage one end to end on a tiny backbone: laws, the store, bad images and resume."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.errors import ConfigError, ImageError, NonFiniteError, StoreError
from dvt.fields import LinearConfig, LinearSolver, NeuralConfig
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import TokenViews, denoise, denoise_image, make_solver
from dvt.fields.images import denoise_images
from dvt.fields.planted import PlantedBackbone, PlantedBackboneConfig, relative_error
from dvt.fields.shared import shared_artifact
from dvt.grids import grid_centres
from dvt.images import load_image
from dvt.store import FeatureStore
from dvt.views import ViewConfig

CONFIG = DenoiseConfig(views=ViewConfig(count=7, batch=4), linear=LinearConfig(resolution=12, smoothness=0.05))
SHARED = replace(CONFIG, shared_artifact=True)


@pytest.fixture(scope="module")
def pixels(photo):
    return (photo * 255).byte().permute(1, 2, 0).numpy()


@pytest.fixture
def folder(tmp_path, pixels):
    """Five photographs: three of 160 x 160, two of 160 x 240."""
    (tmp_path / "in").mkdir()
    for number in range(5):
        top, wide = 40 * number, 160 if number < 3 else 240
        Image.fromarray(pixels[top : top + 160, 100 : 100 + wide]).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def images_of(folder):
    return sorted(folder.iterdir())


def contents(out):
    """Every stored number, by path and term."""
    store = FeatureStore(out)
    found = {}
    for i, path in enumerate(store.images):
        record = store.record(i)
        artifact = store.artifact(i)
        arrays = {**record.terms, "prefix": record.prefix, **({} if artifact is None else {"shared": artifact})}
        found.update({(path, name): array.tobytes() for name, array in arrays.items()})
    return found


@pytest.fixture
def count_views(make_tiny_backbone):
    """A backbone, and a list that holds the number of images in every forward pass."""
    backbone, seen = make_tiny_backbone(), []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return backbone, seen


# -- one image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "grid"), [((512, 512), (6, 6)), ((340, 512), (6, 9)), ((512, 200), (15, 6))])
def test_denoise_splits_the_backbones_own_tokens(tiny_backbone, photo, crop, grid):
    image = photo[:, : crop[0], : crop[1]]
    parts = denoise(tiny_backbone, image, CONFIG)
    assert parts.raw.shape == (*grid, 64)
    whole = TokenViews(tiny_backbone, image, ViewConfig(count=0))
    (tokens, coords), *others = list(whole)
    assert not others
    torch.testing.assert_close(parts.raw, tokens[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coords[0], grid_centres(grid))
    total = parts.semantic + parts.artifact + parts.residual + parts.error
    torch.testing.assert_close(total, parts.raw, atol=1e-5, rtol=1e-5)
    assert parts.artifact.mean((0, 1)).abs().max() < 1e-5 and parts.artifact.abs().max() > 0.01
    assert all(term.isfinite().all() for term in parts.terms().values())


def test_denoise_with_default_settings(tiny_backbone, photo):
    parts = denoise(tiny_backbone, photo)
    assert parts.raw.shape == (6, 6, 64) and parts.semantic.isfinite().all()


def test_denoise_takes_an_array_and_a_pil_image(tiny_backbone, photo):
    array = (photo * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    wanted = denoise(tiny_backbone, torch.from_numpy(array).permute(2, 0, 1).float() / 255, CONFIG).semantic
    for image in (array, Image.fromarray(array)):
        torch.testing.assert_close(denoise(tiny_backbone, image, CONFIG).semantic, wanted)
    with pytest.raises(ImageError, match="divide"):
        denoise(tiny_backbone, photo * 255, CONFIG)


def test_denoise_is_the_solver_on_the_views(tiny_backbone, photo):
    views = TokenViews(tiny_backbone, photo, CONFIG.views)
    batches = list(views)
    assert [len(tokens) for tokens, _ in batches] == [4, 4] and views.whole.grid == (6, 6)
    fit = LinearSolver(CONFIG.linear).fit(batches)
    expected = fit.decompose(batches[0][0][0], views.coords)
    got = denoise(tiny_backbone, photo, CONFIG)
    for name, term in got.terms().items():
        torch.testing.assert_close(term, expected.terms()[name], atol=1e-6, rtol=1e-6)


def test_views_can_be_read_again_and_keep_no_batch(tiny_backbone, photo):
    views = TokenViews(tiny_backbone, photo, CONFIG.views)
    with pytest.raises(RuntimeError, match="read the first batch"):
        _ = views.whole
    first = list(views)
    seconds, again = views.seconds, list(views)
    assert 0 < seconds < views.seconds and len(first) == len(again) == 2
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(views.whole.patches[0], first[0][0][0])
    assert views.whole.patches.untyped_storage().nbytes() == 6 * 6 * 64 * 4


def test_what_depends_on_position_alone_goes_to_the_artifact(make_tiny_backbone, photo):
    """A pattern added to the tokens by position ends in the artifact, up to its mean, and not in the field."""
    backbone = make_tiny_backbone()
    plain = denoise(backbone, photo, CONFIG)
    pattern = torch.randn(6, 6, 64, generator=torch.Generator().manual_seed(5))
    tokens_of = backbone._tokens
    backbone._tokens = lambda model, images: (t := tokens_of(model, images)).with_patches(t.patches + pattern)
    patterned = denoise(backbone, photo, CONFIG)
    got = patterned.artifact - plain.artifact
    expected = pattern - pattern.mean((0, 1))
    assert (got - expected).norm() / expected.norm() < 0.2
    moved = patterned.field - plain.field - pattern.mean((0, 1))
    assert moved.norm() / expected.norm() < 0.2


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_backbone, photo):
    torch.manual_seed(1)
    first = denoise(tiny_backbone, photo, CONFIG)
    torch.manual_seed(2)
    second = denoise(tiny_backbone, photo, CONFIG)
    other = denoise(tiny_backbone, photo, replace(CONFIG, views=replace(CONFIG.views, seed=1)))
    for name, term in first.terms().items():
        assert torch.equal(term, second.terms()[name])
    assert not torch.equal(first.artifact, other.artifact) and torch.equal(first.raw, other.raw)


def test_the_batch_of_views_does_not_matter(tiny_backbone, photo):
    """It is no part of the job, so it must not change the numbers beyond rounding."""
    config = replace(CONFIG, views=ViewConfig(count=20, batch=21), linear=replace(CONFIG.linear, pilot_views=8))
    one = denoise(tiny_backbone, photo, config)
    other = denoise(tiny_backbone, photo, replace(config, views=replace(config.views, batch=5)))
    assert config.job_settings() == replace(config, views=replace(config.views, batch=5)).job_settings()
    for name, term in one.terms().items():
        torch.testing.assert_close(term, other.terms()[name], atol=2e-3, rtol=1e-3)


def test_a_path_is_as_good_as_pixels(tiny_backbone, folder):
    path = images_of(folder)[3]
    by_path, by_pixels = denoise(tiny_backbone, path, CONFIG), denoise(tiny_backbone, load_image(path), CONFIG)
    assert torch.equal(by_path.semantic, by_pixels.semantic)
    assert torch.equal(denoise(tiny_backbone, str(path), CONFIG).semantic, by_path.semantic)


def test_a_known_artifact_is_subtracted_as_it_is(tiny_backbone, photo):
    known = torch.randn(6, 6, 64, generator=torch.Generator().manual_seed(0))
    known -= known.mean((0, 1))
    assert torch.equal(denoise(tiny_backbone, photo, CONFIG, known).artifact, known)


def test_a_known_artifact_is_centred_so_that_its_mean_stays_in_the_field(tiny_backbone, photo):
    known = torch.randn(6, 6, 64, generator=torch.Generator().manual_seed(0))
    known -= known.mean((0, 1))
    centred, moved = (denoise(tiny_backbone, photo, CONFIG, each) for each in (known, known + 3))
    torch.testing.assert_close(moved.artifact, centred.artifact, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.semantic, centred.semantic, atol=1e-4, rtol=0)


def test_the_neural_solver_takes_the_same_way(tiny_backbone, photo):
    neural = NeuralConfig(levels=2, finest=16, channels=2, steps=20, tokens_per_step=64)
    parts = denoise(tiny_backbone, photo, replace(CONFIG, solver="neural", neural=neural))
    total = parts.semantic + parts.artifact + parts.residual + parts.error
    torch.testing.assert_close(total, parts.raw, atol=1e-5, rtol=1e-5)
    assert parts.artifact.mean((0, 1)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "bad", [{"solver": "magic"}, {"shared_images": 0}, {"solver": "neural", "shared_artifact": True}]
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError):
        DenoiseConfig(**bad)


def test_nan_in_the_weights_is_an_error(make_tiny_backbone, photo):
    backbone = make_tiny_backbone()
    next(backbone.model.blocks[0].parameters()).data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="check the weights"):
        denoise(backbone, photo, CONFIG)


# -- many images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_terms", [False, True])
def test_the_store_holds_what_denoise_returns(tiny_backbone, folder, tmp_path, keep_terms):
    summary = denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", CONFIG, keep_terms=keep_terms)
    assert (summary.done, summary.skipped, summary.failed, summary.shards) == (5, 0, [], 2)
    assert summary.extraction_seconds > 0 and summary.fitting_seconds > 0
    store = FeatureStore(tmp_path / "out")
    assert store.images == [str(path) for path in images_of(folder)]
    assert store.terms == (("raw", "semantic", "artifact", "residual") if keep_terms else ("raw", "semantic"))
    for i, path in enumerate(images_of(folder)):
        result = denoise_image(tiny_backbone, path, CONFIG)
        terms = result.decomposition.terms()
        for term in store.terms:
            np.testing.assert_array_equal(store.read(i, term), terms[term].numpy().astype(np.float16))
        np.testing.assert_array_equal(store.record(i).prefix, result.prefix.numpy().astype(np.float16))
        assert store.record(i).size == (160, 160 if i < 3 else 240)
        assert store.record(i).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_second_run_computes_nothing_and_a_new_image_alone(count_views, folder, tmp_path, pixels):
    backbone, seen = count_views
    first = denoise_images(backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    assert sum(seen) == 5 * 8 and first.shards == 3
    before = contents(tmp_path / "out")
    seen.clear()
    second = denoise_images(backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    assert (second.done, second.skipped, second.shards, seen) == (0, 5, 0, [])
    Image.fromarray(pixels[:160, :160]).save(folder / "00-new.png")
    third = denoise_images(backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    assert (third.done, third.skipped, sum(seen)) == (1, 5, 8)
    assert before.items() < contents(tmp_path / "out").items()


def test_a_lost_shard_is_made_again_with_the_same_bytes(tiny_backbone, folder, tmp_path):
    denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    before, shards = contents(tmp_path / "out"), sorted((tmp_path / "out").glob("*.h5"))
    shards[1].unlink()
    again = denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    assert again.shards == 1 and sorted((tmp_path / "out").glob("*.h5")) == shards
    assert contents(tmp_path / "out") == before


def test_bad_images_are_reported_and_the_rest_is_stored(tiny_backbone, folder, tmp_path):
    (folder / "1b.png").write_bytes(b"this is no image")
    (folder / "2b.png").write_bytes((folder / "2.png").read_bytes()[:3000])  # the header can be read, the pixels not
    (folder / "2c.png").write_bytes((folder / "2.png").read_bytes()[:3000])
    summary = denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    assert summary.done == 5
    assert sorted(path for path, _ in summary.failed) == [str(folder / name) for name in ("1b.png", "2b.png", "2c.png")]
    assert all(reason for _, reason in summary.failed)
    assert [path[-5:] for path in FeatureStore(tmp_path / "out").images] == [f"{n}.png" for n in range(5)]
    for path, term in contents(tmp_path / "out"):
        assert term in ("raw", "semantic", "prefix") and path[-5:-4].isdigit()


@pytest.mark.parametrize("damage", [b"this is no image", None])
def test_strict_stops_at_the_first_bad_image(tiny_backbone, folder, tmp_path, damage):
    (folder / "1b.png").write_bytes(damage or (folder / "2.png").read_bytes()[:3000])
    with pytest.raises(ImageError, match=r"1b\.png"):
        denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", CONFIG, strict=True)


def test_nan_in_the_weights_is_reported_for_every_image_and_nothing_is_stored(make_tiny_backbone, folder, tmp_path):
    backbone = make_tiny_backbone()
    next(backbone.model.blocks[0].parameters()).data[0] = float("nan")
    summary = denoise_images(backbone, images_of(folder), tmp_path / "out", CONFIG)
    assert summary.done == 0 and len(summary.failed) == 5 and "NaN" in summary.failed[0][1]
    assert not list((tmp_path / "out").glob("*.h5"))
    with pytest.raises(NonFiniteError):
        denoise_images(backbone, images_of(folder), tmp_path / "out", CONFIG, strict=True)


def test_equal_bytes_are_computed_once_and_listed_under_each_path(count_views, folder, tmp_path):
    backbone, seen = count_views
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    summary = denoise_images(backbone, images_of(folder), tmp_path / "out", CONFIG, shard_images=2)
    assert summary.done == 6 and sum(seen) == 5 * 8
    store = FeatureStore(tmp_path / "out")
    assert len(store) == 6 and str(folder / "copy.png") in store.images
    copy = store.images.index(str(folder / "copy.png"))
    np.testing.assert_array_equal(store.read(0, "semantic"), store.read(copy, "semantic"))


@pytest.mark.parametrize(
    "other",
    [
        replace(CONFIG, views=replace(CONFIG.views, seed=1)),
        replace(CONFIG, linear=replace(CONFIG.linear, smoothness=0.1)),
        SHARED,
    ],
)
def test_another_job_is_refused_in_the_same_folder(tiny_backbone, folder, tmp_path, other):
    paths = images_of(folder)[:1]
    denoise_images(tiny_backbone, paths, tmp_path / "out", CONFIG)
    before = contents(tmp_path / "out")
    with pytest.raises(StoreError, match="another job"):
        denoise_images(tiny_backbone, paths, tmp_path / "out", other)
    assert contents(tmp_path / "out") == before


def test_callbacks_see_every_image_once(tiny_backbone, folder, tmp_path):
    calls, seen = [], []
    denoise_images(
        tiny_backbone,
        images_of(folder),
        tmp_path / "out",
        CONFIG,
        progress=lambda *call: calls.append(call),
        on_image=lambda path, pixels, result: seen.append(
            (path, tuple(pixels.shape), result.decomposition.raw.shape[:2])
        ),
    )
    assert calls == [("look", n, 5) for n in range(1, 6)] + [("denoise", n, 5) for n in range(1, 6)]
    assert [path for path, *_ in seen] == images_of(folder)
    assert seen[4][1:] == ((3, 160, 240), (6, 9))


# -- a shared artifact ------------------------------------------------------------------------------------------------


def test_a_shared_artifact_is_fitted_for_each_grid_stored_and_subtracted(tiny_backbone, folder, tmp_path):
    denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", SHARED, keep_terms=True)
    store = FeatureStore(tmp_path / "out")
    for group in ([0, 1, 2], [3, 4]):
        expected = shared_artifact(tiny_backbone, [images_of(folder)[i] for i in group], SHARED)
        expected = expected.half().float()
        for i in group:
            np.testing.assert_array_equal(store.artifact(i), expected.numpy())
            np.testing.assert_array_equal(store.read(i, "artifact"), expected.numpy())
            result = denoise(tiny_backbone, images_of(folder)[i], SHARED, expected)
            np.testing.assert_array_equal(store.read(i, "semantic"), result.semantic.numpy().astype(np.float16))


def test_a_shared_artifact_survives_the_loss_of_a_shard(tiny_backbone, folder, tmp_path):
    out = tmp_path / "out"
    denoise_images(tiny_backbone, images_of(folder), out, SHARED, shard_images=1)
    before, shards = contents(out), sorted(out.glob("*.h5"))
    assert len(shards) == 5 and any(name == "shared" for _, name in before)
    for lost in ([0], [1, 3], list(range(5))):
        for number in lost:
            shards[number].unlink()
        denoise_images(tiny_backbone, images_of(folder), out, SHARED, shard_images=1)
        assert contents(out) == before


def test_images_that_cannot_be_read_leave_a_shared_artifact_to_the_others(tiny_backbone, folder, tmp_path, pixels):
    """One unreadable image alone has a grid shape of its own."""
    Image.fromarray(pixels[:160, :400]).save(folder / "wide.png")
    (folder / "wide.png").write_bytes((folder / "wide.png").read_bytes()[:5000])
    (folder / "0b.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    summary = denoise_images(tiny_backbone, images_of(folder), tmp_path / "out", SHARED)
    assert summary.done == 5 and sorted(path[-8:] for path, _ in summary.failed) == ["n/0b.png", "wide.png"]
    store = FeatureStore(tmp_path / "out")
    expected = shared_artifact(tiny_backbone, [folder / f"{n}.png" for n in range(3)], SHARED).half().float()
    np.testing.assert_array_equal(store.artifact(0), expected.numpy())


def test_a_shared_artifact_needs_images_of_one_grid(tiny_backbone, folder):
    with pytest.raises(ConfigError, match="one grid shape"):
        shared_artifact(tiny_backbone, images_of(folder), SHARED)
    with pytest.raises(ImageError, match="at least one"):
        shared_artifact(tiny_backbone, [], SHARED)


# Products --------------------------------------------------------------------------------------------------------


def test_a_product_takes_views_of_its_kind():
    with pytest.raises(ConfigError, match=r"'removed' is made of shifts, and the views are crops"):
        DenoiseConfig(product="removed", views=ViewConfig())
    with pytest.raises(ConfigError, match=r"'ensembled' is made of crops, and the views are shifts"):
        DenoiseConfig(product="ensembled", views=ViewConfig(kind="shifts"))
    with pytest.raises(ConfigError, match="only the linear solver makes"):
        DenoiseConfig(product="removed", solver="neural")
    with pytest.raises(ConfigError, match="must be one of removed, ensembled, blend"):
        DenoiseConfig(product="clean")
    with pytest.raises(ConfigError, match="views is -1; it must be 0 or more"):
        DenoiseConfig(views=-1)
    assert DenoiseConfig().product == "removed" and DenoiseConfig().views == ViewConfig(16, "shifts")
    assert DenoiseConfig(product="ensembled", views=7).views.count == 7
    assert DenoiseConfig(views=ViewConfig(7)).product == "blend"
    assert (
        DenoiseConfig(solver="neural").product == "ensembled" and DenoiseConfig(solver="neural").views == ViewConfig()
    )


def test_shifted_windows_are_refused_by_the_field_over_scales(tiny_backbone):
    views = TokenViews(tiny_backbone, torch.rand(3, 96, 128), ViewConfig(8, "shifts"))
    with pytest.raises(ConfigError, match="lies beyond the image"):
        make_solver(DenoiseConfig(product="ensembled")).fit(views)


def test_removed_keeps_an_image_without_artifact_to_the_bit_and_ensembled_is_the_field(photo):
    backbone = PlantedBackbone(photo, PlantedBackboneConfig(channels=16, size=128, artifact=0, noise=0.3))
    parts = denoise(backbone, photo, DenoiseConfig(product="removed"))
    assert torch.equal(parts.semantic, parts.raw) and parts.artifact.abs().max() == 0
    parts = denoise(backbone, photo, DenoiseConfig(product="ensembled", views=12))
    assert torch.equal(parts.semantic, parts.field)


def test_the_field_of_ensembled_has_two_nodes_a_patch_and_hides_no_detail_that_more_would_show(photo):
    """At that smoothness, twice as many nodes change the field by less than the views do."""
    backbone = PlantedBackbone(photo, PlantedBackboneConfig(channels=16, size=128, noise=0.1))
    config = DenoiseConfig(product="ensembled")
    fit = denoise_image(backbone, photo, config).fit
    assert fit.config.resolution == 16 and fit.config.smoothness == 1
    finer, other = (
        denoise_image(backbone, photo, replace(config, **change)).fit
        for change in ({"linear": LinearConfig(resolution=32)}, {"views": replace(config.views, seed=1)})
    )
    coords = TokenViews(backbone, photo, config.views).coords
    field, finer, other = (each.semantic(coords) for each in (fit, finer, other))
    assert relative_error(finer, field) < relative_error(other, field)


def test_twice_the_views_leave_the_field_of_ensembled_as_smooth_as_it_was(photo):
    """The same views given twice say nothing new, so the field stays; a fixed smoothness would weigh half as much."""
    backbone = PlantedBackbone(photo, PlantedBackboneConfig(channels=16, size=128, noise=0.1))
    plain, fields = LinearConfig(robust=False), {}
    views = [*TokenViews(backbone, photo, DenoiseConfig(product="ensembled").views)]
    for name, count, times in (("once", 48, 1), ("twice", 97, 2), ("fixed", 48, 2)):
        solver = make_solver(DenoiseConfig(product="ensembled", views=count, linear=plain))
        fields[name] = solver.fit(times * views).nodes
    change = relative_error(fields["twice"], fields["once"])
    assert change < 5e-3 and relative_error(fields["fixed"], fields["once"]) > 5 * change
    assert make_solver(DenoiseConfig(product="ensembled", views=12)).config.smoothness == 1
    given = DenoiseConfig(product="ensembled", views=96, linear=LinearConfig(smoothness=0.3))
    assert make_solver(given).config.smoothness == 0.3


def test_a_shared_artifact_of_shifts_is_the_planted_one(photo):
    backbone = PlantedBackbone(photo, PlantedBackboneConfig(channels=16, size=128, noise=0.1))
    config = DenoiseConfig(product="removed")
    found = shared_artifact(backbone, [photo, photo.flip(1), 1 - photo], config)
    assert relative_error(found, backbone.artifact((8, 8))) < 0.1
    given = denoise(backbone, photo, config, found)
    torch.testing.assert_close(given.artifact, found, atol=1e-5, rtol=0)
