"""The feature store: laws, kills, locks, damage and hostile files."""

import hashlib
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dvt.errors import ConfigError, DvtError, NonFiniteError, ShapeError, StoreError
from dvt.store import SCHEMA, FeatureStore, Job, Record, StoreWriter, damaged_shards, plan

JOB = Job("vit_tiny", "ab" * 32, size=224, config={"verb": "denoise", "seed": 0, "solver": {"name": "linear"}})
GRIDS = [(2, 3), (4, 4), (3, 2)]


def sha(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def record(i: int, grid=None, channels: int = 6, prefix: int = 1, terms=("raw", "semantic")) -> Record:
    rng = np.random.default_rng(i)
    h, w = grid or GRIDS[i % 3]
    maps = {term: rng.standard_normal((h, w, channels)).astype(np.float32) for term in terms}
    tokens = rng.standard_normal((prefix, channels)).astype(np.float32) if prefix else None
    return Record(f"photos/{i:03}.jpg", sha(i), (10 * h, 10 * w + i), maps, tokens)


def store(folder: Path, count: int = 7, shard_images: int = 3, job: Job = JOB, **options) -> Path:
    records = {r.path: r for r in (record(i, **options) for i in range(count))}
    images = [(r.path, r.sha256, r.terms["raw"].shape[:2]) for r in records.values()]
    with StoreWriter(folder, job) as writer:
        for shard in plan(images, shard_images, job):
            writer.write(shard.name, [records[path] for path, _, _ in shard.images])
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.h5"))


# -- jobs and plans -------------------------------------------------------------------------------------------------


def test_a_job_comes_back_from_its_attributes():
    job = Job("m", "cd", layer=3, stride=(7, 7), size=[224, 336], config={"views": (1, 2.5, None), "on": True})
    assert Job.from_attributes(job.attributes()) == job and job.size == (224, 336)
    assert {*map(type, job.attributes().values())} == {str}


def test_the_digest_depends_on_every_field_and_not_on_order():
    jobs = [
        JOB,
        Job("vit_small", JOB.weights_sha256, size=224, config=JOB.config),
        Job("vit_tiny", "cd" * 32, size=224, config=JOB.config),
        Job("vit_tiny", JOB.weights_sha256, layer=3, size=224, config=JOB.config),
        Job("vit_tiny", JOB.weights_sha256, stride=8, size=224, config=JOB.config),
        Job("vit_tiny", JOB.weights_sha256, size=225, config=JOB.config),
        Job("vit_tiny", JOB.weights_sha256, size=224, config={**JOB.config, "seed": 1}),
    ]
    assert len({job.digest for job in jobs}) == len(jobs)
    turned = Job("vit_tiny", JOB.weights_sha256, size=224, config=dict(reversed(JOB.config.items())))
    assert turned.digest == JOB.digest


def test_jobs_that_cannot_be_written_are_refused():
    with pytest.raises(ConfigError, match="JSON"):
        Job("m", "ab", config={"x": object()})
    with pytest.raises(ConfigError, match="JSON"):
        Job("m", "ab", config={"x": float("nan")})
    with pytest.raises(ConfigError, match="64 KB"):
        Job("m", "ab", config={"x": "y" * 70_000})


IMAGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=30, unique_by=lambda pair: pair[0]).map(
    lambda pairs: [(f"{path:02}.jpg", sha(content), GRIDS[content % 3]) for path, content in pairs]
)


