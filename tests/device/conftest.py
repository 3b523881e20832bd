"""What the tests of other devices share: the stand-in, photographs, and commands run on the CPU and on the stand-in.

The stand-in is known to PyTorch from here on, before any test runs: the first backward pass of a process fixes which
devices it can ever go back through.
"""

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.cli import main
from dvt.store import FeatureStore


def _load():
    spec = importlib.util.spec_from_file_location("standin", Path(__file__).with_name("standin.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STANDIN = _load()
#: The device that commands run on beside the CPU: the stand-in, or a GPU that there is, for `make test-gpu`.
OTHER = os.environ.get("DVT_TEST_DEVICE", STANDIN.NAME)
if STANDIN.missing() is None and OTHER == STANDIN.NAME:
    STANDIN.register()


@pytest.fixture
def standin():
    """The module of the stand-in, while torch.Generator and pin_memory know it."""
    if OTHER != STANDIN.NAME:
        pytest.skip(f"DVT_TEST_DEVICE asks for {OTHER}, not for the stand-in")
    if (reason := STANDIN.missing()) is not None:
        pytest.skip(reason)
    with STANDIN.present():
        yield STANDIN


@pytest.fixture
def other(request):
    """The device beside the CPU."""
    if OTHER == STANDIN.NAME:
        return request.getfixturevalue("device")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device(OTHER)


@pytest.fixture
def device(standin):
    """The stand-in, as a device."""
    return torch.device(standin.NAME, 0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 9 small pictures, all of one size."""
    folder = tmp_path_factory.mktemp("device") / "photos"
    folder.mkdir()
    for seed in range(9):
        coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    return folder


class Places:
    """Runs a command on the CPU and on the other device, each in a folder of its own, and compares what comes back."""

    def __init__(self, other, folder, capsys):
        self.other, self.folder, self.capsys = other, folder, capsys

    def __call__(self, *arguments):
        """The JSON results on the CPU and on the other; "{here}" in an argument is the folder of either."""
        return tuple(self._run(place, arguments) for place in ("cpu", self.other))

    def _run(self, place, arguments):
        here = self.folder / place
        here.mkdir(exist_ok=True)
        words = [str(each).replace("{here}", str(here)) for each in (*arguments, "--device", place, "--json")]
        code = main(words)
        out, errors = self.capsys.readouterr()
        assert code == 0, errors
        return json.loads(out)

    def stores(self, name="store"):
        """The tokens of all images in the CPU's store and in the other's: lists of {term: values}."""
        found = []
        for place in ("cpu", self.other):
            terms = FeatureStore(self.folder / place / name).terms
            stores = {term: FeatureStore(self.folder / place / name, term) for term in terms}
            images = range(len(next(iter(stores.values()))))
            found.append([{term: stores[term][i].patches.float() for term in terms} for i in images])
        return found


@pytest.fixture
def places(other, tmp_path, capsys):
    """Runs a command on both devices; see `Places`."""
    return Places(other.type, tmp_path, capsys)


TIMES = (
    "seconds",
    "profile",
    "rate",
    "wall",
    "device",
    "path",
    "store",
    "out",
    "weights",
    "time",
    "sha256",
    "settings",
    "text",
    "null_",
)


def differences(one, other, tolerance=1e-3, at=""):
    """Where two JSON values differ: numbers by more than a tolerance, relative to 1 or to their size."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [] if one.keys() == other.keys() else [f"{at}: {sorted(one.keys() ^ other.keys())}"]
        for key in one.keys() & other.keys():
            if not any(word in key.lower() for word in TIMES):
                found += differences(one[key], other[key], tolerance, f"{at}.{key}")
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [each for i, pair in enumerate(zip(one, other)) for each in differences(*pair, tolerance, f"{at}[{i}]")]  # noqa: B905
    if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (one, other)):
        same = one == other or (math.isnan(one) and math.isnan(other))
        return [] if same or abs(one - other) <= tolerance * max(1, abs(one)) else [f"{at}: {one} != {other}"]
    return [] if one == other or (isinstance(one, str) and "/" in one) else [f"{at}: {one!r} != {other!r}"]


@pytest.fixture(scope="session")
def differ():
    """The function `differences`."""
    return differences
