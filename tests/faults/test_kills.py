"""SIGKILL at random moments, at every change of the disk and in the middle of writes: nothing committed is ever lost.

After each kill whatever has its name is whole, and the same command, let alone, ends with the bytes of a run that was
never disturbed.
"""

import json
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dvt.store import damaged_shards


@dataclass
class StoreJob:
    """A command that fills a store: how to start it, what it has committed, and what it ends with."""

    make: object
    photos: Path
    more: tuple
    contents: object
    shards: object

    def arguments(self, folder):
        return self.make(self.photos, folder / "store", *self.more)

    def check(self, folder, before):
        """Every shard is whole; those that were there are there as they were. Returns what is there now."""
        now = self.shards(folder / "store")
        assert damaged_shards(folder / "store") == {}
        assert {name: now.get(name) for name in before} == before
        if (folder / "store" / "config.json").exists():
            self.settings(folder)
        return now

    def settings(self, folder):
        settings = json.loads((folder / "store" / "config.json").read_text())
        return {name: value for name, value in settings.items() if name != "out"}

    def result(self, folder):
        return self.contents(folder / "store"), sorted(self.shards(folder / "store")), self.settings(folder)


@dataclass
class TrainJob:
    """The same for the commands that train: a folder of checkpoints, and a file of weights at the end."""

    make: object
    out: str = "denoiser.safetensors"
    run: str = "denoiser.run"
    weights: str = "denoiser.safetensors"

    def arguments(self, folder):
        return self.make(folder / self.out)

    def check(self, folder, before):
        """Every checkpoint is whole, and the newest one is not older than before. Returns the newest one's step."""
        checkpoints = sorted((folder / self.run).glob("step-????????"))
        for checkpoint in checkpoints:
            assert json.loads((checkpoint / "state.json").read_text())["step"] == int(checkpoint.name[5:])
            assert all(load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema", "optimizer"))
        if (folder / self.weights).exists():
            assert load_file(folder / self.weights)
        step = int(checkpoints[-1].name[5:]) if checkpoints else 0
        assert step >= (before or 0)
        return step

    def result(self, folder):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
        pictures = [path for path in files if path.parent.name == "samples"]
        for early in pictures[:-1]:  # of a checkpoint that a kill came after, there may be none
            files.remove(early)
        return {str(path.relative_to(folder)): self.content(path, folder) for path in files}

    def content(self, path, folder):
        """Read a file's bytes, without the folder's name; of weights the tensors, as some metadata have any order."""
        if path.suffix != ".safetensors":
            return path.read_bytes().replace(bytes(folder), b"")
        return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


@dataclass
class FileJob:
    """The same for commands that write one file at the end, and what they keep on the way."""

    make: object
    out: str

    def arguments(self, folder):
        return self.make(folder / self.out)

    def check(self, folder, before):
        """The file is whole or absent, and stays. Returns whether it is there."""
        there = (folder / self.out).exists()
        assert there or not before
        return there and bool(self.content(folder))

    def content(self, folder):
        """The file's bytes; of JSON, the scores."""
        content = (folder / self.out).read_bytes()
        return json.loads(content)["rows"] if self.out.endswith(".json") else content

    def result(self, folder):
        """Return the kinds, too, of what is kept beside it: names and bytes there may follow from the folder's."""
        return self.content(folder), sorted(path.suffix for path in folder.rglob("*") if path.suffix != ".lock")


@pytest.fixture
def jobs(
    extract_command, denoise_command, train_command, denoiser_file, photos, save_photos, tmp_path, contents, shards,
    distill_command, prior_command, probe_command, backbone_options, request,
):  # fmt: skip
    """By name, the jobs that are killed."""
    few = save_photos(tmp_path / "few", 6)
    stores = {
        "extract": (extract_command, ()),
        "extract with a denoiser": (extract_command, ("--denoiser", denoiser_file)),
        "denoise": (denoise_command, ()),
        "denoise with pictures": (denoise_command, ("--pictures", "--upsample", 2)),
        "denoise with a shared artifact": (denoise_command, ("--shared-artifact", "--keep-terms")),
    }
    found = {
        name: StoreJob(make, few if name in RARE else photos, more, contents, shards)
        for name, (make, more) in stores.items()
    }

    def sample(out):  # the run is made where it is needed
        return ["prior", "sample", request.getfixturevalue("finished_run"), "--count", 1, "--images", 1, "--out", out]

    files = {
        "probe": FileJob(probe_command, "probe.json"),
        "export": FileJob(lambda out: ["export", *backbone_options, "--grid", "fixed", "--out", out], "tiny.pt2"),
        "prior sample": FileJob(sample, "samples.png"),
    }
    runs = {
        "train": TrainJob(train_command),
        "distill": TrainJob(distill_command, "b.safetensors", "b.run", "b.safetensors"),
        "prior train": TrainJob(prior_command, "run", "run", "run/prior.safetensors"),
    }
    return {**found, **files, **runs}


@pytest.fixture(scope="session")
def finished_run(dvt_command, prior_command, tmp_path_factory):
    """The folder of a prior."""
    out = tmp_path_factory.mktemp("prior") / "run"
    dvt_command(prior_command(out))
    return out


NAMES = ("extract", "extract with a denoiser", "denoise", "train")
RARE = ("denoise with a shared artifact", "denoise with pictures", "distill", "prior train", "probe", "export")
RARE += ("prior sample",)


def with_counts(few, many, rare):
    """Jobs a few times in every test run, as `few` says, and all of them often in the slow ones."""
    slow = [(name, many) for name in NAMES] + [(name, rare) for name in RARE]
    return [*few.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in slow)]


