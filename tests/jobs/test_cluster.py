"""The same jobs on a local Ray cluster: the same bytes as one process, whatever dies, and where the shards go."""

import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from dvt.backbones import load_backbone
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.errors import ConfigError, ImageError, StoreError
from dvt.fields import LinearConfig
from dvt.fields.config import DenoiseConfig
from dvt.fields.images import DecomposeWork
from dvt.images import find_images, find_sources
from dvt.jobs import cluster
from dvt.jobs.extract import ExtractConfig, ExtractWork
from dvt.jobs.run import run
from dvt.store import FeatureStore, Job, Record, StoreWriter, read_index
from dvt.store.remote import ShardTarget
from dvt.views import ViewConfig

ray = pytest.importorskip("ray")

SMALL = ExtractConfig(batch=2, shard_images=2, workers=2)
STAGE_ONE = DenoiseConfig(views=ViewConfig(count=7, batch=4), linear=LinearConfig(resolution=12, smoothness=0.05))


@pytest.fixture(scope="module")
def local():
    """A Ray of this machine with more cores than it has; the tests' actors are idle most of the time."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path, photo):
    """Ten photographs of two grid shapes, two of them copies of others, and two files that are none."""
    pixels = (photo * 255).byte().permute(1, 2, 0).numpy()
    (tmp_path / "in").mkdir()
    for i in range(10):
        height, width = [(160, 160), (160, 240)][i % 2]
        Image.fromarray(pixels[7 * i : 7 * i + height, 9 * i : 9 * i + width]).save(tmp_path / f"in/{i:02}.png")
    shutil.copy(tmp_path / "in/00.png", tmp_path / "in/copy.png")
    (tmp_path / "in/empty.png").touch()
    (tmp_path / "in/torn.png").write_bytes((tmp_path / "in/03.png").read_bytes()[:3000])
    return tmp_path / "in"


@pytest.fixture
def backbone(tiny_backbone):
    """Makes the tiny backbone, of the same weights in every process."""
    weights = {name: values.clone() for name, values in tiny_backbone.model.state_dict().items()}
    return lambda: load_backbone("test_vit", weights=weights, size=96)


@pytest.fixture
def extraction(backbone):
    """Makes an extraction with a denoiser."""
    denoiser = Denoiser(DenoiserConfig("block", 64, grid=(6, 6)), torch.Generator().manual_seed(0)).eval()
    return lambda: ExtractWork(backbone(), SMALL, denoiser)


def shards(out):
    """The bytes of each file in a store but the lock's and the settings'."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(out).iterdir()}
    return {name: value for name, value in found.items() if name != "writer.lock"}


def same(first, second):
    assert shards(first) == shards(second)
    assert all(name.endswith(".h5") for name in shards(first)) and len(shards(first)) > 1


def summary_of(summary):
    return summary.done, summary.skipped, sorted(summary.failed), summary.shards


# -- the same bytes ---------------------------------------------------------------------------------------------------


def test_two_workers_extract_what_one_process_does(local, extraction, folder, tmp_path):
    progress, jobs, images = [], [], find_images([folder])
    alone = run(extraction(), images, tmp_path / "one")
    options = {"workers": 2, "started": jobs.append, "progress": lambda *step: progress.append(step)}
    together = cluster.run(extraction, images, tmp_path / "two", **options)
    same(tmp_path / "one", tmp_path / "two")
    assert summary_of(together) == summary_of(alone) and together.done == 11
    assert [Path(path).name for path, _ in together.failed] == ["empty.png", "torn.png"]
    assert jobs == [extraction().job]
    looked, extracted = ([step[1:] for step in progress if step[0] == verb] for verb in ("look", "extract"))
    assert looked[-1] == (13, 13) and extracted[-1] == (12, 12)  # the empty one is not in the plan
    assert [done for done, _ in looked] == sorted(done for done, _ in looked)


def arrays(out):
    """Every stored number, by path."""
    store = FeatureStore(out)
    found = {}
    for i, path in enumerate(store.images):
        record, artifact = store.record(i), store.artifact(i)
        terms = {**record.terms, "prefix": record.prefix, **({} if artifact is None else {"shared": artifact})}
        found[path] = {name: (values.dtype.name, values.tobytes()) for name, values in terms.items()}
    return found


