"""Several jobs on one store, clocks that go backwards, and memory that does not suffice."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from dvt.store import FeatureStore


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


KINDS = [("extract", "cpu"), ("denoise", "cuda"), slow("extract", "cuda"), slow("denoise", "cpu")]


@pytest.fixture
def commands(extract_command, denoise_command):
    return {"extract": extract_command, "denoise": denoise_command}


def holders(folder):
    """The processes that hold the lock of a store, as the kernel lists them."""
    try:
        inode = (folder / "writer.lock").stat().st_ino
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except FileNotFoundError:
        return []
    mine = [line for line in lines if "->" not in line and line[5].rpartition(":")[2] == str(inode)]
    return [int(line[4]) for line in mine if line[1] == "POSIX" and line[3] == "WRITE"]


def watched(folder, dvt_command, started):
    """The ends of jobs; meanwhile no more than one holds the lock, and no more than one shard is being written."""
    seen = set()
    while any(Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" for each in started):
        now = holders(folder)
        assert len(now) <= 1 and len(list(folder.glob("*.part"))) <= 2  # a shard and the settings
        assert len(list(folder.glob("*.h5.*.part"))) <= 1
        seen.update(now)
        time.sleep(0.002)
    assert seen <= {each.pid for each in started}
    return [dvt_command.wait(each) for each in started], seen


def wait_until(condition, seconds=60.0):
    """Until something is so; a test that waits in vain fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# -- many jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("extract", 5), ("denoise", 2), slow("extract", 2), slow("denoise", 5)])
def test_jobs_that_start_together_and_wait_do_the_work_once(
    name, count, commands, photos, tmp_path, dvt_command, contents, leftovers
):
    make = commands[name]
    dvt_command(make(photos, tmp_path / "whole"))
    started = [dvt_command.start(make(photos, tmp_path / "out", "--wait", "--json")) for _ in range(count)]
    ended, seen = watched(tmp_path / "out", dvt_command, started)
    assert [each.code for each in ended] == [0] * count, ended
    assert sorted(each.result["done"] for each in ended) == [0] * (count - 1) + [12]
    assert len(seen) > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and leftovers(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("name", "count"), [("extract", 5), slow("extract", 2), slow("denoise", 2), slow("denoise", 5)]
)
def test_jobs_that_start_together_and_do_not_wait_are_refused_but_one(
    name, count, commands, photos, tmp_path, dvt_command, contents, leftovers
):
    make = commands[name]
    dvt_command(make(photos, tmp_path / "whole"))
    slowly = {"at": "*.h5.*.part", "do": ["sleep", 1.5]}  # so that all of them meet it
    started = [dvt_command.start(make(photos, tmp_path / "out", "--no-wait"), slowly) for _ in range(count)]
    ended, seen = watched(tmp_path / "out", dvt_command, started)
    assert sorted(each.code for each in ended) == [0] + [2] * (count - 1), ended
    (writer,) = seen
    for each, running in zip(ended, started, strict=True):
        assert (each.code == 0) == (running.pid == writer)
        assert each.code == 0 or f"process {writer} is writing to the store" in each.text
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["extract", slow("denoise")])
def test_a_job_that_waits_goes_on_when_the_holder_is_killed(
    name, commands, photos, tmp_path, dvt_command, contents, shards, leftovers
):
    make, out = commands[name], tmp_path / "out"
    dvt_command(make(photos, tmp_path / "whole"))
    holder = dvt_command.start(make(photos, out), {"at": "*.h5.*.part", "nth": 3, "do": ["sleep", 600]})
    wait_until(lambda: len(shards(out)) == 2)
    waiting = [dvt_command.start(make(photos, out, "--json")) for _ in range(2)]
    time.sleep(0.7)
    assert holders(out) == [holder.pid]
    before = shards(out)
    assert len(before) == 2
    holder.kill()
    ended, _ = watched(out, dvt_command, [holder, *waiting])
    assert [each.code for each in ended] == [-9, 0, 0]
    assert sorted(each.result["done"] for each in ended[1:]) == [0, 8]
    assert {shard: shards(out)[shard] for shard in before} == before
    assert contents(out) == contents(tmp_path / "whole") and leftovers(out) == []


@pytest.mark.parametrize("other", ["another layer", slow("another command")])
def test_of_two_different_jobs_one_is_refused(other, commands, photos, tmp_path, dvt_command, contents):
    out, different = tmp_path / "out", {"another layer": ("extract", "--layer", 1), "another command": ("denoise",)}
    name, *more = different[other]
    jobs = [commands["extract"](photos, out), commands[name](photos, out, *more)]
    started = [dvt_command.start(job) for job in jobs]
    ended, _ = watched(out, dvt_command, started)
    assert sorted(each.code for each in ended) == [0, 2], ended
    winner = next(i for i in (0, 1) if ended[i].code == 0)
    loser = ended[1 - winner].text
    assert "another job's tokens" in loser and "choose another output folder" in loser
    jobs[winner][jobs[winner].index(out)] = tmp_path / "alone"
    dvt_command(jobs[winner])
    assert contents(out) == contents(tmp_path / "alone")