@settings(deadline=None)
@given(IMAGES, st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
def test_a_plan_is_a_partition_that_ignores_order(images, shard_images, by_grid, rng):
    made = plan(images, shard_images, JOB, by_grid)
    assert Counter(image for shard in made for image in shard.images) == Counter(images)
    for shard in made:  # equal bytes lie together, hence are computed once
        contents = [content for _, content, _ in shard.images]
        assert len([*groupby(contents)]) == len(set(contents)) and 1 <= len(contents) <= shard_images
    assert not by_grid or all(len({grid for _, _, grid in shard.images}) == 1 for shard in made)
    assert len({shard.name for shard in made}) == len(made)
    shuffled = rng.sample(images, len(images))
    assert plan(shuffled, shard_images, JOB, by_grid) == made


@settings(deadline=None)
@given(IMAGES, st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
def test_leaving_out_finished_shards_keeps_the_others(images, shard_images, by_grid, rng):
    images = [*{content: (path, content, grid) for path, content, grid in images}.values()]  # no copies: see jobs
    made = plan(images, shard_images, JOB, by_grid)
    finished = rng.sample(made, rng.randint(0, len(made)))
    done = {image for shard in finished for image in shard.images}
    rest = plan([image for image in images if image not in done], shard_images, JOB, by_grid)
    assert rest == [shard for shard in made if shard not in finished]


def test_names_depend_on_the_job():
    images = [("a.jpg", sha(0), (2, 2))]
    other = Job("vit_small", "ab")
    assert plan(images, 4, JOB)[0].name != plan(images, 4, other)[0].name
    with pytest.raises(ConfigError, match="at least 1"):
        plan(images, 0, JOB)


# -- round trips ----------------------------------------------------------------------------------------------------

FINITE = st.floats(-60000, 60000, width=16)


@st.composite
def record_lists(draw) -> list[Record]:
    channels, prefix = draw(st.integers(1, 4)), draw(st.sampled_from([None, 0, 1, 3]))
    terms = draw(
        st.lists(st.sampled_from(["raw", "semantic", "artifact", "residual", "denoised"]), min_size=1, unique=True)
    )
    made = []
    for i in range(draw(st.integers(1, 5))):
        h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        maps = {term: draw(hnp.arrays(np.float16, (h, w, channels), elements=FINITE)) for term in terms}
        tokens = None if prefix is None else draw(hnp.arrays(np.float16, (prefix, channels), elements=FINITE))
        name = draw(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=9))
        made.append(Record(f"{i}{name}", sha(i), (h, 1 + w), maps, tokens))
    return made


@settings(deadline=None, max_examples=40)
@given(record_lists())
def test_what_is_written_is_read_back(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("law")
    with StoreWriter(folder, JOB) as writer:
        writer.write("one", records)
        assert writer.done == {r.sha256 for r in records}
    features = FeatureStore(folder, term=next(iter(records[0].terms)))
    assert features.images == [r.path for r in records] and len(features) == len(records)
    assert features.grids == [next(iter(r.terms.values())).shape[:2] for r in records]
    assert features.job == JOB and not features.verify()
    for i, want in enumerate(records):
        got = features.record(i)
        assert (got.path, got.sha256, got.size) == (want.path, want.sha256, want.size)
        assert got.terms.keys() == want.terms.keys()
        for term, values in want.terms.items():
            assert got.terms[term].dtype == np.float16
            np.testing.assert_array_equal(got.terms[term], values)
        if want.prefix is not None and len(want.prefix):
            np.testing.assert_array_equal(got.prefix, want.prefix)
        tokens = features[i]
        np.testing.assert_array_equal(tokens.patches[0].numpy(), want.terms[features.term].astype(np.float32))
        assert tokens.prefix.shape[1] == (0 if want.prefix is None else len(want.prefix))


def test_images_larger_than_a_chunk(tmp_path):
    records = [record(i, grid=(70 + i, 75), channels=512, terms=("raw",)) for i in range(2)]  # 5.4 MB each
    with StoreWriter(tmp_path, JOB) as writer:
        writer.write("one", records)
    features = FeatureStore(tmp_path)
    for i, want in enumerate(records):
        np.testing.assert_array_equal(features.read(i), want.terms["raw"].astype(np.float16))


def test_tensors_of_any_type(tmp_path):
    made = record(0, terms=("raw",))
    for name, kind in (("a", torch.bfloat16), ("b", torch.float64), ("c", torch.float16)):
        values = torch.from_numpy(made.terms["raw"]).to(kind).requires_grad_()
        with StoreWriter(tmp_path / name, JOB) as writer:
            writer.write("one", [Record(made.path, made.sha256, made.size, {"raw": values})])
        np.testing.assert_array_equal(
            FeatureStore(tmp_path / name).read(0), values.detach().float().numpy().astype("f2")
        )


@pytest.mark.parametrize(("value", "kind"), [(65504, "f2"), (65519, "f2"), (65520, "f4"), (-1e6, "f4")])
@pytest.mark.parametrize("where", ["term", "prefix", "artifact"])
def test_what_overflows_float16_is_float32(tmp_path, value, kind, where):
    made, artifact = record(0), np.zeros((2, 3, 6), np.float32)
    {"term": made.terms["semantic"], "prefix": made.prefix, "artifact": artifact}[where].flat[3] = value
    with StoreWriter(tmp_path, JOB) as writer:
        writer.write("one", [made], artifact)
    features = FeatureStore(tmp_path)
    got = features.record(0)
    stored = {"term": got.terms["semantic"], "prefix": got.prefix, "artifact": features.artifact(0)}[where]
    assert stored.dtype == np.dtype(kind) and stored.flat[3] == np.dtype(kind).type(value)
    assert got.terms["raw"].dtype == np.dtype(kind) and not features.verify()


def test_float32_on_demand(tmp_path):
    with StoreWriter(tmp_path, JOB) as writer:
        writer.write("one", [record(0)], dtype="float32")
    np.testing.assert_array_equal(FeatureStore(tmp_path).read(0, "semantic"), record(0).terms["semantic"])


def test_a_shared_artifact(tmp_path):
    artifact = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    with StoreWriter(tmp_path, JOB) as writer:
        writer.write("one", [record(0, (2, 2)), record(1, (2, 2))], torch.from_numpy(artifact))
        writer.write("two", [record(2)])
        with pytest.raises(ShapeError, match="artifact"):
            writer.write("three", [record(3, (3, 3))], artifact)
    features = FeatureStore(tmp_path)
    np.testing.assert_array_equal(features.artifact(1), artifact)
    assert features.artifact(2) is None


def test_every_dataset_has_a_checksum_and_text_is_short(tmp_path):
    with StoreWriter(tmp_path, JOB) as writer:
        path = writer.write("one", [record(0, (2, 2)), record(1, (2, 2))], np.zeros((2, 2, 6)))
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item.fletcher32}) if isinstance(item, h5py.Dataset) else None
        )
        assert file.attrs["schema"].decode() == SCHEMA == "dvt-features/1"
        kinds = [h5py.check_string_dtype(file.attrs.get_id(name).dtype) for name in file.attrs]
        assert all(0 < kind.length < 1 << 16 for kind in kinds)
        assert {"schema", "backbone", "weights_sha256", "layer", "stride", "size", "version", "config"} <= set(
            file.attrs
        )
        np.testing.assert_array_equal(file["index/offset"], [0, 4, 8])
    want = {f"index/{name}" for name in ("path", "sha256", "size", "grid", "offset")}
    assert found.keys() == want | {"tokens/raw", "tokens/semantic", "tokens/prefix", "artifact"} and all(found.values())


