"""What a long job holds after thousands of images: memory, open files and threads, quarter by quarter.

python benchmarks/soak.py --command denoise --images 20000
python benchmarks/soak.py --command extract --images 40000 --copies

The images are small cuts of the bundled photographs, JPEG, PNG and WebP in turns, each hundredth of them cut short; or
copies of one file. The model is timm's smallest ViT with random weights: what leaks, leaks by the image. The last line
of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tables import PHOTOS, described_machine, table

SIDE, SIZE, SHARD = 64, 128, 64  # pixels of an image's side and of the model's input; images a shard
DAMAGED_EVERY, SECONDS_BETWEEN = 100, 0.2
OPTIONS = {
    "extract": ["--batch", "32", "--shard-images", str(SHARD)],
    "denoise": [
        "--batch",
        "64",
        "--views",
        "6",
        "--linear.resolution",
        "10",
        "--no-pictures",
        "--shard-images",
        str(SHARD),
    ],
}


def photographs(folder: Path, count: int) -> int:
    """Write `count` different images, and return how many of them are whole."""
    sources = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    for number in range(count):
        source, place = sources[number % len(sources)], 7919 * (number // len(sources))
        left, top = place % (source.width - SIDE), place // (source.width - SIDE) % (source.height - SIDE)
        path = folder / f"{number // 1000:03}" / f"{number:06}.{('jpg', 'png', 'webp')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        source.crop((left, top, left + SIDE, top + SIDE)).save(path)
        if number % DAMAGED_EVERY == 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return count - len(range(0, count, DAMAGED_EVERY))


def copies(folder: Path, count: int) -> int:
    """Write one image under `count` names, and return their number."""
    photographs(folder, 2)
    (folder / "000" / "000000.jpg").unlink()
    for number in range(2, count + 1):
        path = folder / f"{number // 1000:03}" / f"{number:06}.png"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "000" / "000001.png", path)
    return count


def held(pid: int) -> dict[str, float] | None:
    """Look at a process: resident memory and its peak in MB, open files, threads; None once it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
        resident, peak = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        return None
    return {"memory": resident, "peak": peak, "files": files, "threads": int(lines["Threads"])}


def watched(command: list[str], out: Path, log: Path) -> tuple[int, list[dict[str, float]]]:
    """Run a command to its end; its exit code, and what it held, with the number of shards that were there."""
    samples: list[dict[str, float]] = []
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while process.poll() is None:
            if (now := held(process.pid)) is not None:
                samples.append({"shards": len(list(out.glob("*.h5"))), **now})
            time.sleep(SECONDS_BETWEEN)
    return process.returncode, samples


def quarters(samples: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Summarise what was held between the first shard and the last, in four parts of as many shards."""
    last, names = samples[-1]["shards"], ("memory", "files", "threads")
    rows = []
    for part in range(4):
        inside = [each for each in samples if part < 4 * each["shards"] / last <= part + 1]
        rows.append(
            {"quarter": part + 1, **{f"most {name}": max((each[name] for each in inside), default=0) for name in names}}
        )
    return rows


def slope(samples: list[dict[str, float]]) -> float:
    """Fit MB a thousand images after the first quarter, in which libraries and buffers come in."""
    import numpy as np

    later = [each for each in samples if 4 * each["shards"] >= samples[-1]["shards"]]
    images = [each["shards"] * SHARD / 1000 for each in later]
    return float(np.polyfit(images, [each["memory"] for each in later], 1)[0])


def soak(command: str, count: int, same: bool, folder: Path) -> dict[str, Any]:
    """Make the images and the weights, run the command, and say what it held."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "weights.safetensors")
    (folder / "images").mkdir()
    whole = (copies if same else photographs)(folder / "images", count)
    arguments = [command, folder / "images", "--out", folder / "store", "--backbone", "test_vit", "--size", SIZE]
    arguments += ["--weights", folder / "weights.safetensors", *OPTIONS[command], "--json"]
    start = time.perf_counter()
    code, samples = watched([sys.executable, "-m", "dvt", *map(str, arguments)], folder / "store", folder / "log")
    seconds = time.perf_counter() - start
    said = (folder / "log").read_text()
    result = json.loads(said[said.index('{"') :].splitlines()[0]) if '{"' in said else {}
    if result.get("done") != whole:
        raise SystemExit(
            f"{whole} images are whole, {result.get('done')} were done (exit code {code}):\n{said[-2000:]}"
        )
    parts = quarters(samples) if samples[-1]["shards"] >= 16 else []
    peak = max(each["peak"] for each in samples)
    return {
        "command": command,
        "images": count,
        "copies": same,
        "done": whole,
        "failed": len(result["failed"]),
        "seconds": round(seconds, 1),
        "images a second": round(whole / seconds, 1),
        "peak MB": round(peak),
        "MB a thousand images": round(slope(samples), 3) if parts else None,
        "quarters": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=sorted(OPTIONS), default="extract")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--copies", action="store_true", help="of one image, instead of different ones")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = soak(given.command, given.images, given.copies, Path(folder))
    table(f"{given.command} of {given.images} images", row["quarters"] or [{"peak MB": row["peak MB"]}])
    print(json.dumps({"benchmark": "soak", **row, "machine": described_machine()}))


if __name__ == "__main__":
    main()
