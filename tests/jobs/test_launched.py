"""Two processes of `accelerate launch` make the store that one makes, byte for byte."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dvt.cli import main

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64", "--dtype", "float32")
DENOISE = ("--views", "4", "--no-pictures", "--shard-images", "2")
JOBS = {
    "denoise": ("denoise", *DENOISE),
    "shared artifact": ("denoise", *DENOISE, "--product", "ensembled", "--shared-artifact"),
    "extract": ("extract", "--shard-images", "2"),
}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(5):
        coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8))
        size = (120, 90) if seed else (90, 120)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    return folder


def launch(*arguments, cwd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ("--cpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", port)
    settings += ("--mixed_precision", "no", "--dynamo_backend", "no")
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings, "-m", "dvt", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(each) for each in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("denoise", "extract")]


@pytest.mark.parametrize("name", ["shared artifact", *SLOW])
def test_two_processes_make_the_store_of_one(photos, tmp_path, monkeypatch, capsys, digests, name):
    command, *more = JOBS[name]
    monkeypatch.chdir(tmp_path)
    assert main([command, "photos", "--out", "one", *more, *WITH]) == 0
    capsys.readouterr()
    done = launch(command, "photos", "--out", "two", *more, *WITH, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # of the first process alone
    assert (result["done"], result["skipped"], result["shards"]) == (5, 0, 3) and not result["failed"]
    assert digests(tmp_path / "two", "*.h5") == digests(tmp_path / "one", "*.h5")
    again = launch(command, "photos", "--out", "two", *more, *WITH, "--json", cwd=tmp_path)
    assert (json.loads(again.stdout)["done"], json.loads(again.stdout)["skipped"]) == (0, 5)


@pytest.mark.slow
def test_an_error_of_the_first_ends_all(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["extract", "photos", "--out", "store", *WITH]) == 0
    done = launch("denoise", "photos", "--out", "store", *DENOISE, *WITH, cwd=tmp_path)
    assert done.returncode != 0 and "was made by `dvt extract`, and this is `dvt denoise`" in done.stderr
