"""Offline extraction: what it stores, in which batches, what it survives; merging and exporting of stores."""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt.cli import main
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.errors import ConfigError, ImageError, NonFiniteError, StoreError
from dvt.images import load_image
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.store import FeatureStore, Job, Record, StoreWriter
from dvt.store.tools import export_store, merge_stores
from dvt.tokens import Tokens
from dvt.views import resize

SMALL = ExtractConfig(batch=2, shard_images=4, workers=2)


def make_denoiser(strength=1.0, seed=0):
    config = DenoiserConfig("block", 64, grid=(6, 6), strength=strength)
    denoiser = Denoiser(config, torch.Generator().manual_seed(seed)).eval()
    for parameter in denoiser.parameters():  # as drawn it hardly changes anything
        parameter.data *= 5
    return denoiser


def save_photos(folder, photo, number):
    """Photographs of three grid shapes, in turns."""
    folder.mkdir()
    pixels = (photo * 255).byte().permute(1, 2, 0).numpy()
    shapes = [(160, 160), (160, 240), (230, 150)]
    for i in range(number):
        height, width = shapes[i % 3]
        Image.fromarray(pixels[7 * i : 7 * i + height, 9 * i : 9 * i + width]).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def folder(tmp_path, photo):
    return save_photos(tmp_path / "in", photo, 9)


def images_of(folder):
    return sorted(folder.iterdir())


def contents(out):
    """Every stored number and its type, by path and term."""
    store, found = FeatureStore(out), {}
    for i, (path, sha256) in enumerate(zip(store.images, store.sha256s, strict=True)):
        record = store.record(i)
        for name, array in {**record.terms, "prefix": record.prefix}.items():
            found[path, sha256, name] = (array.dtype.name, array.tobytes())
    return found


def shards_of(out):
    return sorted(path.name for path in Path(out).glob("*.h5*"))


@torch.no_grad()
def one_by_one(backbone, path):
    pixels = load_image(path)
    return backbone(resize(pixels, backbone.input_size(pixels.shape[1:]))[None])


