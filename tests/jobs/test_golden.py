"""One fixed job of each kind: its digest, the names of its shards and its tokens stay what they were.

A change here means that stores of users are no longer continued. `python tests/jobs/test_golden.py` prints the values.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import dvt
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.fields import LinearConfig

GOLDEN = Path(__file__).with_name("golden.json")
SIZES = ((64, 64), (64, 96), (64, 64))


def photographs(folder):
    """Three files whose bytes no library has a say in; relative names, which go into the shards' names."""
    names = []
    for number, (height, width) in enumerate(SIZES):
        y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
        pixels = (128 + 100 * np.sin((number + 2) * x / 17 + c) * np.cos((3 - number) * y / 23)).astype(np.uint8)
        names.append(f"photo-{number}.ppm")
        (folder / names[-1]).write_bytes(b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes())
    return names


def subtraction():
    denoiser = Denoiser(DenoiserConfig("subtract", 192, grid=(4, 4)))
    for value in (*denoiser.parameters(), *denoiser.buffers()):
        value.data.copy_(0.1 * (1 + torch.arange(value.numel()) % 7).view(value.shape))
    return denoiser


def run_jobs(folder):
    """Each job's digest, shards and a sample of its tokens, by name."""
    from dvt.fields.config import DenoiseConfig
    from dvt.fields.images import denoise_images
    from dvt.jobs.extract import ExtractConfig, extract_images
    from dvt.views import ViewConfig

    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
    names, views = photographs(folder), ViewConfig(count=6, batch=4)
    linear = LinearConfig(resolution=8, smoothness=0.1)
    jobs = {
        "extract": lambda out: extract_images(backbone, names, out, ExtractConfig(shard_images=2)),
        "extract denoised": lambda out: extract_images(backbone, names, out, denoiser=subtraction()),
        "denoise blend": lambda out: denoise_images(
            backbone, names, out, DenoiseConfig(views=views, linear=linear), keep_terms=True
        ),
        "denoise removed": lambda out: denoise_images(backbone, names, out, DenoiseConfig(views=6)),
        "denoise ensembled": lambda out: denoise_images(
            backbone, names, out, DenoiseConfig(product="ensembled", views=views, linear=linear)
        ),
        "denoise shared": lambda out: denoise_images(
            backbone, names, out, DenoiseConfig(views=views, linear=linear, shared_artifact=True)
        ),
    }
    return {name: described(run, folder / name) for name, run in jobs.items()}


def described(run, out):
    run(out)
    store = dvt.FeatureStore(out)
    samples = {term: [store.read(i, term).astype(float) for i in range(len(store))] for term in store.terms}
    return {
        "digest": store.job.digest,
        "shards": sorted(path.stem for path in out.glob("*.h5")),
        "images": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in store.images],
        "tokens": {
            term: [[round(float(v), 4) for v in (*maps[0, 0, :3], *maps[-1, -1, -3:], (maps**2).mean() ** 0.5)]]
            for term, values in samples.items()
            for maps in values[:1]
        },
    }


def test_jobs_shards_and_tokens_are_what_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, golden = run_jobs(tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        for key in ("digest", "shards", "images"):
            assert found[name][key] == values[key], f"{key} of {name}"
        assert found[name]["tokens"].keys() == values["tokens"].keys()
        for term, numbers in values["tokens"].items():
            assert np.array(found[name]["tokens"][term]) == pytest.approx(np.array(numbers), abs=0.02), (name, term)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(json.dumps(run_jobs(Path(folder)), indent=1))
