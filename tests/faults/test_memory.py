"""Too little memory, no locks, no capitals, and clocks that jump: an error in words, or the same result."""

import errno
import os
import subprocess
import sys

import pytest
from PIL import Image

from dvt import files
from dvt.store import damaged_shards

SLOW = pytest.mark.slow
MB = 1 << 20


@pytest.fixture
def commands(
    extract_command, denoise_command, train_command, distill_command, prior_command, probe_command, still_photos,
    backbone_options, denoised_store,
):  # fmt: skip
    """By name, functions of the folder to write to."""
    analyze = ("analyze", still_photos, *backbone_options, "--views", 0)
    return {
        "extract": lambda out: extract_command(still_photos, out / "store"),
        "denoise": lambda out: denoise_command(still_photos, out / "store"),
        "train": lambda out: train_command(out / "d.safetensors"),
        "distill": lambda out: distill_command(out / "b.safetensors"),
        "prior train": lambda out: prior_command(out / "run"),
        "probe": lambda out: probe_command(out / "probe.json"),
        "analyze": lambda out: [*analyze, "--out", out / "analysis"],
        "export": lambda out: ["export", *backbone_options, "--grid", "fixed", "--out", out / "tiny.onnx"],
        "store export": lambda out: ["store", "export", denoised_store, "--out", out / "npy"],
        "store merge": lambda out: ["store", "merge", denoised_store, "--out", out / "merged"],
        "inspect": lambda out: ["inspect", denoised_store, "--verify"],
    }


NAMES = (
    *("extract", "denoise", "train", "distill", "prior train", "probe", "analyze", "export", "store export"),
    *("store merge", "inspect"),
)
QUICK = ("extract", "train", "probe", "store merge")
QUICK_AND_SLOW = [*QUICK, *(pytest.param(name, marks=SLOW) for name in NAMES if name not in QUICK)]


@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_with_ever_less_address_space(name, commands, tmp_path, dvt_command, leftovers):
    """Done, or refused in words: Python, NumPy, torch and threads each say it in their own way.

    With next to nothing, libraries in C may end the process; the same command goes on, and leaves nothing behind.
    """
    codes = []
    for space in (48 * MB, 144 * MB, 432 * MB):
        ended = dvt_command(commands[name](tmp_path / "out"), {"space": space}, expect=None)
        codes.append(ended.code)
        assert ended.code in (0, 2) or (space == 48 * MB and ended.code < 0), (space, ended)
        assert ended.code != 2 or "memory" in ended.text.lower() or "allocate" in ended.text, (space, ended)
        assert leftovers(tmp_path) == [] or ended.code < 0
        if ended.code == 0:
            break
    else:
        dvt_command(commands[name](tmp_path / "out"))
    assert leftovers(tmp_path) == []
    print(codes)


# -- locks ------------------------------------------------------------------------------------------------------------


LOCKING = ("extract", "train", "prior train", "store export", "store merge", "distill")


@pytest.mark.parametrize(("name", "number"), [("extract", errno.ENOSYS), *((name, errno.ENOLCK) for name in LOCKING)])
def test_a_file_system_without_locks_is_named(name, number, commands, tmp_path, dvt_command):
    """As some that lie on a network: two writers would spoil each other's work, so none begins."""
    ended = dvt_command(commands[name](tmp_path / "out"), {"locks": number}, expect=2)
    assert str(tmp_path / "out") in ended.text and "keeps no locks" in ended.text, ended
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".h5", ".safetensors", ".npy")]


def test_what_other_machines_write_to_a_shared_folder_stays(tmp_path):
    """Only processes of this machine are known to be dead."""
    dead, elsewhere, alive = (f"f.txt.{pid}.{{}}0123456789.part" for pid in (4194303, 4194303, os.getpid()))
    with files.replaced(tmp_path / "f.txt") as part:
        host = part.parent.name.split(".")[-2][:6]
        other = "000000" if host != "000000" else "111111"
        names = [dead.format(host), elsewhere.format(other), alive.format(host)]
        for name in names:
            (tmp_path / name).touch()
    assert {path.name for path in tmp_path.iterdir()} == {"f.txt", *names}
    with files.replaced(tmp_path / "f.txt"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"f.txt", *names[1:]}


# -- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1e7, 1e5])
@pytest.mark.parametrize("name", ["extract", pytest.param("prior train", marks=SLOW)])
def test_a_clock_that_jumps_changes_nothing(name, step, commands, tmp_path, dvt_command, digests):
    """By months forward at each look, or by a day back."""
    for folder, faults in (("whole", ()), ("out", ({"clock": step},))):
        dvt_command(commands[name](tmp_path / folder), *faults)
    whole, out = (digests(tmp_path / place, "*.h5", "*.npy", "*.csv") for place in ("whole", "out"))
    assert whole == out and whole


# -- names without capitals -------------------------------------------------------------------------------------------


@pytest.fixture
def one_case(dvt_command, tmp_path):
    """A folder in which A and a are one name, and the fault that makes it so for a command."""
    if not dvt_command.preloaded:
        pytest.skip("there is no C compiler to fold names with")
    (tmp_path / "one-case").mkdir()
    return tmp_path / "one-case", {"one_case": str(tmp_path / "one-case")}


@pytest.mark.parametrize(
    "name",
    [
        "extract",
        *(pytest.param(name, marks=SLOW) for name in ("denoise", "analyze", "store merge")),
    ],
)
def test_a_disk_that_knows_no_capitals(name, one_case, commands, tmp_path, dvt_command, digests):
    """The results are those of any disk, and are found again by another spelling; nothing is done twice.

    Training is not among them: safetensors renames its files past the C library, where nothing can fold their names.
    """
    folder, fault = one_case
    dvt_command(commands[name](tmp_path / "elsewhere"))
    for out in ("Results", "RESULTS", "results"):
        dvt_command(commands[name](folder / out), fault)
    kinds = ("*.h5", "*.safetensors", "*.npy", "*.csv")
    wanted, found = (digests(top, *kinds) for top in (tmp_path / "elsewhere", folder / "results"))
    assert found == wanted and found
    assert [path.name for path in folder.iterdir()] == ["results"]


def test_crops_that_a_disk_cannot_tell_apart_are_refused(one_case, backbone_options, tmp_path, dvt_command):
    folder, fault = one_case
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        for name in ("train/a", "train/A", "val/b"):
            path = tmp_path / "data" / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 9).point(lambda value: value > 128).convert(mode).save(path)
    command = ["probe", "segmentation", tmp_path / "data", *backbone_options, "--protocol", "crops"]
    ended = dvt_command([*command, "--cache", folder / "cache"], fault, expect=2)
    assert "cannot tell apart" in ended.text, ended


# -- killed for memory ------------------------------------------------------------------------------------------------


LOADING = """
import os, signal, sys
from torch.utils.data import DataLoader, get_worker_info
from dvt.store import FeatureStore

class Deadly(FeatureStore):
    def __getitem__(self, number):
        if number == 3 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)

kind = {"deadly": Deadly, "whole": FeatureStore}[sys.argv[2]]
print(len(list(DataLoader(kind(sys.argv[1]), batch_size=None, num_workers=2))))
"""


def test_a_worker_that_loads_and_is_killed_is_named(denoised_store):
    """As the kernel does it when memory runs out; the store is untouched, and the next loader reads it."""
    for kind, said in (("deadly", "DataLoader worker"), ("whole", "12\n")):
        command = [sys.executable, "-c", LOADING, denoised_store, kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) == (kind == "whole") and said in done.stdout + done.stderr, done
    assert damaged_shards(denoised_store) == {}
