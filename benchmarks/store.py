"""Reading and writing a feature store beside other formats.

python benchmarks/store.py                                   2,000 maps of 14 x 14 x 384 in half precision, read
python benchmarks/store.py --maps 200 --rounds 2             a small one
python benchmarks/store.py --writing --grid 37 37 --channels 768 --maps 32

Reading: items and batches a second, warm, in random order. Writing: MB a second into one shard, of wall-clock and of
processor time, beside plain h5py (with and without the checksum), beside the bytes alone (what the disk takes), and
beside HDF5's own filter into memory and from there to the disk, which is what this package did at first.

Each way reads all maps in one order, and the ways take turns. All are in the main process and in one thread, but for
those of the store that say two: it reads a batch in as many threads as PyTorch is set to, which helps none of the
others. Seconds are of processor time, but of wall-clock time for ways of two threads and for what they are compared
with. Rates are those of the quickest round, because other programs on the machine can only slow it down; ratios are
medians over the rounds, with the quarters of rounds below and above left out for the interval. The store checks the
checksum of all that it reads, the others check nothing.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from dvt.files import sync_path, write_whole
from dvt.store import FeatureStore, Job, Record, StoreWriter
from dvt.store.tools import export_store
from tables import described_machine, table

SHARD = 64
TWO = ", two threads"


class Files(Dataset[Tensor]):
    """One .npy file a map."""

    def __init__(self, folder: Path, mapped: bool) -> None:
        self.files, self.mode = sorted(folder.glob("*.npy")), "c" if mapped else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(np.load(self.files[i], mmap_mode=self.mode))


class Named(Dataset[Tensor]):
    """Safetensors files of many maps."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())["images"]
        files = {name: safe_open(folder / name, "pt") for name in {image["file"] for image in index}}
        self.places = [(files[image["file"]], f"raw/{image['tensor']}") for image in index]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Tensor:
        file, name = self.places[i]
        return file.get_tensor(name)


def write(folder: Path, maps: int, grid: tuple[int, int], channels: int) -> None:
    """Random maps as a store, and the same as .npy and safetensors files."""
    rng = np.random.default_rng(0)
    with StoreWriter(folder / "store", Job("random", "0" * 64)) as writer:
        for start in range(0, maps, SHARD):
            numbers = range(start, min(start + SHARD, maps))
            values = {i: rng.standard_normal((*grid, channels), dtype=np.float32).astype(np.float16) for i in numbers}
            names = {i: hashlib.sha256(str(i).encode()).hexdigest() for i in numbers}
            prefix = np.ones((1, channels), np.float16)
            writer.write(
                f"{start:08}",
                [Record(f"{i:08}.jpg", names[i], (224, 224), {"raw": values[i]}, prefix) for i in numbers],
            )
    for form in ("npy", "safetensors"):
        export_store(folder / "store", folder / form, form)  # type: ignore[arg-type]