def undisturbed(job, folder, dvt_command):
    """The result of a run that is let alone, the seconds it takes and the moments at which it changes the disk."""
    folder.mkdir()
    start = time.perf_counter()
    dvt_command(job.arguments(folder))
    seconds, expected = time.perf_counter() - start, job.result(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    moments = dvt_command(job.arguments(folder), {"moments": str(folder)}).moments
    assert job.result(folder) == expected  # or nothing below could be told from chance
    return expected, seconds, moments


def finish(job, folder, dvt_command, expected, leftovers, before):
    """The same command, let alone: what is committed stays, and the end is the expected one."""
    dvt_command(job.arguments(folder))
    job.check(folder, before)
    assert job.result(folder) == expected
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    ("name", "kills"), with_counts({"extract with a denoiser": 6, "denoise": 6, "train": 6}, 50, 10)
)
def test_kills_at_random_moments(name, kills, jobs, tmp_path, dvt_command, leftovers):
    job, folder = jobs[name], tmp_path / "killed"
    expected, seconds, _ = undisturbed(job, tmp_path / "whole", dvt_command)
    seed = random.SystemRandom().randrange(10**6)
    chance, killed, finished, before, reached = random.Random(seed), 0, 0, None, []
    print(f"seed {seed}; a run takes {seconds:.2f} s")
    folder.mkdir()
    while killed < kills:
        running = dvt_command.start(job.arguments(folder))
        time.sleep(chance.uniform(0, seconds))
        running.kill()
        code = dvt_command.wait(running).code
        assert code in (0, -signal.SIGKILL)
        before = job.check(folder, before or {} if isinstance(job, StoreJob) else before)
        reached.append(len(before) if isinstance(job, StoreJob) else before)
        killed += code != 0
        if code == 0:  # it got through: once more from the beginning
            finish(job, folder, dvt_command, expected, leftovers, before)
            shutil.rmtree(folder)
            folder.mkdir()
            before, finished = None, finished + 1
    finish(job, folder, dvt_command, expected, leftovers, before or {})
    print(f"{killed} kills, {finished + 1} runs got through; reached {reached}")


@pytest.mark.parametrize(
    ("name", "most"), with_counts({"extract": 4, "train": 4, "prior train": 1, "probe": 1}, None, 24)
)
def test_kills_at_every_change_of_the_disk(name, most, jobs, tmp_path, dvt_command, leftovers):
    """Before each single opening, sync, renaming, ...: a few of them here, all of them in the slow tests."""
    job, folder = jobs[name], tmp_path / "killed"
    expected, _, moments = undisturbed(job, tmp_path / "whole", dvt_command)
    seed = random.SystemRandom().randrange(10**6)
    chosen = range(1, moments + 1)
    chosen = chosen if most is None else sorted(random.Random(seed).sample(chosen, min(most, moments)))
    print(f"seed {seed}; {moments} moments, of which {list(chosen)}")
    nothing = {} if isinstance(job, StoreJob) else None
    for moment in chosen:
        folder.mkdir()
        dvt_command(job.arguments(folder), {"kill": moment, "under": str(folder)}, expect=-signal.SIGKILL)
        before = job.check(folder, nothing)
        finish(job, folder, dvt_command, expected, leftovers, before)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "times"), with_counts({"extract": 2, "denoise": 1, "train": 2}, 20, 5))
def test_deaths_in_the_middle_of_a_write(name, times, jobs, tmp_path, dvt_command, leftovers):
    """The system ends the process inside a write() that would make a file longer than so many bytes."""
    job, folder = jobs[name], tmp_path / "killed"
    expected, _, _ = undisturbed(job, tmp_path / "whole", dvt_command)
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    seed = random.SystemRandom().randrange(10**6)
    chance, nothing = random.Random(seed), {} if isinstance(job, StoreJob) else None
    print(f"seed {seed}; files have up to {largest} bytes")
    for number in range(times):
        folder.mkdir()
        size = chance.choice((3, chance.randrange(4, 1500), chance.randrange(1500, largest)))
        ended = dvt_command(job.arguments(folder), {"fsize": size, "fatal": True}, expect=-signal.SIGXFSZ)
        assert ended.code == -signal.SIGXFSZ, (number, size)
        before = job.check(folder, nothing)
        finish(job, folder, dvt_command, expected, leftovers, before)
        shutil.rmtree(folder)