@pytest.mark.slow
def test_a_shared_artifact_summed_over_workers_is_that_of_one_process(local, backbone, folder, tmp_path):
    config = replace(STAGE_ONE, shared_artifact=True, shared_images=5)

    def make():
        return DecomposeWork(backbone(), config, keep_terms=True, shard_images=2)

    images, progress = find_images([folder]), []
    alone = run(make(), images, tmp_path / "one")
    url = f"file://{tmp_path}/two"
    together = cluster.run(make, images, url, workers=2, progress=lambda *step: progress.append(step))
    same(tmp_path / "one", tmp_path / "two")
    assert summary_of(together) == summary_of(alone)
    assert [step for step in progress if step[0] == "artifact"] == [("artifact", i, 10) for i in range(1, 11)]
    assert any("shared" in terms for terms in arrays(tmp_path / "two").values())
    # The artifact comes from the shards that are left: with other images first, a new one would be another.
    last = {FeatureStore(path).grids[0]: path for path in sorted((tmp_path / "two").glob("*.h5"))}
    assert sorted(last) == [(6, 6), (6, 9)]
    for path in last.values():
        path.unlink()
    images = find_images([save_added(folder)])
    run(make(), images, tmp_path / "one")
    progress.clear()
    assert cluster.run(make, images, url, workers=1, progress=lambda *step: progress.append(step)).done >= 4
    assert not [step for step in progress if step[0] == "artifact"]
    assert arrays(tmp_path / "one") == arrays(tmp_path / "two")


def save_added(folder):
    """Photographs that come before all others, one of each grid shape."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0.png")
    Image.fromarray(noise[:, :160]).save(folder / "00.bmp")
    return folder


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_address_where_no_cluster_is_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        free = busy.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}", "nonsense", "host:", "127.0.0.1:99999"):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"HOST:PORT"):
            cluster.run(lambda: None, [], "out", address=address)
        assert time.monotonic() - start < 5
    for bad in ({"workers": 0}, {"threads": 0}):
        with pytest.raises(ConfigError, match="1 or more"):
            cluster.run(lambda: None, [], "out", address="local", **bad)


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"denoising-vit\[cluster\]"):
        cluster.run(lambda: None, [], "out")


# -- targets ----------------------------------------------------------------------------------------------------------

JOB = Job("vit", "ab")


def write_store(folder, job=JOB):
    records = [
        Record(f"{i}.png", hashlib.sha256(bytes([i])).hexdigest(), (9, 9), {"raw": np.full((2, 3, 4), i, np.float32)})
        for i in range(3)
    ]
    with StoreWriter(folder, job) as writer:
        return writer.write("shard-0", records, artifact=np.ones((2, 3, 4), np.float32)), records


def test_a_shard_behind_a_url_is_read_as_one_on_disk(tmp_path):
    path, records = write_store(tmp_path / "store")
    target = ShardTarget(f"file://{tmp_path}/store")
    assert target.shards() == ["shard-0"]
    index = target.index("shard-0", artifact=True)
    assert (
        index.job == JOB
        and index.images == [(record.path, record.sha256) for record in records]
        and index.grid == (2, 3)
    )
    np.testing.assert_array_equal(index.artifact, np.ones((2, 3, 4)))
    assert target.index("shard-0").artifact is None
    content = path.read_bytes()
    for damage in (content[:-100], content.replace(b"dvt-features/1", b"dvt-features/7"), b"x" * 999):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match=r"shard-0.h5"):
            target.index("shard-0")
    assert ShardTarget(f"file://{tmp_path}/none").shards() == []


def test_an_index_costs_few_bytes(tmp_path):
    """A store of millions of shards is resumed by reading their indices alone."""
    values = np.random.default_rng(0).normal(size=(64, 37, 37, 96)).astype(np.float32)
    records = [
        Record(f"{i}.png", hashlib.sha256(bytes([i])).hexdigest(), (9, 9), {"raw": values[i]}) for i in range(64)
    ]
    with StoreWriter(tmp_path, JOB) as writer:
        path = writer.write("shard-0", records)
    read = []

    class Watched(io.BytesIO):
        def readinto(self, buffer):
            read.append(len(buffer))
            return super().readinto(buffer)

    assert len(read_index(Watched(path.read_bytes()), "shard-0").images) == 64
    assert sum(read) < 0.02 * path.stat().st_size and len(read) > 3


def test_a_shard_put_twice_is_one_shard_and_no_other_file_is_left(tmp_path):
    path, _ = write_store(tmp_path / "store")
    for target in (ShardTarget(f"file://{tmp_path}/a"), ShardTarget("memory://bucket/b")):
        for _ in range(2):
            target.put_shard("shard-0", path.read_bytes())
        assert target.shards() == ["shard-0"]
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["shard-0.h5"]
    assert fsspec.filesystem("memory").ls("/bucket/b", detail=False) == ["/bucket/b/shard-0.h5"]


@pytest.mark.parametrize("url", ["foo://x", "file:///proc/nothing/here"])
def test_a_target_that_cannot_be_written_is_a_store_error(url):
    with pytest.raises(StoreError, match=r"cannot write"):
        ShardTarget(url).put_shard("shard-0", b"x")


# -- slow: everything that starts many workers ------------------------------------------------------------------------


class Slow(ExtractWork):
    """An extraction that takes a while and notes which process computes what."""

    def __init__(self, *args, notes, seconds):
        super().__init__(*args)
        self.notes, self.seconds = notes, seconds

    def make(self, shards, tick=lambda: None):
        for shard, artifact in shards:
            with open(self.notes, "a") as file:
                file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()} {shard.name}\n")
            time.sleep(self.seconds)
            if any(Path(path).name == "poison.png" for path, _, _ in shard.images):
                os._exit(1)
            yield from super().make([(shard, artifact)], tick)


@pytest.fixture
def slow(backbone, tmp_path):
    """Makes an extraction of half a second a shard; the classes of this file go to the workers by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    notes = tmp_path / "notes"
    notes.touch()
    yield lambda: Slow(backbone(), SMALL, None, notes=notes, seconds=0.5), notes
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def pids(notes):
    return [int(line.split()[0]) for line in notes.read_text().splitlines()]