def ways(folder: Path, order: list[int], batch: int) -> dict[str, Callable[[], None]]:
    """What is compared: each reads every map once, in `order` or shuffled by torch."""
    stored = FeatureStore(folder / "store", prefix=False, dtype=None)
    floats = FeatureStore(folder / "store")
    npy, mapped = (Files(folder / "npy" / "raw", each) for each in (False, True))
    tensors = Named(folder / "safetensors")
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]

    def items(data: Dataset) -> Callable[[], None]:
        return lambda: drain(data[i] for i in order)

    def batches(data: Dataset) -> Callable[[], None]:
        return lambda: drain(default_collate([data[i] for i in part]) for part in parts)

    def loaded(data: Dataset) -> Callable[[], None]:
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        return lambda: drain(DataLoader(data, batch, sampler=sampler))

    def twice(way: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(2)
            way()
            torch.set_num_threads(1)

        return run

    def chosen() -> None:
        drain(stored[part] for part in parts)

    return {
        "store[i], float32 with prefix": items(floats),
        "store[i]": items(stored),
        ".npy": items(npy),
        "mapped .npy": items(mapped),
        "safetensors": items(tensors),
        "store[[...]]": chosen,
        f"store[[...]]{TWO}": twice(chosen),
        ".npy, stacked": batches(npy),
        "mapped .npy, stacked": batches(mapped),
        "safetensors, stacked": batches(tensors),
        "DataLoader of the store": loaded(stored),
        f"DataLoader of the store{TWO}": twice(loaded(stored)),
        "DataLoader of .npy": loaded(npy),
        "DataLoader of mapped .npy": loaded(mapped),
        "DataLoader of safetensors": loaded(tensors),
    }


def writers(folder: Path, maps: int, grid: tuple[int, int], channels: int) -> dict[str, Callable[[], None]]:
    """What is compared: each writes the same maps, as one file, synced to the disk."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((*grid, channels), dtype=np.float32).astype(np.float16) for _ in range(maps)]
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(maps)]
    records = [
        Record(f"{i:08}.jpg", name, (224, 224), {"raw": torch.from_numpy(each)})
        for i, (name, each) in enumerate(zip(names, values, strict=True))
    ]
    writer = StoreWriter(folder / "store", Job("random", "0" * 64)).__enter__()
    rows = grid[0] * grid[1]
    content = b"".join(each.tobytes() for each in values)

    def plain(target: str | io.BytesIO, checksum: bool) -> None:
        with h5py.File(target, "w", libver=("v110", "v110")) as file:
            data = file.create_dataset(
                "raw", (maps * rows, channels), np.float16, chunks=(rows, channels), fletcher32=checksum
            )
            for i, each in enumerate(values):
                data[i * rows : (i + 1) * rows] = each.reshape(-1, channels)

    def synced(name: str, checksum: bool) -> None:
        plain(str(folder / name), checksum)
        sync_path(folder / name)

    def in_memory() -> None:
        kept = io.BytesIO()
        plain(kept, True)
        write_whole(folder / "memory.h5", kept.getvalue())

    return {
        "StoreWriter": lambda: drain([writer.write("shard", records)]),
        "HDF5's filter, memory, disk": in_memory,
        "h5py, fletcher32": lambda: synced("checked.h5", True),
        "h5py, no checksum": lambda: synced("plain.h5", False),
        "the bytes alone": lambda: write_whole(folder / "bytes", content),
    }


def measure_writing(options: argparse.Namespace) -> dict[str, object]:
    """Let the ways take turns; rates are medians over the rounds, ratios medians of those of each round."""
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    megabytes = options.maps * options.grid[0] * options.grid[1] * options.channels * 2 / 1e6
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        compared = writers(Path(name), options.maps, tuple(options.grid), options.channels)
        for number in range(options.rounds + 1):
            for way, run in compared.items():
                start = time.perf_counter(), time.process_time()
                run()
                if number:  # the first round warms up
                    wall.setdefault(way, []).append(megabytes / (time.perf_counter() - start[0]))
                    processor.setdefault(way, []).append(megabytes / (time.process_time() - start[1]))
    middle = {way: (statistics.median(wall[way]), statistics.median(processor[way])) for way in wall}
    table(
        f"{megabytes:.0f} MB in one file, synced",
        [
            {
                "way": way,
                "MB/s": f"{a:,.0f}",
                "MB/s of processor time": f"{b:,.0f}",
                "images/s": f"{options.maps / megabytes * b:,.0f}",
            }
            for way, (a, b) in middle.items()
        ],
    )
    ours = "StoreWriter"
    ratios = {
        f"{ours} over {way}": statistics.median(a / b for a, b in zip(processor[ours], processor[way], strict=True))
        for way in processor
        if way != ours
    }
    table("Of processor time", [{"ratio": of, "median": ratio} for of, ratio in ratios.items()])
    return {"machine": described_machine(), "MB": megabytes, "MB a second": middle, "ratios": ratios}


def drain(values: Iterable[object]) -> None:
    """Go through them and keep none."""
    for _ in values:
        pass


def main() -> None:
    """Measure, and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=2000)
    parser.add_argument("--grid", type=int, nargs=2, default=(14, 14))
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--writing", action="store_true", help="write instead of reading")
    parser.add_argument("--folder", help="a folder on the disk to write to; else the temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.writing:
        print(json.dumps({"writing": measure_writing(options)}))
        return
    order = np.random.default_rng(1).permutation(options.maps).tolist()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.maps, tuple(options.grid), options.channels)
        compared = ways(Path(name), order, options.batch)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in compared}
        for _ in range(options.rounds):
            for way, run in compared.items():
                start = time.process_time(), time.perf_counter()
                run()
                seconds[way].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    rates = {way: options.maps / min(each[TWO in way] for each in taken) for way, taken in seconds.items()}
    pairs = [("store[i]", ".npy")]
    for way in ("store[[...]]", f"store[[...]]{TWO}"):
        pairs += [(way, ".npy"), (way, ".npy, stacked")]
    pairs += [(f"DataLoader of the store{more}", "DataLoader of .npy") for more in ("", TWO)]
    rounds = {
        f"{way} over {other}": [
            theirs[TWO in way] / ours[TWO in way] for ours, theirs in zip(seconds[way], seconds[other], strict=True)
        ]
        for way, other in pairs
    }
    ratios = {of: statistics.median(each) for of, each in rounds.items()}
    table("Maps read", [{"way": way, "maps a second": f"{rate:,.0f}"} for way, rate in rates.items()])
    table("Of the store over others", [{"ratio": of, "median": ratios[of], "half": half(rounds[of])} for of in ratios])
    print(json.dumps({"store": {"machine": described_machine(), "maps a second": rates, "ratios": ratios}}))


def half(values: list[float]) -> str:
    """The interval of the middle half."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
