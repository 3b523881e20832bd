"""How commands end: interrupted, without streams, without docstrings, with names that are commands to a terminal."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import dvt
from dvt.cli import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DVT = [sys.executable, "-m", "dvt"]
EXTRACT = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64")


def run(command, cwd, **options):
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, stderr=subprocess.PIPE, timeout=300, **{"stdout": subprocess.PIPE, **options}
    )
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_interrupted_in_the_first_seconds(count, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(count):
        before = time.perf_counter()  # what Python itself prints when it is interrupted while it starts is not ours
        subprocess.run([sys.executable, "-c", ""], check=True)
        python = time.perf_counter() - before
        process = subprocess.Popen(
            [*DVT, "demo"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(2 * python + chance.uniform(0.2, 5))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert b"Traceback" not in said and b"Exception ignored" not in said, said.decode()
        assert process.returncode in (-signal.SIGINT, 130, 0), said.decode()


def test_closed_and_broken_streams(tmp_path):
    run(["sh", "-c", '"$0" -m dvt --version >&-', sys.executable], tmp_path)
    # Nothing reads the pipe any more when the command writes to it.
    reading, writing = os.pipe()
    os.close(reading)
    assert run([*DVT, "--version"], tmp_path, stdout=writing).returncode == 1
    os.close(writing)
    store = tmp_path / "store"
    shutil.copytree(os.path.join(os.path.dirname(dvt.__file__), "data", "photos"), tmp_path / "photos")
    line = f'"$0" -m dvt extract photos --out store {" ".join(EXTRACT)} --json >&- 2>&-'
    assert run(["sh", "-c", line, sys.executable], tmp_path).returncode == 0
    verified = run([*DVT, "inspect", "store", "--verify"], tmp_path)
    assert verified.returncode == 0 and b"all checksums are correct" in verified.stdout
    assert not [path for path in store.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize(
    "arguments", [["--help"], pytest.param(["demo", "--views", "2", "--json"], marks=pytest.mark.slow)]
)
def test_without_docstrings(arguments, tmp_path):
    assert run([sys.executable, "-OO", "-m", "dvt", *arguments], tmp_path).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "photos", "--out", ""],
        ["extract", "photos", "--out="],
        ["inspect", ""],
        ["analyze", "photos", "--denoiser", ""],
    ],
)
def test_an_empty_argument_is_no_working_folder(arguments, tmp_path):
    done = run([*DVT, *arguments], tmp_path)
    assert done.returncode == 2 and b"is empty" in done.stderr and not list(tmp_path.iterdir())


def test_names_are_shown_and_not_obeyed(tmp_path):
    """A title of the window, a forged line, markup and an emoji, in the names of a bad image and of the store."""
    hostile = "a\x1b]0;owned\x07\nerror: forged [red]x :smile: \u202egnp.png"
    (tmp_path / hostile).write_bytes(b"no image")
    shutil.copy(next((tmp_path / hostile).parent.iterdir()), tmp_path / "b.png")
    source = os.path.join(os.path.dirname(dvt.__file__), "data", "photos")
    for name in os.listdir(source)[:1]:
        shutil.copy(os.path.join(source, name), tmp_path)
    done = run([*DVT, "extract", ".", "--out", f"store{hostile}", *EXTRACT], tmp_path)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 2 and "forged" in said
    assert not {"\x1b", "\x07", "\u202e", "\N{SMILING FACE WITH OPEN MOUTH AND SMILING EYES}"} & set(said)
    assert not any(line.startswith("error: forged") for line in said.splitlines())
    assert "[red]x :smile:" in said


def test_weights_are_not_written_under_a_name_that_cannot_be_read(tmp_path):
    path = os.fsdecode(b"caf\xe9.safetensors")
    done = run([*DVT, "remedy", "noise", "--out", path, *EXTRACT, "--noise-images", "2"], tmp_path)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and not list(tmp_path.iterdir())


def session(number):
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            found += [stat.parent.name] if int(sid) == number and state != "Z" else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_driver_of_ray_leaves_no_process(number, tmp_path):
    """Its workers end at once; Ray's own agents look for their cluster for some minutes before they do."""
    pytest.importorskip("ray")
    shutil.copytree(os.path.join(os.path.dirname(dvt.__file__), "data", "photos"), tmp_path / "photos")
    for copy in range(40):  # other bytes behind the picture: other images
        for photo in sorted((tmp_path / "photos").glob("[a-z]*.jpg")):
            (tmp_path / "photos" / f"0{copy}{photo.name}").write_bytes(photo.read_bytes() + bytes([copy]))
    options = ("--ray", "local", "--ray-workers", "1", "--batch", "2", "--shard-images", "2")
    command = [*DVT, "extract", "photos", "--out", "store", *EXTRACT, *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 600
    while not list(tmp_path.glob("store/*.h5")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(300) == -number  # Ray's own handler of SIGTERM would sometimes abort
    end = time.monotonic() + 300
    while session(process.pid):
        assert time.monotonic() < end, session(process.pid)
        time.sleep(1)
    done = run([*command, "--json"], tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["done"] > 0
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("[enforce fail a"), True),  # all that there was memory for
        (RuntimeError("std::bad_alloc"), True),
        (ValueError("Unable to synchronously create dataset (can't create fractal heap header)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed"), False),
        (RuntimeError(""), False),
    ],
)
def test_too_little_memory_is_said_however_it_shows(error, told, monkeypatch, capsys):
    def fail(command, console):
        raise error

    monkeypatch.setattr("dvt.cli.about.config", fail)
    if told:
        assert main(["config", "train"]) == 2 and "too little memory" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError):
            main(["config", "train"])