def test_order_is_by_path_over_all_shards(tmp_path):
    with StoreWriter(tmp_path, JOB) as writer:
        for name, numbers in (("z", (5, 0)), ("a", (9, 3)), ("m", (4,))):
            writer.write(name, [record(i) for i in numbers])
    features = FeatureStore(tmp_path)
    assert features.images == [f"photos/{i:03}.jpg" for i in (0, 3, 4, 5, 9)]
    for i, number in enumerate((0, 3, 4, 5, 9)):
        np.testing.assert_array_equal(features.read(i), record(number).terms["raw"].astype(np.float16))
    np.testing.assert_array_equal(features[-1].patches, features[4].patches)
    assert [t.grid for t in features] == features.grids
    with pytest.raises(IndexError):
        features[5]


def test_file_names_that_are_not_utf8(tmp_path):
    made = record(0)
    made.path = os.fsdecode(b"caf\xe9.jpg")
    with StoreWriter(tmp_path, JOB) as writer:
        writer.write("one", [made])
    assert FeatureStore(tmp_path).images == [made.path]


def test_summary(tmp_path):
    summary = FeatureStore(store(tmp_path)).summary()
    assert summary["images"] == summary["distinct_images"] == 7 and summary["shards"] == 3
    assert summary["tokens"] == sum(h * w for h, w in (GRIDS[i % 3] for i in range(7)))
    assert summary["grids"] == {"2x3": 3, "3x2": 2, "4x4": 2} and summary["terms"] == ["raw", "semantic"]
    assert (
        summary["dtypes"] == ["float16"] and summary["job"]["backbone"] == "vit_tiny" and summary["prefix_tokens"] == 1
    )
    assert summary["bytes"] == sum(path.stat().st_size for path in shards(tmp_path))


