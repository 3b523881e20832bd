"""Full, read-only, vanishing and impossible targets: a message that says what to do, and nothing half written.

Full disks are real ones (a small tmpfs, where that may be mounted), and files that may not grow (for every user).
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

SLOW = pytest.mark.slow
FULL = ("No space left on device", "File too large")
DEFAULT_ROOM = "size=64m,nr_inodes=0"


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def explained(ended, *names):
    """That a command ended as it should: with exit code 2 and words that name the place and the reason."""
    assert ended.code == 2, ended
    assert any(name in ended.text for name in names), ended
    return ended


@pytest.fixture
def photos(tmp_path, save_photos):
    """Six photographs: two each of three grid shapes."""
    return save_photos(tmp_path / "photos", 6)


@pytest.fixture
def jobs(
    extract_command, denoise_command, train_command, denoiser_file, backbone_options, photos, prior_command,
    probe_command,
):  # fmt: skip
    """The commands that write, by name: a function of the folder that they write to."""
    distill = (
        *("distill", photos, *backbone_options, "--denoiser", denoiser_file, "--steps", 4, "--batch-size", 2),
        *("--checkpoint-every", 2, "--validate-every", 4, "--log-every", 1),
    )
    analyze = ("analyze", photos, *backbone_options, "--views", 0)
    return {
        "extract": lambda out: extract_command(photos, out / "store"),
        "extract with a denoiser": lambda out: extract_command(photos, out / "store", "--denoiser", denoiser_file),
        "denoise": lambda out: denoise_command(photos, out / "store"),
        "denoise with pictures": lambda out: denoise_command(photos, out / "store", "--pictures", "--upsample", 2),
        "train": lambda out: train_command(out / "denoiser.safetensors"),
        "distill": lambda out: [*distill, "--out", out / "backbone.safetensors"],
        "analyze": lambda out: [*analyze, "--out", out / "analysis"],
        "prior train": lambda out: prior_command(out / "run"),
        "probe": lambda out: probe_command(out / "probe.json"),
    }


@pytest.fixture
def result(contents):
    """What a command leaves in a folder, without what depends on the clock or the folder's name."""

    def read(out):
        if (out / "store").is_dir():
            others = [path for path in (out / "store").rglob("*") if path.suffix in (".png", ".npy")]
            return contents(out / "store"), {path.name: path.stat().st_size for path in others}
        if (out / "analysis").is_dir():
            report = json.loads((out / "analysis" / "report.json").read_text())
            return report["rows"], sorted(path.name for path in (out / "analysis").iterdir())
        if (out / "probe.json").exists():
            return json.loads((out / "probe.json").read_text())["rows"]
        weights = {path.name: load_file(path) for path in (*out.glob("*.safetensors"), *out.glob("run/*.safetensors"))}
        files = [path for path in out.rglob("*") if path.suffix == ".csv" or path.parent.name.startswith("step-")]
        return {
            **{(name, key): value.numpy().tobytes() for name, state in weights.items() for key, value in state.items()},
            **{str(path.relative_to(out)): path.read_bytes() for path in files},
        }

    return read


SOME = ("extract", "train")
ALL = (
    *SOME,
    "extract with a denoiser",
    "denoise",
    "denoise with pictures",
    "distill",
    "analyze",
    "prior train",
    "probe",
)
QUICK_AND_SLOW = [*SOME, *(pytest.param(name, marks=SLOW) for name in ALL[len(SOME) :])]


@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_a_full_disk(name, jobs, tmp_path, dvt_command, result, small_disk, remount, shards, leftovers):
    """The disk holds a part of the result, ever more of it; what is committed stays, and with room the rest follows."""
    (tmp_path / "whole").mkdir()
    dvt_command(jobs[name](tmp_path / "whole"))
    expected, size = result(tmp_path / "whole"), size_of(tmp_path / "whole")
    disk, before = small_disk(tmp_path / "disk", "size=8k"), {}
    for share in (0, 0.3, 0.6):
        remount(disk, f"size={int(share * size) + 8192}")
        ended = dvt_command(jobs[name](disk), expect=None)
        explained(ended, str(disk), FULL[0])
        now = shards(disk / "store")
        assert {shard: now.get(shard) for shard in before} == before and len(now) >= len(before)
        assert leftovers(disk) == [], (share, ended)
        before = now
    assert before or name in ("train", "distill", "analyze", "prior train", "probe")
    remount(disk, DEFAULT_ROOM)
    dvt_command(jobs[name](disk))
    assert result(disk) == expected and leftovers(disk) == []
    assert {shard: shards(disk / "store")[shard] for shard in before} == before