def test_a_store_that_another_job_made_anew_is_left_to_it(extract_command, photos, tmp_path, dvt_command, contents):
    """The folder is moved away under a running job, and another job takes its name: the first has lost its lock."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    pauses = {"at": "*.h5.*.part", "nth": 3, "do": ["sleep", 3]}
    first = dvt_command.start(extract_command(photos, out), pauses)
    wait_until(lambda: len(list(out.glob("*.h5"))) == 2)
    os.rename(out, moved)
    dvt_command(extract_command(photos, out, "--layer", 1))
    before = contents(out)
    refused = dvt_command.wait(first)
    assert contents(out) == before, "two jobs have written to one store"
    assert refused.code == 2 and str(out) in refused.text


def test_two_trainings_of_one_file(train_command, tmp_path, dvt_command):
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    dvt_command(train_command(tmp_path / "whole" / "d.safetensors"))
    pauses = {"at": "step-*.part", "nth": 2, "do": ["sleep", 6]}
    first = dvt_command.start(train_command(tmp_path / "out" / "d.safetensors"), pauses)
    wait_until(lambda: list((tmp_path / "out" / "d.run").glob("step-????????")))
    refused = dvt_command(train_command(tmp_path / "out" / "d.safetensors"), expect=2)
    assert "another process trains in" in refused.text
    dvt_command.wait(first, expect=0)
    files = [(tmp_path / name / "d.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


# -- clocks -----------------------------------------------------------------------------------------------------------


def set_times(folder, moment):
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (moment, moment), follow_symlinks=False)


@pytest.mark.parametrize("name", ["extract", slow("denoise")])
def test_a_clock_that_goes_backwards(name, commands, photos, tmp_path, dvt_command, contents, shards):
    """While the command runs, between two runs, and in the times of all files: nothing depends on it."""
    make, out = commands[name], tmp_path / "out"
    dvt_command(make(photos, tmp_path / "whole"))
    dvt_command(make(photos, out), {"kill": 18, "under": str(tmp_path / "out")}, expect=-9)
    before = shards(out)
    assert 0 < len(before) < 6
    set_times(out, 0)
    set_times(photos, 4e9)
    ended = dvt_command(make(photos, out, "--json"), {"clock": 3600.0})
    assert ended.result["done"] == 12 - 2 * len(before)
    assert contents(out) == contents(tmp_path / "whole") and shards(out).keys() == shards(tmp_path / "whole").keys()
    set_times(out, 4e9)
    set_times(photos, 0)
    assert dvt_command(make(photos, out, "--json"), {"clock": 1e6}).result["done"] == 0


def test_training_with_a_clock_that_goes_backwards(train_command, tmp_path, dvt_command):
    """The newest checkpoint is the one of the highest step, not the one with the latest time."""
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    dvt_command(train_command(tmp_path / "whole" / "d.safetensors"))
    out = tmp_path / "out" / "d.safetensors"
    dvt_command(train_command(out), {"kill": 60, "under": str(tmp_path / "out")}, expect=-9)
    first, second = sorted((tmp_path / "out" / "d.run").glob("step-????????"))[-2:]
    set_times(tmp_path / "out", 1e9)
    set_times(first, 4e9)
    set_times(second, 0)
    dvt_command(train_command(out), {"clock": 3600.0})
    assert out.read_bytes() == (tmp_path / "whole" / "d.safetensors").read_bytes()
    log = [path.read_text() for path in sorted(tmp_path.glob("*/d.run/log.csv"))]
    assert log[0] == log[1]


# -- memory -----------------------------------------------------------------------------------------------------------


def close(folder, other):
    """That two stores hold the same tokens, to the rounding of other batches."""
    stores = FeatureStore(folder), FeatureStore(other)
    assert stores[0].images == stores[1].images and stores[0].terms == stores[1].terms
    for i in range(len(stores[0])):
        for term in stores[0].terms:
            one, two = (store.read(i, term).astype(np.float32) for store in stores)
            np.testing.assert_allclose(one, two, rtol=4e-3, atol=4e-3 * np.abs(two).max())


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_with_memory_for_half_a_batch_the_job_is_done(name, kind, commands, photos, tmp_path, dvt_command, leftovers):
    make = commands[name]
    dvt_command(make(photos, tmp_path / "whole", batch=4, shard=4))
    ended = dvt_command(make(photos, tmp_path / "out", batch=4, shard=4), {"memory": 2, "kind": kind})
    assert "out of memory" in ended.text.lower() and "half" in ended.text
    assert leftovers(tmp_path / "out") == []
    close(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_with_less_memory_the_batch_is_blamed_and_a_smaller_one_finishes(
    name, kind, commands, photos, tmp_path, dvt_command, leftovers
):
    make, out, little = commands[name], tmp_path / "out", {"memory": 1, "kind": kind}
    dvt_command(make(photos, tmp_path / "whole", batch=1, shard=4))
    refused = dvt_command(make(photos, out, batch=4, shard=4), little, expect=2)
    assert "batch" in refused.text and "memory" in refused.text
    assert leftovers(out) == []
    dvt_command(make(photos, out, batch=1, shard=4), little)
    close(out, tmp_path / "whole")