def test_one_shard_is_a_store(tmp_path):
    path = shards(store(tmp_path))[1]
    features = FeatureStore(path)
    assert len(features) in (1, 3) and set(features.images) < set(FeatureStore(tmp_path).images)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda r: r.terms["raw"].__setitem__((0, 0, 0), np.nan), NonFiniteError),
        (lambda r: r.terms["semantic"].__setitem__((0, 0, 0), -np.inf), NonFiniteError),
        (lambda r: r.prefix.__setitem__((0, 0), np.inf), NonFiniteError),
        (lambda r: r.terms.update(other=r.terms["raw"]), ShapeError),
        (lambda r: r.terms.pop("semantic"), ShapeError),
        (lambda r: r.terms.update(semantic=np.zeros((1, 2, 6))), ShapeError),
        (lambda r: r.terms.update(raw=np.zeros((2, 3, 5)), semantic=np.zeros((2, 3, 5))), ShapeError),
        (lambda r: setattr(r, "prefix", None), ShapeError),
        (lambda r: setattr(r, "prefix", np.zeros((1, 5))), ShapeError),
        (lambda r: setattr(r, "sha256", "12"), StoreError),
        (lambda r: setattr(r, "path", "a\0b"), StoreError),
        (lambda r: setattr(r, "size", (0, 5)), StoreError),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, change, error, dtype):
    bad = record(3)
    change(bad)
    with StoreWriter(tmp_path, JOB) as writer:
        with pytest.raises(error):
            writer.write("one", [record(0), bad], dtype=dtype)
        assert not writer.done
        for name in ("../out", ".hidden", "a/b", "", "a\n"):
            with pytest.raises(StoreError, match="not a valid shard name"):
                writer.write(name, [record(0)])
        with pytest.raises(ShapeError, match="at least one"):
            writer.write("one", [])
        with pytest.raises(ConfigError, match="float16 or float32"):
            writer.write("one", [record(0)], dtype="int8")
    with pytest.raises(StoreError, match="with block"):
        writer.write("one", [record(0)])
    assert [path.name for path in tmp_path.iterdir()] == ["writer.lock"]


# -- resuming -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards(folder)}


def test_the_same_work_gives_the_same_bytes(tmp_path):
    assert contents(store(tmp_path / "a")) == contents(store(tmp_path / "b" / "c"))


def test_images_added_later_go_to_new_shards(tmp_path):
    before = contents(store(tmp_path, count=5))
    with StoreWriter(tmp_path, JOB) as writer:
        assert writer.done == {sha(i) for i in range(5)}
        new = [record(i) for i in range(9) if sha(i) not in writer.done]
        for shard in plan([(r.path, r.sha256, r.terms["raw"].shape[:2]) for r in new], 3, JOB):
            writer.write(shard.name, [r for r in new if r.path in {path for path, _, _ in shard.images}])
    after = contents(tmp_path)
    assert before.items() < after.items() and len(FeatureStore(tmp_path)) == 9


def test_parts_of_dead_writers_are_removed_and_never_read(tmp_path):
    store(tmp_path)
    (tmp_path / "shard-x.h5.99.0123456789abcdef.part").write_bytes(b"half a shard")
    mine = [tmp_path / name for name in ("shard-x.h5.part", "talk.h5.1.part", "other.99.0123456789abcdef.part")]
    for path in mine:
        path.write_bytes(b"a user's own")
    assert len(FeatureStore(tmp_path)) == 7
    with StoreWriter(tmp_path, JOB):
        assert sorted(tmp_path.glob("*.part")) == sorted(mine)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (
            Job("vit_small", JOB.weights_sha256, size=224, config=JOB.config),
            "backbone 'vit_tiny' (you ask for 'vit_small')",
        ),
        (Job("vit_tiny", JOB.weights_sha256, 5, size=224, config=JOB.config), "layer -1 (you ask for 5)"),
        (Job("vit_tiny", JOB.weights_sha256, size=224, config={**JOB.config, "seed": 7}), "seed 0 (you ask for 7)"),
    ],
)
def test_the_folder_of_another_job_is_refused(tmp_path, job, words):
    before = contents(store(tmp_path))
    with pytest.raises(StoreError, match=re.escape(words)), StoreWriter(tmp_path, job):
        pass
    assert contents(tmp_path) == before
    with StoreWriter(tmp_path, JOB) as writer:  # the refusal did not keep the lock
        assert len(writer.done) == 7


def test_shards_of_two_jobs_in_one_folder_are_refused(tmp_path):
    store(tmp_path / "a")
    store(tmp_path / "b", job=Job("vit_small", "ab"))
    for path in shards(tmp_path / "b"):
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(StoreError, match=r"different jobs.*backbone"):
        FeatureStore(tmp_path / "a")


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_store as t
images = [(r.path, r.sha256, r.terms["raw"].shape[:2]) for r in map(t.big, range(t.COUNT))]
with t.StoreWriter(sys.argv[1], t.JOB) as writer:
    print("started", flush=True)
    for shard in t.plan([image for image in images if image[1] not in writer.done], 2, t.JOB):
        writer.write(shard.name, [t.big(int(path[-7:-4])) for path, _, _ in shard.images])
        print(*[sha256 for _, sha256, _ in shard.images], flush=True)
