"""The command line as a new user meets it: real images, exit codes, what is printed and what is left on disk."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dvt.cli import main
from dvt.store import FeatureStore

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64", "--views", "7")


class Ended(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


def dvt(*arguments, cwd, expect=0):
    """Run a command in this process, from a folder, and return what it prints."""
    out, errors, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main([*map(str, arguments)])
    finally:
        os.chdir(before)
    assert code == expect, errors.getvalue() + out.getvalue()
    return Ended(out.getvalue(), errors.getvalue())


def dvt_alone(*arguments, cwd, expect=0):
    """Run a command in a process of its own, as a shell does, and return what it prints."""
    process = subprocess.run(
        [sys.executable, "-m", "dvt.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == expect, process.stderr + process.stdout
    assert "Traceback" not in process.stderr
    return process


def photograph(path: Path, seed: int, size=(90, 120)) -> Path:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        photograph(folder / f"{number}.png", number)
    return folder


def test_demo_makes_pictures_a_store_and_a_table(tmp_path):
    out = json.loads(dvt_alone("demo", "--views", 8, "--json", cwd=tmp_path).stdout)
    assert out["done"] == 4 and not out["failed"]
    raw, semantic = out["position"]["raw"], out["position"]["semantic"]
    assert raw["value"] > 0.9 > 10 * abs(raw["null"]) and semantic["value"] < 0.5
    (drawn,) = (tmp_path / "dvt-demo" / "pictures").glob("rocket-*.png")
    with Image.open(drawn) as picture:
        assert picture.size[0] > 1000 and np.asarray(picture.convert("L")).std() > 20
    store = FeatureStore(tmp_path / "dvt-demo")
    assert len(store) == 4 and store.terms == ("raw", "semantic", "artifact", "residual")
    assert [Path(path).stem for path in store.images] == ["astronaut", "cat", "coffee", "rocket"]


def test_denoise_twice_computes_once(photos, tmp_path, digests):
    first = json.loads(dvt("denoise", photos, *WITH, "--out", "out", "--json", cwd=tmp_path).stdout)
    before = digests(tmp_path / "out", "*.h5")
    second = json.loads(dvt("denoise", photos, *WITH, "--out", "out", "--json", cwd=tmp_path).stdout)
    assert (first["done"], first["skipped"], second["done"], second["skipped"]) == (3, 0, 0, 3)
    assert before == digests(tmp_path / "out", "*.h5")
    index = json.loads((tmp_path / "out" / "pictures" / "index.json").read_text())
    assert [Path(path).name for _, path in sorted(index.items())] == ["0.png", "1.png", "2.png"]
    assert {*index, "index.json"} == {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["views"] == 7 and config["job"]["backbone"] == "vit_tiny_patch16_224"


def test_one_bad_image_among_good_ones_is_reported_and_the_rest_is_done(photos, tmp_path):
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:200])
    (photos / "empty.jpg").touch()
    done = dvt("denoise", photos, *WITH, "--out", "out", "--json", "--no-pictures", cwd=tmp_path, expect=2)
    result = json.loads(done.stdout)
    assert result["done"] == 3
    assert sorted(Path(path).name for path, _ in result["failed"]) == ["broken.png", "empty.jpg"]
    assert len(FeatureStore(tmp_path / "out")) == 3


def test_an_image_too_thin_for_memory_is_refused_by_its_size(photos, tmp_path):
    Image.new("RGB", (2, 20000)).save(photos / "thin.png")
    done = dvt("denoise", photos, *WITH, "--out", "out", "--json", "--no-pictures", cwd=tmp_path, expect=2)
    result = json.loads(done.stdout)
    assert result["done"] == 3 and "patches" in result["failed"][0][1]


def test_strict_stops_at_the_bad_image(photos, tmp_path):
    (photos / "0.png").write_bytes(b"not an image")
    stopped = dvt_alone("denoise", photos, *WITH, "--out", "out", "--strict", cwd=tmp_path, expect=2)
    assert "0.png" in stopped.stderr
    assert not list((tmp_path / "out").glob("*.h5*"))


def test_other_options_reach_the_numbers(photos, tmp_path):
    arguments = ("denoise", photos / "0.png", *WITH, "--no-pictures")
    dvt(*arguments, "--out", "plain", "--upsample", 3, cwd=tmp_path)
    dvt(*arguments, "--out", "seed", "--seed", 1, cwd=tmp_path)
    dvt(*arguments, "--out", "neural", "--solver", "neural", "--neural.steps", 20, cwd=tmp_path)
    dvt(*arguments, "--out", "shared", "--shared-artifact", "--keep-terms", cwd=tmp_path)
    stores = {name: FeatureStore(tmp_path / name) for name in ("plain", "seed", "neural", "shared")}
    raw = {name: store.read(0, "raw") for name, store in stores.items()}
    assert all(np.array_equal(raw["plain"], other) for other in raw.values())
    semantic = [store.read(0, "semantic") for store in stores.values()]
    assert all(not np.array_equal(semantic[0], other) for other in semantic[1:3])
    assert stores["shared"].artifact(0) is not None and stores["plain"].artifact(0) is None
    height, width, channels = semantic[0].shape
    assert np.load(next((tmp_path / "plain" / "upsampled").glob("0-*.npy"))).shape == (3 * height, 3 * width, channels)


def test_files_beside_a_store_have_lasting_names_and_missing_ones_are_told(photos, tmp_path):
    """Of two images of one name, of one whose name is as long as names can be, and of one that is added later."""
    long = "n" * 251 + ".png"
    for name in ("a/x.png", "b/x.png", long):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / "0.png").read_bytes())
    dvt("denoise", "a/x.png", *WITH, "--out", "out", cwd=tmp_path)
    (first,) = (tmp_path / "out" / "pictures").glob("*.png")
    drawn = first.read_bytes()
    (tmp_path / "b" / "x.png").write_bytes((photos / "1.png").read_bytes())
    (tmp_path / long).write_bytes((photos / "2.png").read_bytes())
    every = ("denoise", "a/x.png", "b/x.png", long, *WITH, "--out", "out")
    dvt(*every, cwd=tmp_path)
    index = json.loads((tmp_path / "out" / "pictures" / "index.json").read_text())
    assert sorted(index.values()) == ["a/x.png", "b/x.png", long] and first.read_bytes() == drawn
    told = dvt(*every, "--upsample", 2, cwd=tmp_path).stdout
    assert "no file for 3 of 3 images in out/upsampled" in told and "in out/pictures: files beside" not in told
    (tmp_path / "out" / "pictures" / "index.json").write_text("{")
    (tmp_path / "c.png").write_bytes((photos / "2.png").read_bytes() + b"!")
    told = dvt("denoise", "c.png", *WITH, "--upsample", 2, "--out", "out", cwd=tmp_path).stdout
    assert "index.json cannot be read" in " ".join(told.split()) and "no file" not in told
    told = dvt("denoise", "c.png", *WITH, "--upsample", 3, "--out", "out", cwd=tmp_path).stdout
    assert "no file for 1 of 1 image in out/upsampled" in told  # 2 is not 3
    refused = dvt("denoise", "c.png", *WITH, "--keep-terms", "--out", "out", cwd=tmp_path, expect=2)
    assert "without --keep-terms" in refused.stderr


def test_dry_run_prints_the_settings_and_writes_nothing(photos, tmp_path):
    settings = json.loads(dvt("denoise", photos, *WITH, "--out", "out", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert settings["views"] == 7 and len(settings["images"]) == 3
    assert not (tmp_path / "out").exists()


def test_inspect_shows_and_verifies(photos, tmp_path):
    dvt("denoise", photos, *WITH, "--out", "out", "--no-pictures", cwd=tmp_path)
    summary = json.loads(dvt("inspect", "out", "--verify", "--json", cwd=tmp_path).stdout)
    assert summary["images"] == 3 and summary["damaged"] == {}
    shard = next((tmp_path / "out").glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    damaged = json.loads(dvt("inspect", "out", "--verify", "--json", cwd=tmp_path, expect=2).stdout)
    assert [Path(path).name for path in damaged["damaged"]] == [shard.name]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("denoise", "nothing-here", *WITH, "--out", "o"), "nothing-here"),
        (("denoise", ".", *WITH, "--out", "o"), "no images"),
        (("denoise", "a.png", "--backbone", "vit_tny", "--out", "o"), "vit_tny"),
        (("denoise", "a.png", "--backbone", "resnet18", "--out", "o"), "hierarchical"),
        (("denoise", "a.png", "--backbone", "vit_tiny_patch16_224", "--weights", "no.pth", "--out", "o"), "no.pth"),
        (("denoise", "a.png", "--backbone", "vit_small_patch16_224", "--weights", "demo", "--out", "o"), "shape"),
        (("denoise", "a.png", *WITH, "--views", "-1", "--out", "o"), "-1"),
        (("denoise", "a.png", *WITH, "--upsample", "0", "--out", "o"), "upsample"),
        (("denoise", "a.png", *WITH, "--layer", "99", "--out", "o"), "99"),
        (("denoise", "a.png", *WITH, "--device", "abacus", "--out", "o"), "abacus"),
        (("denoise", "a.png", *WITH, "--shared-artifact", "--solver", "neural", "--out", "o"), "linear"),
        (("denoise", "a.png", *WITH, "--linear.resolution", "1", "--out", "o"), "resolution"),
        (("denoise", "a.png", *WITH, "--views", "0", "--out", "o"), "1 or more"),
        (("inspect", "nothing-here"), "nothing-here"),
        (("inspect", "a.png"), "not a feature store"),
        (("denoise", "a.png"), "--out"),
    ],
)
def test_bad_input_is_said_clearly(arguments, says, tmp_path):
    if "a.png" in arguments:
        photograph(tmp_path / "a.png", 0)
    refused = dvt(*arguments, cwd=tmp_path, expect=2)
    assert says in refused.stderr
    assert not list(tmp_path.glob("o/*.h5*"))


def test_without_a_network_the_error_names_the_ways_out(tmp_path):
    photograph(tmp_path / "a.png", 0)
    name = "vit_small_patch14_dinov2.lvd142m"
    refused = dvt_alone("denoise", "a.png", "--backbone", name, "--out", "o", cwd=tmp_path, expect=2)
    for word in (name, "--weights", "dvt demo"):
        assert word in refused.stderr


def test_another_jobs_folder_is_refused_and_kept(photos, tmp_path, digests):
    dvt("denoise", photos, *WITH, "--out", "out", "--no-pictures", cwd=tmp_path)
    before = digests(tmp_path / "out", "*.h5")
    refused = dvt("denoise", photos, *WITH, "--out", "out", "--seed", 1, cwd=tmp_path, expect=2)
    assert "seed" in refused.stderr
    assert before == digests(tmp_path / "out", "*.h5")


def tokens_of(store, term):
    return {path: store.read(i, term).tobytes() for i, path in enumerate(store.images)}


def test_a_cluster_of_this_machine_makes_the_store_of_one_process(photos, tmp_path):
    """Behind a URL too, with the settings beside the shards; pictures are not drawn there."""
    pytest.importorskip("ray")
    exact = ("--dtype", "float32")  # which "auto" takes with --ray
    dvt("denoise", photos, *WITH, *exact, "--out", "here", "--no-pictures", cwd=tmp_path)
    there = (tmp_path / "there").as_uri()
    done = dvt_alone(
        "denoise", photos, *WITH, "--out", there, "--ray", "local", "--ray-workers", 1, "--json", cwd=tmp_path
    )
    result = json.loads(done.stdout)
    assert (result["done"], result["failed"], result["store"]) == (3, [], there)
    stores = [FeatureStore(tmp_path / name) for name in ("here", "there")]
    for term in ("raw", "semantic"):
        assert tokens_of(stores[0], term) == tokens_of(stores[1], term)
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == sorted(
        p.name for p in (tmp_path / "here").iterdir() if p.name != "writer.lock"
    )
    assert json.loads((tmp_path / "there" / "config.json").read_text())["job"]["backbone"] == "vit_tiny_patch16_224"


def test_a_url_needs_a_cluster_to_be_written_to(photos, tmp_path):
    url = (tmp_path / "out").as_uri()
    done = dvt("denoise", photos, *WITH, "--out", url, cwd=tmp_path, expect=2)
    assert "is a URL" in done.stderr and "--ray" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize("command", [("denoise", "--no-pictures"), ("extract",)])
def test_images_behind_urls_and_a_profile(photos, tmp_path, command):
    (tmp_path / "list.txt").write_text("".join(f"{path.as_uri()}\n" for path in sorted(photos.iterdir())))
    options = WITH if command[0] == "denoise" else WITH[:-2]
    done = dvt(*command, "list.txt", *options, "--out", "out", "--profile", cwd=tmp_path)
    assert "where the time went" in done.stdout and "bounds this run" in done.stdout
    assert FeatureStore(tmp_path / "out").images == [path.as_uri() for path in sorted(photos.iterdir())]


def test_the_version_is_told(tmp_path):
    import dvt as package

    assert dvt_alone("--version", cwd=tmp_path).stdout == f"dvt {package.__version__}\n"


def test_names_that_are_no_text_are_told_with_escapes(photos, tmp_path):
    with open(os.path.join(os.fsencode(photos), b"\xff.png"), "wb") as file:
        file.write(b"no image")
    done = dvt_alone("extract", photos, *WITH[:-2], "--out", "out", cwd=tmp_path, expect=2)
    assert r"\udcff.png" in done.stdout and len(FeatureStore(tmp_path / "out")) == 3
    process = subprocess.run([sys.executable, "-m", "dvt.cli", b"\xff"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
