"""Shards that one version of HDF5 writes and another reads: 1.14 (h5py 3.11, 3.15) and 2.0 (from h5py 3.16)."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from dvt.store import FeatureStore, Job, Record, StoreWriter

OLD = ("3.11.0", "3.15.1")
WRITE = """
import sys
import h5py, numpy as np
from dvt.store import Job, Record, StoreWriter
with StoreWriter(sys.argv[1], Job("vit", "ab", config={"verb": "extract"})) as writer:
    maps = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    writer.write("shard-a", [Record("a.jpg", "0" * 64, (32, 48), {"raw": maps}, np.ones((1, 4)))])
print(h5py.__version__)
"""
READ = """
import sys
import h5py
from dvt.store import FeatureStore
for folder in sys.argv[1:]:
    store = FeatureStore(folder)
    assert store.verify() == [] and store.read(0).ravel().tolist() == list(range(24)), folder
print(h5py.__version__)
"""


def run_with(packages, code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(packages or "")}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_a_shard_was_closed_before_its_bytes_were_taken(tmp_path):
    """HDF5 1.14 refuses a file whose first block says that somebody writes to it, or whose checksum still says so."""
    with StoreWriter(tmp_path, Job("vit", "ab")) as writer:
        writer.write("shard-a", [Record("a.jpg", "0" * 64, (32, 48), {"raw": np.ones((2, 3, 4))})])
    content = next(tmp_path.glob("*.h5")).read_bytes()
    version, open_flags = content[8], content[11]
    assert (content[:8], version, open_flags) == (b"\x89HDF\r\n\x1a\n", 3, 0)
    assert struct.unpack("<Q", content[28:36])[0] == len(content)  # the end of the file, as the block has it


@pytest.mark.slow
def test_every_version_reads_what_every_version_writes(tmp_path):
    packages = {None: None} | {version: tmp_path / f"h5py-{version}" for version in OLD}
    for version in OLD:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages[version])]
        if subprocess.run([*pip, f"h5py=={version}"], capture_output=True).returncode:
            pytest.skip(f"h5py {version} cannot be installed here: no package index, or no wheel for this Python")
    stores = {version: tmp_path / f"store-{version}" for version in packages}
    for version, place in packages.items():
        assert run_with(place, WRITE, stores[version]) == (
            version or run_with(place, "import h5py; print(h5py.__version__)")
        )
    for version, place in packages.items():
        assert run_with(place, READ, *stores.values()).startswith(version or "")
    assert len(FeatureStore(stores[None])) == 1