"""
COUNT = 60


def big(i: int) -> Record:
    return record(i, grid=(24, 24 + i % 3), channels=64)


def worker(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(folder), str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_job_loses_nothing_and_ends_the_same(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    rng = random.Random(seed)
    whole = tmp_path / "whole"
    with worker(whole) as process:
        process.stdout.readline()
        start = time.monotonic()
        process.communicate()
        seconds = time.monotonic() - start
    assert process.returncode == 0
    folder, killed = tmp_path / "killed", 0
    for _ in range(3):
        with worker(folder) as process:
            process.stdout.readline()  # the lock is held, writing begins
            time.sleep(rng.uniform(0, seconds / 3))
            process.send_signal(signal.SIGKILL)
            reported = {sha256 for line in process.stdout for sha256 in line.split() if len(sha256) == 64}
        killed += process.returncode == -signal.SIGKILL
        assert not damaged_shards(folder)
        stored = {
            FeatureStore(path).record(i).sha256 for path in shards(folder) for i in range(len(FeatureStore(path)))
        }
        assert reported <= stored
        with StoreWriter(folder, JOB, wait=False) as writer:  # the lock died with its process
            assert writer.done == stored
    assert killed
    with worker(folder) as process:
        process.communicate()
    assert process.returncode == 0
    assert contents(folder) == contents(whole) and not list(folder.glob("*.part"))
    assert len(FeatureStore(folder)) == COUNT


DEATHS = {
    # The system ends the process in the middle of a write() that exceeds the limit.
    "while it writes": "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))",
    "before it renames": "sys.addaudithook(lambda event, args: event == 'os.rename' and 'second' in str(args) "
    "and os.kill(os.getpid(), signal.SIGKILL))",
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_writer_that_dies_at_the_worst_moment(tmp_path, death):
    code = f"""
import os, resource, signal, sys
sys.path.insert(0, sys.argv[2])
import test_store as t
with t.StoreWriter(sys.argv[1], t.JOB) as writer:
    writer.write("first", [t.big(0)])
    {DEATHS[death]}
    writer.write("second", [t.big(i) for i in range(1, 5)])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], capture_output=True)
    assert done.returncode in (-signal.SIGXFSZ, -signal.SIGKILL), done.stderr
    assert [path.name.split(".")[:2] for path in tmp_path.glob("*.part")] == [["second", "h5"]]
    assert FeatureStore(tmp_path).images == [big(0).path] and not damaged_shards(tmp_path)
    with StoreWriter(tmp_path, JOB, wait=False) as writer:
        assert writer.done == {big(0).sha256} and not list(tmp_path.glob("*.part"))


def test_a_full_disk_keeps_the_shards_before_it(tmp_path):
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        done = fill(tmp_path)
        assert "No space left" in done.stdout, done.stderr
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_quota_keeps_the_shards_before_it(tmp_path):
    done = fill(tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))")
    assert "File too large" in done.stdout, done.stderr


def fill(folder: Path, before: str = "") -> subprocess.CompletedProcess:
    code = f"""
import sys
sys.path.insert(0, sys.argv[2])
import test_store as t
{before}
with t.StoreWriter(sys.argv[1], t.JOB) as writer:
    writer.write("first", [t.big(0)])
    try:
        for i in range(1, 99):
            writer.write(f"next{{i}}", [t.big(10 * i + j) for j in range(4)])
    except t.StoreError as error:
        print(len(writer.done), error)
"""
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "make room and run the same command again" in done.stdout, done.stderr
    assert not list(folder.glob("*.part")) and not damaged_shards(folder)
    assert len(FeatureStore(folder)) == int(done.stdout.split()[0])
    return done


@pytest.mark.parametrize("place", ["a file", "a folder of a file"])
def test_a_folder_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" if place == "a file" else tmp_path / "file" / "below"
    with pytest.raises(StoreError, match="cannot write to the store"), StoreWriter(folder, JOB):
        pass


# -- locks ----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from dvt.store import Job, StoreWriter
with StoreWriter(sys.argv[1], Job("vit_tiny", "ab" * 32, size=224, config=eval(sys.argv[2])), wait=True):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder), repr(JOB.config)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path):
    with holder(tmp_path) as process:
        with (
            pytest.raises(StoreError, match=f"process {process.pid} is writing"),
            StoreWriter(tmp_path, JOB, wait=False),
        ):
            pass
        process.communicate("go\n")
    with StoreWriter(tmp_path, JOB, wait=False):
        pass


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_a_second_writer_waits_until_the_first_is_gone(tmp_path, end):
    with holder(tmp_path) as process:
        entered = threading.Event()

        def second() -> None:
            with StoreWriter(tmp_path, JOB, wait=True) as writer:
                writer.write("second", [record(0)])
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.4)
        process.kill() if end == "is killed" else process.communicate("go\n")
        assert entered.wait(20)
        thread.join()
    assert len(FeatureStore(tmp_path)) == 1