@pytest.fixture
def watched(make_tiny_backbone):
    """A backbone, and the shape of the images of every forward pass."""
    backbone, seen = make_tiny_backbone(), []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    return backbone, seen


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_the_store_holds_what_the_backbone_and_the_denoiser_give_image_by_image(tiny_backbone, folder, tmp_path):
    denoiser, paths = make_denoiser(), images_of(folder)
    summary = extract_images(tiny_backbone, paths, tmp_path / "out", SMALL, denoiser)
    assert (summary.done, summary.skipped, summary.failed, summary.shards) == (9, 0, [], 3)
    store = FeatureStore(tmp_path / "out", term="denoised")
    assert store.images == [str(path) for path in paths] and store.terms == ("raw", "denoised")
    assert sorted(set(store.grids)) == [(6, 6), (6, 9), (9, 6)]
    for i, path in enumerate(paths):
        record, tokens = store.record(i), one_by_one(tiny_backbone, path)
        with torch.no_grad():
            clean = denoiser(tokens.patches)
        assert (clean - tokens.patches).norm() > 0.05 * tokens.patches.norm()  # there is something to see
        for name, expected in {"raw": tokens.patches, "denoised": clean}.items():
            assert record.terms[name].dtype == np.float16
            np.testing.assert_allclose(record.terms[name], expected[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(record.prefix, tokens.prefix[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(store[i].patches[0].numpy(), record.terms["denoised"].astype(np.float32))
        with Image.open(path) as image:
            assert record.size == image.size[::-1]
        assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_denoiser_there_are_raw_tokens_alone(tiny_backbone, folder, tmp_path):
    extract_images(tiny_backbone, images_of(folder)[:2], tmp_path / "out", SMALL)
    assert FeatureStore(tmp_path / "out").terms == ("raw",)
    with pytest.raises(StoreError, match="denoised"):
        FeatureStore(tmp_path / "out", term="denoised")


def test_a_denoiser_of_strength_zero_changes_no_bit(tiny_backbone, folder, tmp_path):
    extract_images(tiny_backbone, images_of(folder), tmp_path / "out", SMALL, make_denoiser(strength=0.0))
    store = FeatureStore(tmp_path / "out")
    assert all(np.array_equal(store.read(i, "raw"), store.read(i, "denoised")) for i in range(len(store)))


def test_batches_have_one_size_never_cross_shards_and_are_as_full_as_can_be(watched, folder, tmp_path, photo):
    backbone, seen = watched
    paths = [*images_of(folder), *images_of(save_photos(tmp_path / "more", photo[:, 100:, 100:], 9))]
    extract_images(backbone, paths, tmp_path / "out", ExtractConfig(batch=3, shard_images=4))
    # 6 images of each size: shards of 4 and 2, and so batches of 3, 1 and 2
    expected = [(number, 3, *size) for size in [(96, 96), (96, 144), (144, 96)] for number in (3, 1, 2)]
    assert seen == expected
    assert [len(FeatureStore(file)) for file in (tmp_path / "out").glob("*.h5")].count(4) == 3


@pytest.mark.parametrize("workers", [1, 7])
def test_the_number_of_threads_changes_no_bit(tiny_backbone, folder, tmp_path, workers):
    extract_images(tiny_backbone, images_of(folder), tmp_path / "a", SMALL, make_denoiser())
    extract_images(tiny_backbone, images_of(folder), tmp_path / "b", replace(SMALL, workers=workers), make_denoiser())
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and shards_of(tmp_path / "a") == shards_of(
        tmp_path / "b"
    )


def test_torch_keeps_its_number_of_threads(tiny_backbone, folder, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        extract_images(tiny_backbone, images_of(folder)[:1], tmp_path / "out", SMALL)
        with ThreadPoolExecutor(1) as pool:
            assert (torch.get_num_threads(), pool.submit(torch.get_num_threads).result()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_the_batch_changes_no_more_than_rounding(tiny_backbone, folder, tmp_path):
    extract_images(tiny_backbone, images_of(folder), tmp_path / "a", SMALL)
    extract_images(tiny_backbone, images_of(folder), tmp_path / "b", ExtractConfig())
    one, other = FeatureStore(tmp_path / "a"), FeatureStore(tmp_path / "b")
    assert one.job == other.job
    for i in range(9):
        np.testing.assert_allclose(one.read(i), other.read(i), rtol=2e-3, atol=2e-3)


def test_autocast_rounds_as_its_type_does(tiny_backbone, folder, tmp_path):
    paths = images_of(folder)[:3]
    extract_images(tiny_backbone, paths, tmp_path / "bf16", replace(SMALL, dtype="bfloat16"))
    store = FeatureStore(tmp_path / "bf16")
    for i, path in enumerate(paths):
        expected = one_by_one(tiny_backbone, path).patches[0].numpy()
        error = np.linalg.norm(store.read(i) - expected) / np.linalg.norm(expected)
        assert 1e-3 < error < 5e-2


def test_equal_bytes_are_computed_once_and_listed_under_each_path(watched, folder, tmp_path):
    backbone, seen = watched
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    summary = extract_images(backbone, images_of(folder), tmp_path / "out", SMALL)
    assert summary.done == 10 and sum(shape[0] for shape in seen) == 9
    store = FeatureStore(tmp_path / "out")
    copy = store.images.index(str(folder / "copy.png"))
    np.testing.assert_array_equal(store.read(0), store.read(copy))


def brightness_backbone():
    """One channel of mean brightness times a million, one of 1 / brightness times brightness: NaN where it is black."""

    def tokens(module, images):
        bright = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16)
        return Tokens.of(torch.cat((1e6 * bright, bright / bright), dim=1).permute(0, 2, 3, 1))

    return dvt.wrap(
        torch.nn.Identity(), tokens, 16, name="brightness", image_size=32, feature_dim=2, mean=(0, 0, 0), std=(1, 1, 1)
    )


def grey(path, value):
    Image.new("RGB", (32, 32), (value,) * 3).save(path)
    return path


def test_tokens_beyond_half_precision_are_stored_in_full(tmp_path):
    paths = [grey(tmp_path / f"{value}.png", value) for value in (100, 200)]
    summary = extract_images(brightness_backbone(), paths, tmp_path / "out")
    store = FeatureStore(tmp_path / "out")
    assert summary.done == 2 and store.read(0).dtype == np.float32
    for i, value in enumerate((100, 200)):
        np.testing.assert_allclose(store.read(i)[..., 0], 1e6 * value / 255, rtol=1e-5)


def test_nan_in_one_image_is_reported_and_its_neighbours_are_stored(tmp_path):
    paths = [grey(tmp_path / f"{value}.png", value) for value in (0, 1, 2)]
    summary = extract_images(brightness_backbone(), paths, tmp_path / "out")
    assert summary.done == 2 and [path for path, _ in summary.failed] == [str(paths[0])]
    assert "NaN" in summary.failed[0][1] and FeatureStore(tmp_path / "out").images == [str(p) for p in paths[1:]]
    with pytest.raises(NonFiniteError, match=r"0\.png"):
        extract_images(brightness_backbone(), paths, tmp_path / "strict", strict=True)


@pytest.fixture
def cramped(make_tiny_backbone):
    """A backbone for which three images at once are too many, and the hook that makes it so."""

    def full(module, inputs):
        if len(inputs[0]) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")

    backbone = make_tiny_backbone()
    return backbone, backbone.register_forward_pre_hook(full)


def test_out_of_memory_halves_the_batch_once(cramped, tmp_path, photo):
    backbone, hook = cramped
    paths = images_of(save_photos(tmp_path / "in", photo, 12))  # four of each size
    extract_images(backbone, paths, tmp_path / "out", ExtractConfig(batch=4))
    with pytest.raises(ConfigError, match="lower the batch"):
        more = images_of(save_photos(tmp_path / "more", photo[:, 60:, 60:], 18))
        extract_images(backbone, more, tmp_path / "more out", ExtractConfig(batch=8))
    hook.remove()
    extract_images(backbone, paths, tmp_path / "expected", ExtractConfig(batch=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


# -- many runs --------------------------------------------------------------------------------------------------------


def test_the_second_run_computes_nothing_and_a_new_image_alone(watched, folder, tmp_path, photo):
    backbone, seen = watched
    extract_images(backbone, images_of(folder), tmp_path / "out", SMALL)
    before = contents(tmp_path / "out")
    seen.clear()
    second = extract_images(backbone, images_of(folder), tmp_path / "out", SMALL)
    assert (second.done, second.skipped, second.shards, seen) == (0, 9, 0, [])
    Image.fromarray((photo * 255).byte().permute(1, 2, 0).numpy()).save(folder / "00-new.png")
    third = extract_images(backbone, images_of(folder), tmp_path / "out", SMALL)
    assert (third.done, third.skipped, seen) == (1, 9, [(1, 3, 96, 96)])
    assert before.items() < contents(tmp_path / "out").items()


def broken(folder):
    """Files that are no images, and some whose header can be read but not their pixels."""
    (folder / "00b.png").write_bytes(b"this is no image")
    (folder / "01-.png").write_bytes((folder / "01.png").read_bytes()[:3000])
    (folder / "01b.png").write_bytes((folder / "01.png").read_bytes()[:3000])
    (folder / "04b.png").write_bytes((folder / "04.png").read_bytes()[:2000])
    return [str(folder / name) for name in ("00b.png", "01-.png", "01b.png", "04b.png")]


def test_bad_images_are_reported_under_each_path_and_the_rest_is_stored(tiny_backbone, folder, tmp_path):
    good = [str(path) for path in images_of(folder)]
    bad = broken(folder)
    calls = []
    summary = extract_images(
        tiny_backbone,
        images_of(folder),
        tmp_path / "out",
        replace(SMALL, batch=4),
        progress=lambda *call: calls.append(call),
    )
    assert summary.done == 9 and sorted(path for path, _ in summary.failed) == bad
    store = FeatureStore(tmp_path / "out")
    assert all(reason for _, reason in summary.failed) and store.images == good
    for i, path in enumerate(good):  # each under its own name
        expected = one_by_one(tiny_backbone, path).patches[0].numpy()
        np.testing.assert_allclose(store.read(i), expected, rtol=2e-3, atol=2e-3)
    assert calls[:13] == [("look", n, 13) for n in range(1, 14)]
    assert calls[13:] == [("extract", n, 12) for n in range(1, 13)]


@pytest.mark.parametrize("name", ["00b.png", "01-.png"])
def test_strict_stops_at_a_bad_image(tiny_backbone, folder, tmp_path, name):
    broken(folder)
    paths = [folder / "00.png", folder / name]
    with pytest.raises(ImageError, match=name):
        extract_images(tiny_backbone, paths, tmp_path / "out", SMALL, strict=True)


def test_images_that_cannot_be_decoded_do_not_move_the_cuts_of_a_resumed_run(tiny_backbone, folder, tmp_path):
    bad, config = broken(folder), replace(SMALL, shard_images=2)
    extract_images(tiny_backbone, images_of(folder), tmp_path / "out", config)
    before, names = contents(tmp_path / "out"), shards_of(tmp_path / "out")
    for file in (tmp_path / "out").glob("*.h5"):  # the later shards of the size that the bad images have are lost
        if min(FeatureStore(file).images) > str(folder / "04") and (6, 9) in FeatureStore(file).grids:
            file.unlink()
    lost = len(names) - len(shards_of(tmp_path / "out"))
    assert 0 < lost < 3
    again = extract_images(tiny_backbone, images_of(folder), tmp_path / "out", config)
    assert again.shards == lost and sorted(path for path, _ in again.failed) == bad
    assert shards_of(tmp_path / "out") == names and contents(tmp_path / "out") == before


def test_an_image_that_can_be_decoded_after_all_is_added(tiny_backbone, folder, tmp_path, monkeypatch):
    """As after an update of Pillow: the same bytes, another outcome."""

    def load(path, sha256):
        if Path(path).name == "03.png":
            raise ImageError("not yet")
        return load_image(path, sha256)

    monkeypatch.setattr("dvt.jobs.intake.load_image", load)
    assert len(extract_images(tiny_backbone, images_of(folder), tmp_path / "out", SMALL).failed) == 1
    monkeypatch.undo()
    summary = extract_images(tiny_backbone, images_of(folder), tmp_path / "out", SMALL)
    assert (summary.done, summary.skipped, summary.failed) == (1, 8, [])


@pytest.mark.parametrize(
    ("config", "denoiser", "names"),
    [
        (replace(SMALL, dtype="bfloat16"), {}, "dtype"),
        (SMALL, None, "denoiser"),
        (SMALL, {"strength": 0.5}, "strength"),
        (SMALL, {"seed": 1}, "weights_sha256"),
    ],
)
def test_another_job_is_refused_in_the_same_folder(tiny_backbone, folder, tmp_path, config, denoiser, names):
    paths, started = images_of(folder)[:1], []
    extract_images(tiny_backbone, paths, tmp_path / "out", SMALL, make_denoiser(), started=started.append)
    assert [job.config["verb"] for job in started] == ["extract"]
    other = None if denoiser is None else make_denoiser(**denoiser)
    with pytest.raises(StoreError, match=names):
        extract_images(tiny_backbone, paths, tmp_path / "out", config, other, started=started.append)
    assert len(started) == 1


@pytest.mark.parametrize("bad", [{"dtype": "int8"}, {"batch": 0}, {"shard_images": 0}, {"workers": 0}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ExtractConfig(**bad)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_shard_that_cannot_be_written_ends_the_run_with_its_reason(tiny_backbone, folder, tmp_path, which):
    extract_images(tiny_backbone, images_of(folder), tmp_path / "once", SMALL)
    name = shards_of(tmp_path / "once")[which]

    def block(what, done, total):  # a folder lies where the shard is to be
        if what == "extract":
            (tmp_path / "out" / name).mkdir(exist_ok=True)

    with pytest.raises(StoreError, match="cannot write"):
        extract_images(tiny_backbone, images_of(folder), tmp_path / "out", SMALL, progress=block)


# -- merging ----------------------------------------------------------------------------------------------------------


def test_parts_merged_are_the_whole(tiny_backbone, folder, tmp_path):
    paths, calls = images_of(folder), []
    extract_images(tiny_backbone, paths, tmp_path / "whole", SMALL)
    extract_images(tiny_backbone, paths[:5], tmp_path / "a", SMALL)
    extract_images(tiny_backbone, paths[3:], tmp_path / "b", SMALL)
    both = [tmp_path / "a", tmp_path / "b"]
    counts = merge_stores(both, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert counts["images"] == 9 and counts["present"] == 2
    assert calls == [("merge", n, 6) for n in range(1, 7)]
    merged, whole = FeatureStore(tmp_path / "out"), FeatureStore(tmp_path / "whole")
    assert (merged.images, merged.sha256s, merged.job) == (whole.images, whole.sha256s, whole.job)
    parts = {**contents(tmp_path / "b"), **contents(tmp_path / "a")}  # the first store's tokens are taken
    assert contents(tmp_path / "out") == parts and not merged.verify()
    names = shards_of(tmp_path / "out")
    assert merge_stores(both, tmp_path / "out") == {"images": 0, "shards": 0, "present": 11}
    again = merge_stores([tmp_path / "b"], tmp_path / "a")  # into one of them
    assert again["images"] == 4 and len(FeatureStore(tmp_path / "a")) == 9
    assert shards_of(tmp_path / "out") == names
    assert extract_images(tiny_backbone, paths, tmp_path / "out", SMALL).skipped == 9


def test_stores_of_different_jobs_are_refused_and_what_differs_is_named(tiny_backbone, folder, tmp_path):
    extract_images(tiny_backbone, images_of(folder)[:2], tmp_path / "a", SMALL)
    extract_images(tiny_backbone, images_of(folder)[2:4], tmp_path / "b", replace(SMALL, dtype="bfloat16"))
    with pytest.raises(StoreError, match=r"dtype 'bfloat16' \(the first has 'float32'\)"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="another job"):
        merge_stores([tmp_path / "b"], tmp_path / "a")
    with pytest.raises(ConfigError, match="no store"):
        merge_stores([], tmp_path / "out")


def record(name, grid=(2, 3), value=1.0):
    rng = np.random.default_rng(len(name))
    terms = {"raw": (value * rng.standard_normal((*grid, 4))).astype(np.float32)}
    prefix = rng.standard_normal((2, 4)).astype(np.float32)
    return Record(name, hashlib.sha256(os.fsencode(name)).hexdigest(), (20, 30), terms, prefix)


def test_merging_keeps_shared_artifacts_full_precision_and_all_paths(tmp_path):
    job, artifacts = Job("vit", "00"), [np.full((2, 3, 4), value, np.float32) for value in (1.0, 2.0)]
    for folder, name, artifact in zip("ab", ("one", "seven"), artifacts, strict=True):
        with StoreWriter(tmp_path / folder, job) as writer:
            copy = replace(record(name), path=f"copy of {name}")
            writer.write("first", [record(name), copy], artifact, dtype="float32")
    with StoreWriter(tmp_path / "c", job) as writer:  # the same bytes under another path
        writer.write("first", [replace(record("one"), path="z")], artifacts[0], dtype="float32")
    merge_stores([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "out")
    merged = FeatureStore(tmp_path / "out")
    assert merged.images == ["copy of one", "copy of seven", "one", "seven", "z"]
    for i, (name, artifact) in enumerate(zip(("one", "seven"), artifacts, strict=True), start=2):
        np.testing.assert_array_equal(merged.artifact(i), artifact)
        np.testing.assert_array_equal(merged.read(i), record(name).terms["raw"])


def test_a_damaged_store_is_not_merged(tmp_path):
    for folder, name in zip("ab", ("one", "seven"), strict=True):
        with StoreWriter(tmp_path / folder, Job("vit", "00")) as writer:
            path = writer.write(name, [record(name)])
    values = FeatureStore(path).read(0)
    content = path.read_bytes()
    place = content.index(values.tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(StoreError, match="damaged"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert FeatureStore(tmp_path / "out").images == ["one"] and not FeatureStore(tmp_path / "out").verify()


# -- exporting --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """A store of two grids and two types, with names that must not become names of files."""
    with StoreWriter(tmp_path / "store", Job("vit", "00", config={"verb": "extract"})) as writer:
        writer.write("first", [record("../../escape"), record("/etc/other", grid=(4, 2))])
        writer.write("second", [record("third \udcff")], dtype="float32")
    return FeatureStore(tmp_path / "store")


def test_npy_files_hold_the_tokens_and_the_index_tells_whose(mixed, tmp_path):
    calls = []
    assert export_store(mixed.path, tmp_path / "out", progress=lambda *call: calls.append(call)) == 3
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["terms"] == ["raw"] and index["job"]["backbone"] == "vit"
    assert [entry["path"] for entry in index["images"]] == mixed.images
    for i, entry in enumerate(index["images"]):
        array = np.load(tmp_path / "out" / "raw" / entry["file"])
        np.testing.assert_array_equal(array, mixed.read(i))
        assert (
            array.dtype == (np.float32 if i == 2 else np.float16)
            and list(array.shape[:2]) == entry["grid"]
            and entry["size"] == [20, 30]
        )
        np.testing.assert_array_equal(np.load(tmp_path / "out" / "prefix" / entry["file"]), mixed.record(i).prefix)
        assert entry["sha256"] == mixed.sha256s[i]
    assert calls == [("export", n, 3) for n in (1, 2, 3)]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 7 and not (tmp_path.parent / "escape").exists()


def test_a_zarr_group_holds_what_the_store_holds(mixed, tmp_path):
    zarr = pytest.importorskip("zarr")
    export_store(mixed.path, tmp_path / "out.zarr", "zarr")
    root = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")
    offset = root["index/offset"][:]
    for i in range(3):
        rows = root["tokens/raw"][offset[i] : offset[i + 1]]
        np.testing.assert_array_equal(rows.reshape(*root["index/grid"][i], 4), mixed.read(i))
        np.testing.assert_array_equal(root["tokens/prefix"][i], mixed.record(i).prefix)
        assert str(root["index/sha256"][i]) == mixed.sha256s[i]
    assert [str(path) for path in root["index/path"][:]] == [*mixed.images[:2], "third \\xff"]
    assert root["tokens/raw"].dtype == np.float32 and root.attrs["backbone"] == "vit"


def test_without_zarr_the_error_says_what_to_install(mixed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)  # what Python itself does for a module that cannot be imported
    with pytest.raises(ConfigError, match="pip install 'zarr"):
        export_store(mixed.path, tmp_path / "out", "zarr")
    assert not (tmp_path / "out").exists()


def test_an_export_goes_to_a_new_folder_or_on_with_an_unfinished_one(mixed, tmp_path):
    class Stop(Exception):
        pass

    def stop(what, done, total):
        raise Stop

    with pytest.raises(Stop):
        export_store(mixed.path, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out" / "index.json").exists()
    assert export_store(mixed.path, tmp_path / "out") == 3
    with pytest.raises(StoreError, match="choose a new folder"):
        export_store(mixed.path, tmp_path / "out")
    with pytest.raises(StoreError, match="raw, not semantic"):
        export_store(mixed.path, tmp_path / "other", terms=["semantic"])
    with pytest.raises(ConfigError, match="npy or zarr or safetensors, got 'csv'"):
        export_store(mixed.path, tmp_path / "other", "csv")
    assert not (tmp_path / "other").exists()


# -- the command line -------------------------------------------------------------------------------------------------

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64")


def run(capsys, *arguments, expect=0):
    code = main([str(each) for each in (*arguments, "--json")])
    out, errors = capsys.readouterr()
    assert code == expect, errors
    return json.loads(out) if out else " ".join(errors.split())


def test_extract_merge_and_export_on_the_command_line(folder, tmp_path, capsys):
    plan = run(capsys, "extract", folder, *WITH, "--out", tmp_path / "out", "--dry-run")
    assert len(plan["images"]) == 9 and not (tmp_path / "out").exists()
    first = run(capsys, "extract", folder, *WITH, "--out", tmp_path / "out", "--batch", 4)
    second = run(capsys, "extract", folder, *WITH, "--out", tmp_path / "out", "--batch", 4)
    assert (first["done"], first["skipped"], second["done"], second["skipped"]) == (9, 0, 0, 9)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["batch"] == 4 and saved["job"]["backbone"] == "vit_tiny_patch16_224"
    broken(folder)
    third = run(capsys, "extract", folder, *WITH, "--out", tmp_path / "out", expect=2)
    assert (third["skipped"], len(third["failed"])) == (9, 4)

    merged = run(capsys, "store", "merge", tmp_path / "out", "--out", tmp_path / "merged")
    assert merged["images"] == 9 and contents(tmp_path / "merged") == contents(tmp_path / "out")
    exported = run(capsys, "store", "export", tmp_path / "merged", "--out", tmp_path / "npy", "--format", "npy")
    assert exported["images"] == 9 and len(list((tmp_path / "npy" / "raw").iterdir())) == 9
    assert run(capsys, "inspect", tmp_path / "merged", "--verify")["images"] == 9
    assert "not a feature store" in run(capsys, "store", "merge", folder, "--out", tmp_path / "x", expect=2)
    assert run(capsys, "store", "export", tmp_path / "merged", "--out", tmp_path / "x", "--dry-run")["form"] == "npy"
    assert not (tmp_path / "x").exists()


def test_config_json_stays_the_jobs_own_and_goes_with_a_store_of_nothing(folder, tmp_path, capsys):
    run(capsys, "extract", folder / "00.png", *WITH, "--dtype", "float32", "--out", tmp_path / "out")
    saved = (tmp_path / "out" / "config.json").read_text()
    error = run(capsys, "extract", folder, *WITH, "--dtype", "bfloat16", "--out", tmp_path / "out", expect=2)
    assert "dtype" in error and (tmp_path / "out" / "config.json").read_text() == saved
    broken(folder)
    error = run(capsys, "extract", folder / "00b.png", *WITH, "--strict", "--out", tmp_path / "new", expect=2)
    assert "00b.png" in error and not (tmp_path / "new").exists()  # nothing came to be in it
