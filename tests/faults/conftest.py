"""What the fault tests share: photographs, weights and commands that run in a process of their own and can be harmed.

`tests/faults/driver.py` says what the faults are. With ``DVT_ATTACKS=FILE`` each test adds a JSON line to that file,
how it ended and how often it ran which command; ``benchmarks/attacks.py FILE`` makes a table of them.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from dvt.store import FeatureStore, damaged_shards

BACKBONE = ("--backbone", "test_vit", "--size", "96")


RUNS: Counter[str] = Counter()
"""How often the test at hand has run each command, or another reader of files."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "setup":
        RUNS.clear()
    elif call.when == "call" and (target := os.environ.get("DVT_ATTACKS")):
        about = {
            "file": item.path.stem,
            "attack": item.originalname,
            "ended": outcome.get_result().outcome,
            "runs": RUNS,
        }
        with open(target, "a") as file:
            file.write(json.dumps(about) + "\n")


@pytest.fixture
def attacks():
    """The counts of the test at hand, for what runs no command."""
    return RUNS


@dataclass
class Running:
    """A command that was started: its process, and what it has said so far."""

    pid: int
    log: Path
    output: int
    text: str = ""

    def kill(self) -> None:
        """SIGKILL; harmless when the process has ended but was not waited for."""
        os.kill(self.pid, signal.SIGKILL)

    def read(self) -> str:
        """Everything on standard output and standard error until now."""
        with suppress(BlockingIOError):
            while piece := os.read(self.output, 1 << 16):
                self.text += piece.decode()
        return self.text


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it said (in one line), and its result with --json."""

    code: int
    text: str
    moments: int = 0
    result: dict = field(default_factory=dict)


class Commands:
    """Runs `dvt ...` in forks of a process that has imported everything."""

    def __init__(self, folder: Path):
        self.folder, self.numbers = folder, itertools.count()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        self.preloaded = _compiled(folder / "preloaded.so")
        if self.preloaded:
            environment["LD_PRELOAD"] = str(folder / "preloaded.so")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        self.process.communicate()

    def start(self, arguments: Sequence[object], *faults: dict) -> Running:
        """Start a command; every one that is started must be waited for. What it says goes to a pipe: no disk fills."""
        RUNS[" ".join(map(str, arguments[: 2 if arguments[0] in ("prior", "store") else 1]))] += 1
        log = self.folder / f"{next(self.numbers)}.log"
        os.mkfifo(log)
        output = os.open(log, os.O_RDWR | os.O_NONBLOCK)
        answer = self._ask({"start": [str(each) for each in arguments], "log": str(log), "faults": faults})
        return Running(answer["pid"], log, output)

    def wait(self, running: Running, expect: int | None = None) -> Ended:
        """The end of a command; none may ever end with a traceback."""
        code = self._ask({"wait": running.pid})["code"]
        text = running.read()
        os.close(running.output)
        counts = Path(f"{running.log}.moments")
        moments = len(counts.read_text().split()) if counts.exists() else 0
        assert "Traceback" not in text, text
        assert expect is None or code == expect, (code, text)
        result = next((json.loads(line) for line in reversed(text.splitlines()) if line.startswith('{"')), {})
        return Ended(code, " ".join(text.split()), moments, result)

    def __call__(self, arguments: Sequence[object], *faults: dict, expect: int | None = 0) -> Ended:
        """Run a command to its end."""
        return self.wait(self.start(arguments, *faults), expect)

    def _ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the driver has died"
        return json.loads(line)


def _compiled(library: Path) -> bool:
    """Make the library that makes reads fail and folds capitals, where there is a compiler."""
    sources = [Path(__file__).with_name(name) for name in ("failing_reads.c", "one_case.c")]
    compiler = shutil.which("cc")
    command = [compiler, "-fno-builtin", "-w", "-shared", "-fPIC", "-o", library, *sources, "-ldl"]
    return compiler is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def dvt_command(tmp_path_factory):
    """Runs `dvt ...` with faults: `dvt_command([...], {...}, expect=2)`; see :class:`Commands`."""
    commands = Commands(tmp_path_factory.mktemp("logs"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def save_photos():
    """A function that saves crops of three grid shapes, in turns, of scikit-image's photographs."""
    data = pytest.importorskip("skimage.data")
    sources = [data.astronaut(), data.coffee(), data.chelsea()]
    shapes = [(120, 120), (120, 180), (170, 110)]

    def save(folder: Path, count: int, first: int = 0) -> Path:
        folder.mkdir(exist_ok=True)
        for i in range(first, first + count):
            (height, width), source = shapes[i % 3], sources[i // 3 % 3]
            top, left = 7 * i % (source.shape[0] - height), 11 * i % (source.shape[1] - width)
            crop = source[top : top + height, left : left + width]
            Image.fromarray(crop).save(folder / f"{i:03}.png")
        return folder

    return save


@pytest.fixture
def photos(tmp_path, save_photos):
    """Twelve photographs: four each of three grid shapes."""
    return save_photos(tmp_path / "photos", 12)


@pytest.fixture(scope="session")
def backbone_options(make_tiny_backbone, tmp_path_factory):
    """The options that choose the tiny backbone with its weights from a file."""
    weights = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = make_tiny_backbone().model.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    return (*BACKBONE, "--weights", str(weights))


@pytest.fixture(scope="session")
def extract_command(backbone_options):
    """A function that makes the arguments of `dvt extract`: small batches and shards, so there are many."""

    def arguments(images: Path, out: Path, *more: object, batch: int = 2, shard: int = 2) -> list[object]:
        settings = ("--batch", batch, "--shard-images", shard, "--workers", 2)
        return ["extract", images, "--out", out, *backbone_options, *settings, *more]

    return arguments


@pytest.fixture(scope="session")
def denoise_command(backbone_options):
    """A function that makes the arguments of `dvt denoise`, with few views and a coarse field."""

    def arguments(images: Path, out: Path, *more: object, batch: int = 4, shard: int = 2) -> list[object]:
        settings = ("--views", 6, "--linear.resolution", 10, "--batch", batch, "--shard-images", shard, "--no-pictures")
        return ["denoise", images, "--out", out, *backbone_options, *settings, *more]

    return arguments


@pytest.fixture(scope="session")
def denoised_store(dvt_command, denoise_command, save_photos, tmp_path_factory):
    """A store of `dvt denoise` to train on."""
    folder = tmp_path_factory.mktemp("denoised")
    dvt_command(denoise_command(save_photos(folder / "photos", 12), folder / "store"))
    return folder / "store"


@pytest.fixture(scope="session")
def train_command(denoised_store):
    """A function that makes the arguments of `dvt train`, with many checkpoints."""

    def arguments(out: Path, *more: object) -> list[object]:
        settings = ("--steps", 12, "--batch-size", 2, "--checkpoint-every", 2, "--validate-every", 4, "--log-every", 1)
        return ["train", denoised_store, "--out", out, *settings, *more]

    return arguments


@pytest.fixture(scope="session")
def still_photos(save_photos, tmp_path_factory):
    """Twelve photographs that nobody changes."""
    return save_photos(tmp_path_factory.mktemp("few") / "photos", 12)


@pytest.fixture(scope="session")
def distill_command(still_photos, backbone_options, denoiser_file):
    """A function that makes the arguments of `dvt distill`, with several checkpoints."""

    def arguments(out: Path) -> list[object]:
        settings = ("--steps", 4, "--batch-size", 2, "--checkpoint-every", 2, "--validate-every", 4, "--log-every", 1)
        return ["distill", still_photos, *backbone_options, "--denoiser", denoiser_file, *settings, "--out", out]

    return arguments


@pytest.fixture(scope="session")
def prior_command(still_photos, backbone_options):
    """A function that makes the arguments of `dvt prior train`, with several checkpoints."""

    def arguments(out: Path) -> list[object]:
        settings = ("--width", 16, "--depth", 1, "--heads", 2, "--side", 32, "--held-out", 0.4, "--target", "pixels")
        loop = ("--steps", 4, "--batch-size", 2, "--checkpoint-every", 2, "--log-every", 1)
        return ["prior", "train", still_photos, *backbone_options, *settings, *loop, "--out", out]

    return arguments


@pytest.fixture(scope="session")
def probe_command(save_photos, backbone_options, tmp_path_factory):
    """A function that makes the arguments of `dvt probe` on labelled photographs, cut into crops that are kept."""
    data = tmp_path_factory.mktemp("labelled")
    for number, photo in enumerate(sorted(save_photos(data / "photos", 12).iterdir())):
        split = ("train", "val")[number % 2]
        for kind in ("images", "annotations"):
            (data / kind / split).mkdir(parents=True, exist_ok=True)
        with Image.open(photo) as image:
            bright = image.convert("L").point(lambda value: int(value > 100))
            photo.rename(data / "images" / split / photo.name)
            bright.save(data / "annotations" / split / photo.name)
    (data / "photos").rmdir()

    def arguments(out: Path) -> list[object]:
        settings = ("--protocol", "crops", "--cache", out.parent / "cache", "--seeds", 1, "--head.epochs", 1)
        return ["probe", "segmentation", data, *backbone_options, *settings, "--out", out]

    return arguments


@pytest.fixture(scope="session")
def denoiser_file(dvt_command, train_command, tmp_path_factory):
    """A denoiser of the tiny backbone."""
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.safetensors"
    dvt_command(train_command(path))
    return path


@pytest.fixture(scope="session")
def contents():
    """A function that reads every array of a store, by path, hash and term; and checks each of its checksums."""

    def read(folder: Path) -> dict[tuple[str, str, str], tuple[str, bytes]]:
        assert damaged_shards(folder) == {}
        store, found = FeatureStore(folder), {}
        for i in range(len(store)):
            record, shared = store.record(i), store.artifact(i)
            arrays = {**record.terms, "prefix": record.prefix, "size": record.size}
            arrays |= {} if shared is None else {"shared": shared}
            for name, array in arrays.items():
                key = (Path(record.path).name, record.sha256, name)
                assert key not in found, f"{key} is in the store twice"
                found[key] = array if name == "size" else (array.dtype.name, array.shape, array.tobytes())
        return found

    return read


@pytest.fixture(scope="session")
def shards(digests):
    """A function that digests every shard of a folder, by name."""
    return lambda folder: digests(folder, "*.h5")


@pytest.fixture(scope="session")
def leftovers():
    """A function that names what a run may not leave behind: files that are half written."""
    return lambda folder: sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.part"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of some bytes, and one that changes it: `size` bytes, read-only or not."""
    mounted = []

    def mount(folder: Path, options: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
        if done is None or done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip() if done else 'not root'}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def remount():
    """A function that mounts a small disk again with other options."""
    return lambda folder, options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