@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_files_that_may_not_grow(name, jobs, tmp_path, dvt_command, result, shards, leftovers):
    """As a quota of the file system does it, for every user: a write beyond so many bytes fails."""
    (tmp_path / "whole").mkdir()
    dvt_command(jobs[name](tmp_path / "whole"))
    expected = result(tmp_path / "whole")
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()})
    out = tmp_path / "other"  # as long as "whole": shards of crops hold their paths
    out.mkdir()
    for limit in sorted({3, 300, sizes[len(sizes) // 2] - 1, sizes[-1] - 1}):
        before = shards(out / "store")
        ended = explained(dvt_command(jobs[name](out), {"fsize": limit}, expect=None), str(out))
        assert FULL[1] in ended.text, (limit, ended)
        now = shards(out / "store")
        assert {shard: now.get(shard) for shard in before} == before
        assert leftovers(out) == [], (limit, ended)
    dvt_command(jobs[name](out))
    assert result(out) == expected and leftovers(out) == []


def test_a_disk_without_room_for_one_more_file(jobs, tmp_path, dvt_command, result, small_disk, remount, leftovers):
    dvt_command(jobs["extract"](tmp_path / "whole"))
    files = len([tmp_path / "whole", *(tmp_path / "whole").rglob("*")])
    disk = small_disk(tmp_path / "disk", f"size=1m,nr_inodes={files - 1}")
    explained(dvt_command(jobs["extract"](disk), expect=None), FULL[0])
    assert leftovers(disk) == []
    remount(disk, DEFAULT_ROOM)
    dvt_command(jobs["extract"](disk))
    assert result(disk) == result(tmp_path / "whole")


SINGLE = ("export", "export to ONNX", "store export", "prior sample")


@pytest.mark.parametrize("name", ["report", *(pytest.param(name, marks=SLOW) for name in SINGLE)])
def test_single_files_on_a_full_disk(
    name, jobs, tmp_path, dvt_command, backbone_options, small_disk, remount, leftovers
):
    """What is written at the end: the old file stays, or there is none, and the command can be run again."""
    if name == "export to ONNX":
        pytest.importorskip("onnxscript")
    makes = {"report": "analyze", "store export": "extract", "prior sample": "prior train"}
    if name in makes:
        dvt_command(jobs[makes[name]](tmp_path))
    disk = small_disk(tmp_path / "disk", "size=8k")
    command, out = {
        "report": (["report", tmp_path / "analysis", "--out", disk / "page.html"], disk / "page.html"),
        "export": (["export", *backbone_options, "--out", disk / "tiny.pt2"], disk / "tiny.pt2"),
        "export to ONNX": (["export", *backbone_options, "--out", disk / "tiny.onnx"], disk / "tiny.onnx"),
        "prior sample": (["prior", "sample", tmp_path / "run", "--out", disk / "grid.png"], disk / "grid.png"),
        "store export": (["store", "export", tmp_path / "store", "--out", disk / "npy"], disk / "npy" / "index.json"),
    }[name]
    explained(dvt_command(command, expect=None), str(disk))
    assert not out.exists() and leftovers(disk) == []
    remount(disk, DEFAULT_ROOM)
    dvt_command(command)
    assert out.exists() and leftovers(disk) == []


@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_a_target_that_becomes_read_only(
    name, jobs, tmp_path, dvt_command, result, small_disk, remount, leftovers, digests
):
    """Permissions do not bind root, a read-only file system does: before the first run, and after half of the work."""
    (tmp_path / "whole").mkdir()
    dvt_command(jobs[name](tmp_path / "whole"))
    expected, size = result(tmp_path / "whole"), size_of(tmp_path / "whole")
    disk = small_disk(tmp_path / "disk", f"size={size // 2 + 8192}")
    remount(disk, "ro")
    explained(dvt_command(jobs[name](disk), expect=None), "Read-only file system")
    assert not list(disk.iterdir())
    remount(disk, "rw")
    dvt_command(jobs[name](disk), expect=2)
    there = digests(disk)
    remount(disk, "ro")
    explained(dvt_command(jobs[name](disk), expect=None), "Read-only file system")
    assert digests(disk) == there
    remount(disk, f"rw,{DEFAULT_ROOM}")
    dvt_command(jobs[name](disk))
    assert result(disk) == expected and leftovers(disk) == []


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc", "a name too long"])
@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_places_that_cannot_be_written(name, place, jobs, tmp_path, dvt_command):
    (tmp_path / "file").write_bytes(b"precious")
    out = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "below",
        "/proc": Path("/proc/dvt"),
        "a name too long": tmp_path / ("x" * 300),
    }[place]
    explained(dvt_command(jobs[name](out), expect=None), str(out)[:200])
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "nth"),
    [("extract", 1), ("train", 3), *(pytest.param(*pair, marks=SLOW) for pair in (("extract", 3), ("denoise", 2)))],
)
def test_a_folder_that_is_removed_in_mid_run(name, nth, jobs, tmp_path, dvt_command, result, leftovers):
    for folder in ("whole", "out"):
        (tmp_path / folder).mkdir()
    dvt_command(jobs[name](tmp_path / "whole"))
    written, gone = ("model.safetensors", "denoiser.run") if name == "train" else ("*.h5.*.part", "store")
    # safetensors opens its files where Python does not see it; the folder of a checkpoint it does.
    written = "step-*.part" if name == "train" else written
    fault = {"at": written, "nth": nth, "do": ["remove", str(tmp_path / "out" / gone)]}
    explained(dvt_command(jobs[name](tmp_path / "out"), fault, expect=None), str(tmp_path / "out"))
    dvt_command(jobs[name](tmp_path / "out"))
    assert result(tmp_path / "out") == result(tmp_path / "whole") and leftovers(tmp_path / "out") == []