@contextlib.contextmanager
def meanwhile(work):
    """Something that goes on in a thread until the block ends."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_workers_killed_at_random_moments_change_nothing(local, slow, backbone, folder, tmp_path):
    make, notes = slow
    images, killed = find_images([folder]), []
    run(ExtractWork(backbone(), SMALL, None), images, tmp_path / "one")
    draw = random.Random(0)

    def kill(over):
        while not over.is_set() and len(killed) < 4:
            time.sleep(draw.uniform(0.1, 1))
            alive = [pid for pid in dict.fromkeys(pids(notes)) if pid not in killed and os.path.exists(f"/proc/{pid}")]
            if alive:
                killed.append(draw.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    with meanwhile(kill):
        summary = cluster.run(make, images, tmp_path / "two", workers=3)
    assert len(killed) >= 2 and summary.done == 11
    assert [Path(path).name for path, _ in summary.failed] == ["empty.png", "torn.png"]
    same(tmp_path / "one", tmp_path / "two")
    assert set(pids(notes)) > set(killed)  # others came in their places

    for path in sorted((tmp_path / "two").glob("*.h5"))[::2]:
        path.unlink()
    images = find_images([save_added(folder)])
    cluster.run(make, images, tmp_path / "two", workers=2)
    run(ExtractWork(backbone(), SMALL, None), images, tmp_path / "one")
    assert arrays(tmp_path / "one") == arrays(tmp_path / "two")


@pytest.mark.slow
def test_what_kills_its_worker_each_time_is_reported_and_the_rest_is_stored(local, slow, folder, tmp_path):
    make, _ = slow
    Image.new("RGB", (160, 160), (200, 9, 9)).save(folder / "poison.png")
    summary = cluster.run(make, find_images([folder]), tmp_path / "two", workers=2)
    reasons = {Path(path).name: reason for path, reason in summary.failed}
    poisoned = [name for name, reason in reasons.items() if "died 3 times" in reason]
    assert "poison.png" in poisoned and len(poisoned) <= 2  # its shard's other image with it
    assert set(reasons) - set(poisoned) == {"empty.png", "torn.png"} and summary.done == 12 - len(poisoned)
    store = FeatureStore(tmp_path / "two")
    assert len(store) == summary.done and not store.verify()


@pytest.mark.slow
def test_a_work_that_cannot_be_made_or_read_ends_the_run(local, extraction, folder, tmp_path):
    def refuse():
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        cluster.run(refuse, find_images([folder]), tmp_path / "two", workers=1)

    def strict():
        work = extraction()
        work.strict = True
        return work

    with pytest.raises(ImageError, match=r"empty.png|torn.png"):
        cluster.run(strict, find_images([folder]), tmp_path / "two", workers=1)
    write_store(tmp_path / "three")
    for out in (tmp_path / "three", f"file://{tmp_path}/three"):
        with pytest.raises(StoreError, match="another job"):
            cluster.run(extraction, find_images([folder]), out, workers=1)
    with StoreWriter(tmp_path / "four", JOB), pytest.raises(StoreError, match="already writing"):
        cluster.run(extraction, find_images([folder]), tmp_path / "four", workers=1)
    assert not list((tmp_path / "four").glob("*.h5*"))


@pytest.fixture
def s3(monkeypatch, folder):
    """An S3 server of this machine with the photographs in it, and how to reach it."""
    server = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs").ThreadedMotoServer(port=0)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    access = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in access.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem()
    files.mkdir("photos")
    files.mkdir("features")
    files.put(f"{folder}/", "photos/in/", recursive=True)
    yield files, access
    server.stop()


@pytest.mark.slow
def test_from_a_bucket_to_a_bucket(local, extraction, s3, tmp_path):
    files, access = s3

    def make():
        os.environ.update(access)  # as a cluster's nodes have it
        return extraction()

    images = find_sources(["s3://photos/in/"])
    assert len(images) == 13 and images[0] == "s3://photos/in/00.png"
    alone = run(extraction(), images, tmp_path / "one")
    for expected in (alone.shards, 1):
        assert cluster.run(make, images, "s3://features/run", workers=2).shards == expected
        files.invalidate_cache()
        assert len(files.ls("features/run")) == alone.shards
        files.get("features/run/", f"{tmp_path}/two/", recursive=True)
        same(tmp_path / "one", tmp_path / "two")
        files.rm(files.ls("features/run")[0])
    files.pipe_file(files.ls("features/run")[0], b"damage")
    with pytest.raises(StoreError, match=r"s3://features/run/shard-.*damaged"):
        cluster.run(make, images, "s3://features/run", workers=1)


# -- slow: nodes, in processes of their own ---------------------------------------------------------------------------

NODES = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from cluster_slow_work import make
from dvt.jobs import cluster
from dvt.images import find_images

folder, out, notes, what = sys.argv[1:]
store = {"object_store_memory": 100 << 20}
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
second = nodes.add_node(num_cpus=2, **store) if what == "kill" else None
nodes.wait_for_nodes()

def lines():
    return [line.split() for line in Path(notes).read_text().splitlines()]

def meddle(verb, done, total):
    # Called by the driver after a step, in the main thread, where alone Ray starts nodes.
    others = {int(pid) for pid, node, _ in lines() if node != head}
    if what == "kill" and others and len(nodes.worker_nodes) == 1:
        nodes.remove_node(second, allow_graceful=False)
        for pid in others:  # on its own, a worker might still end what it is at
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if what == "add" and verb == "denoise" and not nodes.worker_nodes:
        nodes.add_node(num_cpus=1, **store)

ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
head = ray.get_runtime_context().get_node_id()
summary = cluster.run(make(notes), find_images([folder]), out, progress=meddle)
ray.shutdown()
nodes.shutdown()
print(summary.done, summary.shards, len(summary.failed), head)
"""