def test_the_same_process_cannot_write_twice(tmp_path):
    with StoreWriter(tmp_path, JOB) as writer:
        with pytest.raises(StoreError, match="already writing"), StoreWriter(tmp_path / ".", JOB):
            pass
        # That attempt must not have released the lock.
        done = subprocess.run(
            [sys.executable, "-c", HOLDER.replace("wait=True", "wait=False"), str(tmp_path), repr(JOB.config)],
            capture_output=True,
            text=True,
        )
        assert f"process {os.getpid()} is writing" in done.stderr
        writer.write("one", [record(0)])


# -- readers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers(tmp_path, start):
    features = FeatureStore(store(tmp_path, count=20, shard_images=1), term="semantic")
    features.read(0)  # the parent has open files before it forks
    loader = DataLoader(features, batch_size=None, num_workers=2, multiprocessing_context=start)
    got = list(loader)
    assert len(got) == 20
    for i, tokens in enumerate(got):
        assert torch.equal(tokens.patches, features[i].patches) and torch.equal(tokens.prefix, features[i].prefix)


def test_pickles_and_threads(tmp_path):
    features = FeatureStore(store(tmp_path, count=20, shard_images=1))
    want = [features.read(i) for i in range(20)]
    copy, failures = pickle.loads(pickle.dumps(features)), []

    def reads(offset: int) -> None:
        for i in range(60):
            j = (7 * i + offset) % 20
            if not np.array_equal(copy.read(j), want[j]):
                failures.append(j)

    threads = [threading.Thread(target=reads, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_few_files_are_open_at_once(tmp_path):
    features = FeatureStore(store(tmp_path, count=80, shard_images=1))
    for i in range(80):
        features.read(i)
    links = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert sum(link.startswith(str(tmp_path)) for link in links) <= 64


def test_terms_that_are_not_there(tmp_path):
    store(tmp_path)
    with pytest.raises(StoreError, match="holds the terms raw, semantic, not 'denoised'"):
        FeatureStore(tmp_path, term="denoised")
    with pytest.raises(StoreError, match="not 'prefix'"):
        FeatureStore(tmp_path).read(0, "prefix")


# -- damage ---------------------------------------------------------------------------------------------------------


def test_what_is_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match="not a feature store"):
            FeatureStore(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match=r"other\.h5' is not a feature store"):
        FeatureStore(tmp_path)
    with pytest.raises(StoreError, match=r"other\.h5' is not a feature store"), StoreWriter(tmp_path, JOB):
        pass
    (tmp_path / "other.h5").unlink()
    os.mkfifo(tmp_path / "other.h5")
    with pytest.raises(StoreError, match="not a regular file"):
        FeatureStore(tmp_path)


def test_another_schema_is_refused_politely(tmp_path):
    path = shards(store(tmp_path))[0]
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = "dvt-features/2"
    with pytest.raises(StoreError, match="schema 'dvt-features/2'; this version of dvt reads 'dvt-features/1'"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 500, 0.5, 0.9, -1])