WORK = """
import os, time
import ray, torch
from dvt.backbones import load_backbone
from dvt.fields.images import DecomposeWork
from dvt.fields.shared import SharedArtifact
from dvt.fields import LinearConfig
from dvt.fields.config import DenoiseConfig
from dvt.views import ViewConfig

CONFIG = DenoiseConfig(
    views=ViewConfig(count=7, batch=4),
    linear=LinearConfig(resolution=12, smoothness=0.05),
    shared_artifact=True,
    shared_images=5,
)

class Slow(DecomposeWork):
    def note(self, what):
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()} {ray.get_runtime_context().get_node_id()} {what}\\n")
        time.sleep(float(os.environ["SECONDS"]))

    def make(self, shards, tick=lambda: None):
        for shard, artifact in shards:
            self.note(shard.name)
            yield from super().make([(shard, artifact)], tick)

class SlowSums(SharedArtifact):
    def part(self, image):
        if self.during == "sums":
            self.note("equations")
        return super().part(image)

def work(weights, notes):
    backbone = load_backbone("test_vit", weights=torch.load(weights), size=96)
    made = Slow(backbone, CONFIG, shard_images=1)
    made.notes, made.during = notes, os.environ["DURING"]
    made.reduction = SlowSums(backbone, CONFIG)
    made.reduction.note, made.reduction.during = made.note, made.during
    return made

def make(notes):
    from functools import partial

    return partial(work, os.environ["WEIGHTS"], notes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "kill during sums", "add"])
def test_a_node_may_die_or_come_in_mid_run(backbone, folder, tmp_path, what):
    config = replace(STAGE_ONE, shared_artifact=True, shared_images=5)
    run(DecomposeWork(backbone(), config, shard_images=1), find_images([folder]), tmp_path / "one")
    torch.save(backbone().model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "cluster_slow_work.py").write_text(WORK)
    (tmp_path / "nodes.py").write_text(NODES)
    notes = tmp_path / "notes"
    notes.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WEIGHTS": str(tmp_path / "weights.pt"),
        "SECONDS": "4" if what == "add" else "0.7",  # a worker takes a while to come up
        "DURING": "sums" if "sums" in what else "shards",
    }
    command = [sys.executable, str(tmp_path / "nodes.py"), str(folder), str(tmp_path / "two"), str(notes)]
    ended = subprocess.run([*command, what.split()[0]], env=environment, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    done, stored, failed, head = ended.stdout.split()[-4:]
    assert (done, failed) == ("11", "2") and int(stored) > 1
    same(tmp_path / "one", tmp_path / "two")
    nodes = [line.split()[1] for line in notes.read_text().splitlines()]
    assert head in nodes and len(set(nodes)) == 2
    if what == "kill":  # what it was at was done again
        calls = [line.split()[2] for line in notes.read_text().splitlines()]
        assert len(calls) > len(set(calls))