def test_truncated_shards_are_named(tmp_path, keep):
    path = shards(store(tmp_path))[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    for attempt in (FeatureStore, lambda folder: StoreWriter(folder, JOB).__enter__()):
        with pytest.raises(StoreError, match=f"{path.name}.*delete it and run the same command again"):
            attempt(tmp_path)
    assert list(damaged_shards(tmp_path)) == [path]
    path.unlink()
    assert store(tmp_path) and path.read_bytes() == content  # the same command makes it again


def test_a_flipped_bit_of_tokens_is_found(tmp_path):
    path = shards(store(tmp_path))[1]
    with h5py.File(path) as file:
        place = file["tokens/semantic"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 4
    path.write_bytes(content)
    features = FeatureStore(tmp_path, term="semantic")  # the index is whole
    assert features.verify() == [path] and "damaged" in damaged_shards(tmp_path)[path]
    with pytest.raises(StoreError, match=f"{path.name}.*damaged.*delete it and run the same command again"):
        list(features)


FLIPS = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
import test_store as t
path, rng = Path(sys.argv[1]), np.random.default_rng(int(sys.argv[3]))
good = path.read_bytes()
want = [t.FeatureStore(path).record(i) for i in range(3)]
attrs = t.FeatureStore(path).attrs
found = 0
for place in rng.integers(0, len(good), 400):
    bad = bytearray(good)
    bad[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(bad)
    try:
        if t.damaged_shards(path):
            raise t.StoreError("damaged")
        features = t.FeatureStore(path)
        got = [features.record(i) for i in range(3)]
    except t.DvtError:
        found += 1
        continue
    assert features.attrs == attrs, place
    for a, b in zip(got, want, strict=True):
        assert (a.path, a.sha256, a.size) == (b.path, b.sha256, b.size), place
        assert all(np.array_equal(a.terms[k], b.terms[k]) for k in b.terms), place
        assert np.array_equal(a.prefix, b.prefix), place
print(found)
"""


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    with StoreWriter(tmp_path, JOB) as writer:
        path = writer.write("one", [record(i) for i in range(3)])
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    command = [sys.executable, "-c", FLIPS, str(path), str(Path(__file__).parent), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)  # a crash of the library would be its exit code
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


# -- hostile files --------------------------------------------------------------------------------------------------


def replace(file: h5py.File, name: str, **options) -> h5py.Dataset:
    """The dataset again, made otherwise."""
    values = file[name][:]
    del file[name]
    return file.create_dataset(name, **{"data": values, "chunks": values.shape, "fletcher32": True, **options})


def external_link(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "secret.hdf", "w") as other:
        other.create_dataset("x", data=file["tokens/raw"][:], fletcher32=True, chunks=True)
    del file["tokens/raw"]
    file["tokens/raw"] = h5py.ExternalLink(str(folder / "secret.hdf"), "x")


def external_group(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "secret.hdf", "w") as other:
        file.copy("tokens", other)
    del file["tokens"]
    file["tokens"] = h5py.ExternalLink(str(folder / "secret.hdf"), "tokens")


def soft_link(file: h5py.File, folder: Path) -> None:
    file["tokens/residual"] = h5py.SoftLink("/tokens/raw")


def external_storage(file: h5py.File, folder: Path) -> None:
    shape = file["tokens/raw"].shape
    del file["tokens/raw"]
    file.create_dataset("tokens/raw", shape, "<f2", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "secret.hdf", "w") as other:
        other["x"] = file["tokens/raw"][:]
    layout = h5py.VirtualLayout(file["tokens/raw"].shape, "<f2")
    layout[:] = h5py.VirtualSource(str(folder / "secret.hdf"), "x", layout.shape)
    del file["tokens/raw"]
    file.create_virtual_dataset("tokens/raw", layout)


def change(name: str, at, value):
    def hostile(file: h5py.File, folder: Path) -> None:
        file[name][at] = value

    return hostile


def remake(name: str, **options):
    def hostile(file: h5py.File, folder: Path) -> None:
        replace(file, name, **options)

    return hostile


def huge(file: h5py.File, folder: Path) -> None:
    """Exabytes announced, nothing stored: reading it would fill the memory with zeros."""
    for name in ("raw", "semantic"):
        del file[f"tokens/{name}"]
        file.create_dataset(f"tokens/{name}", (1 << 44, 6), "<f2", chunks=(1 << 20, 6), fletcher32=True)
    file["index/offset"][-1] = 1 << 44
    file["index/grid"][-1] = (1 << 22, 1 << 22)


def never_written(file: h5py.File, folder: Path) -> None:
    """Zeros that nobody computed."""
    shape = file["tokens/raw"].shape
    del file["tokens/raw"]
    file.create_dataset("tokens/raw", shape, "<f2", chunks=shape, fletcher32=True)


def forged_config(file: h5py.File, folder: Path) -> None:
    file.attrs["config"] = file.attrs["config"].decode().replace('"seed":0', '"seed":1')


def number_for_text(file: h5py.File, folder: Path) -> None:
    file.attrs["schema"] = 1


def group_for_dataset(file: h5py.File, folder: Path) -> None:
    del file["tokens/raw"]
    file.create_group("tokens/raw")


def missing(name: str):
    def hostile(file: h5py.File, folder: Path) -> None:
        del file[name]

    return hostile


HOSTILE = {
    "external link": external_link,
    "external group": external_group,
    "soft link": soft_link,
    "external storage": external_storage,
    "virtual dataset": virtual,
    "announced, not stored": huge,
    "never written": never_written,
    "shuffled": remake("tokens/raw", shuffle=True),
    "compressed": remake("tokens/raw", compression="gzip"),
    "no checksum": remake("tokens/raw", fletcher32=False),
    "contiguous": remake("tokens/raw", fletcher32=False, chunks=None),
    "fewer rows": remake("tokens/raw", data=np.zeros((3, 6), "<f2"), chunks=(3, 6)),
    "more channels": remake("tokens/raw", data=np.zeros((28, 7), "<f2"), chunks=(28, 7)),
    "another rank": remake("tokens/raw", data=np.zeros(168, "<f2"), chunks=(168,)),
    "integers": remake("tokens/raw", data=np.zeros((28, 6), "<i2"), chunks=(28, 6)),
    "prefix of fewer images": remake("tokens/prefix", data=np.zeros((2, 1, 6), "<f2"), chunks=(2, 1, 6)),
    "offset backwards": change("index/offset", 1, -6),
    "offset beyond": change("index/offset", -1, 999),
    "offset not from zero": change("index/offset", 0, 1),
    "grid of zero": change("index/grid", 0, (0, 3)),
    "grid that overflows": change("index/grid", 0, (1 << 40, 1 << 40)),
    "negative size": change("index/size", 0, (-1, 3)),
    "float grid": remake("index/grid", dtype="<f8"),
    "short index": remake("index/sha256", data=np.array([b"a" * 64]), chunks=(1,)),
    "bad hash": change("index/sha256", 0, b"../../etc/passwd"),
    "empty path": change("index/path", 0, b""),
    "forged config": forged_config,
    "number for text": number_for_text,
    "group for dataset": group_for_dataset,
    "no index": missing("index"),
    "no offsets": missing("index/offset"),
    "no tokens": missing("tokens"),
    "artifact of another grid": lambda file, _: file.create_dataset(
        "artifact", data=np.zeros((9, 9, 6), "<f2"), fletcher32=True, chunks=(9, 9, 6)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    with StoreWriter(tmp_path / "store", JOB) as writer:
        path = writer.write("one", [record(i) for i in range(3)])
    with h5py.File(path, "r+") as file:
        HOSTILE[name](file, tmp_path)
    for attempt in (FeatureStore, lambda folder: StoreWriter(folder, JOB).__enter__()):
        with pytest.raises(StoreError, match=r"one\.h5"):
            attempt(tmp_path / "store")
    assert list(damaged_shards(tmp_path / "store")) == [path]


def test_the_hostile_files_start_from_a_good_one(tmp_path):
    """Rewriting with h5py alone is not what is refused above."""
    with StoreWriter(tmp_path, JOB) as writer:
        path = writer.write("one", [record(i) for i in range(3)])
    with h5py.File(path, "r+") as file:
        replace(file, "tokens/raw")
        replace(file, "index/grid")
        file["index/size"][0] = (7, 7)
    assert FeatureStore(tmp_path).record(0).size == (7, 7) and issubclass(StoreError, DvtError)


ZEROED = """
import sys
from dvt.errors import StoreError
from dvt.store import FeatureStore
try:
    FeatureStore(sys.argv[1])
except StoreError as error:
    print(error)
"""


def test_a_zeroed_heap_of_an_older_shard_does_not_hang(tmp_path):
    """Attributes once had no fixed length; HDF5 reads such text from a heap, and walks for ever in a damaged one."""
    with StoreWriter(tmp_path, JOB) as writer:
        path = writer.write("one", [record(0)])
    assert b"GCOL" not in path.read_bytes()
    with h5py.File(path, "r+") as file:
        texts = {name: file.attrs[name].decode() for name in file.attrs}
        for name, text in texts.items():
            del file.attrs[name]
            file.attrs.create(name, text, dtype=h5py.string_dtype())
    assert FeatureStore(path).attrs == {name: text for name, text in texts.items() if name != "checksum"}
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL") + 16
    for start in (heap, heap + 16 + 8 * -(-int.from_bytes(content[heap + 8 : heap + 16], "little") // 8)):
        path.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
        command = [sys.executable, "-c", ZEROED, str(path)]
        assert "heap of text is not whole" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("name", ["index/path", "index/grid", "tokens/raw"])
def test_other_types_are_refused_before_they_are_read(tmp_path, name):
    with StoreWriter(tmp_path, JOB) as writer:
        path = writer.write("one", [record(0)])
    with h5py.File(path, "r+") as file:
        shape, kind = file[name].shape, np.dtype([("a", "<f2"), ("b", "<i8")])
        replace(file, name, data=np.ones(shape, kind))
    with pytest.raises(StoreError, match=f"/{name} is of type "):
        FeatureStore(path)


def test_a_shard_that_another_program_writes_to_is_not_called_damaged(tmp_path):
    (shard,) = shards(store(tmp_path / "store", 1))
    hold = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); file.flush(); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, shard], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(StoreError, match="open for writing in another program") as refused:
            FeatureStore(tmp_path / "store")
        other.communicate(b"\n")
    assert "delete" not in str(refused.value) and "damaged" not in str(refused.value)
    assert len(FeatureStore(tmp_path / "store")) == 1
