"""Do what the table of Denoising Vision Transformers does, from images to numbers beside the paper's.

python run.py --model dinov2 --data VOC2012=/data/VOC2012 ADE20K=/data/ade NYUv2=/data/nyu VOC2007=/data/VOC2007
python run.py --model clip --published --data VOC2012=/data/VOC2012      with the authors' own denoiser from the hub
python run.py --model clip --published FOLDER --data VOC2012=...         the same from a folder of their files
python run.py --smoke                                                    all steps on tiny folders and the bundled model

Stage one decomposes --images training images of VOC 2012, stage two trains a denoiser, and the probes score raw and
denoised features: linear segmentation (VOC 2012, ADE20K), depth (NYUv2), object discovery (VOC 2007). Every step is a
`dvt` command that goes on where it was stopped; a step that is done is not run again. Before hours are spent, layouts
and weights are checked and the time is predicted; --only-check stops there. The paper's numbers are in paper.json.

The protocol is the paper's in data, splits, sizes, views (768 with --solver neural, which is slow) and denoiser. The
heads are those of `dvt probe`, not mmsegmentation's: examples/mmseg/ trains the latter. So compare differences first.
"""

from __future__ import annotations

import argparse
import html
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import dvt
from dvt.cli import main as run_dvt
from dvt.errors import DvtError
from dvt.files import whole_file

HERE = Path(__file__).parent
PAPER = json.loads((HERE / "paper.json").read_text())
ALIASES = {"dinov2_vitb14": "dinov2", "dinov2_vitb14_reg": "dinov2_reg"}


@dataclass(frozen=True)
class Task:
    """One column group of the table: the probe, its layout and licence, the scores, and the images that it reads."""

    probe: str
    layout: str
    scores: tuple[str, ...]
    options: tuple[str, ...]
    terms: str


TASKS = {
    "VOC2012": Task(
        *("segmentation", "voc", ("mIoU",), ("--ignore", "255", "--evaluate", "val")),
        "images from flickr, under flickr's terms; see the VOC 2012 site",
    ),
    "ADE20K": Task(
        *("segmentation", "ade20k", ("mIoU",), ("--evaluate", "val")),
        "for non-commercial research and education; see the ADE20K site",
    ),
    "NYUv2": Task("depth", "nyuv2", ("RMSE", "AbsRel"), ("--evaluate", "test"), "see the NYU Depth V2 site"),
    "VOC2007": Task(
        "discovery", "voc", ("CorLoc",), (), "images from flickr, under flickr's terms; see the VOC 2007 site"
    ),
}


class Step:
    """Run `dvt` commands in one folder, each once: its result is kept beside its outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, arguments: Sequence[object]) -> float:
        """Run a command unless it was done with these arguments; return its seconds, of now or of then."""
        words = [str(each) for each in arguments]
        mark = self.folder / f"{name}.done.json"
        if mark.exists() and (done := json.loads(mark.read_text()))["arguments"] == words:
            print(f"== {name}: done before, in {done['seconds']:.0f} s")
            return done["seconds"]
        print(f"== {name}: dvt {' '.join(words)}", flush=True)
        start = time.perf_counter()
        if code := run_dvt(words):
            raise SystemExit(f"{name} ended with code {code}; mend what it says and run the same command again")
        seconds = time.perf_counter() - start
        with whole_file(mark) as part:
            part.write_text(json.dumps({"arguments": words, "seconds": seconds}) + "\n")
        return seconds


# -- before hours are spent -------------------------------------------------------------------------------------------


def check(options: argparse.Namespace, data: dict[str, Path]) -> dict[str, int]:
    """Open every data set as its probe will, name its terms, and count images; nothing is computed."""
    from dvt.analysis.probes.datasets import open_data

    counts = {}
    for name, root in data.items():
        task = TASKS[name]
        target = {"segmentation": "labels", "depth": "depth", "discovery": "boxes"}[task.probe]
        found = open_data(root, target, layout=task.layout, ignore=(255,) if name == "VOC2012" else ())
        counts[name] = sum(len(part) for part in found.splits.values())
        parts = ", ".join(f"{split} {len(part)}" for split, part in found.splits.items())
        print(f"{name}: {root}, {found.layout} ({parts}); terms: {task.terms}")
    images = training_images(options, data)
    print(f"stage one: {len(images)} images of {images[0].parent}")
    return {**counts, "stage one": len(images)}


def training_images(options: argparse.Namespace, data: dict[str, Path]) -> list[Path]:
    """The first images of VOC 2012, without those that are scored: those of Segmentation/val."""
    root = data.get("VOC2012") or next(iter(data.values()))
    scored: set[str] = set()
    for split in sorted(root.rglob("ImageSets/Segmentation/val.txt")):
        scored |= set(split.read_text().split())
    paths = [path for path in sorted(root.rglob("*.jpg")) if path.stem not in scored]
    if not paths:
        raise SystemExit(f"{root} holds no training images (*.jpg)")
    return paths[: options.images]


def given_denoiser(options: argparse.Namespace) -> Path | None:
    """Find the denoiser that takes the place of stages one and two, and refuse one that does not fit; None without."""
    from dvt.denoiser import Denoiser
    from dvt.denoiser.published import published_file

    name = options.backbone[0]
    if options.denoiser is not None:
        found = Path(options.denoiser)
    elif options.published is None:
        return None
    elif options.published == "hub":
        found = published_file(name)
    else:
        places = [Path(options.published) / each / f"{name}.pth" for each in ("voc_denoised", "")]
        there = [place for place in places if place.is_file()]
        if not there:
            raise SystemExit(f"--published: there is neither {places[0]} nor {places[1]}")
        found = there[0]
    Denoiser.from_pretrained(found).check_fits(load(options))
    return found.resolve()


def predict(options: argparse.Namespace, counts: dict[str, int], images: list[Path]) -> dict[str, float]:
    """Predict minutes and dollars from one image of stage one and one forward pass, timed here."""
    import torch

    from dvt.devices import finish_all
    from dvt.fields.config import DenoiseConfig
    from dvt.fields.image import denoise_image
    from dvt.images import read_image
    from dvt.views import ViewConfig, resize

    backbone = load(options)
    count = options.views or 64
    few = min(8, count)
    config = DenoiseConfig(views=ViewConfig(count=few), product="ensembled", dtype="auto")
    pixels = read_image(images[0])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        denoise_image(backbone, pixels, config)
        seconds.append((time.perf_counter() - start) * (1 + count) / (1 + few))
    size = backbone.input_size((pixels.shape[1], pixels.shape[2]))
    batch = resize(pixels, size)[None].to(backbone.device)
    start = time.perf_counter()
    with torch.no_grad():
        backbone(batch)
    finish_all(backbone.device)
    forward = time.perf_counter() - start
    probes = sum(number for name, number in counts.items() if name != "stage one")
    found = {
        "stage one": 0.0 if options.denoiser else counts["stage one"] * seconds[-1] / 60,
        "stage two": 0.0 if options.denoiser else options.steps * 3 * 8 * forward / 12 / 60,
        "probes": 2 * probes * forward / 60 * (1 + options.epochs / 25),
    }
    total = sum(found.values())
    parts = ", ".join(f"{name} {minutes:,.1f}" for name, minutes in found.items())
    print(
        f"predicted on {backbone.device}: {total:,.1f} minutes ({parts}), {total / 60 * options.dollars:,.2f} dollars"
    )
    print("  a rough forecast: one image timed here; a neural solver takes 100 to 160 s an image on the paper's GPU")
    return {**found, "total": total, "dollars": total / 60 * options.dollars}


def load(options: argparse.Namespace) -> Any:
    from dvt.devices import find_device

    name, weights = options.backbone
    weights = dvt.demo_weights() if weights == "demo" else weights
    return dvt.load_backbone(name, weights=weights, size=options.size).to(find_device(options.device))


# -- the steps --------------------------------------------------------------------------------------------------------


def steps(options: argparse.Namespace, data: dict[str, Path], images: list[Path], out: Path) -> dict[str, Any]:
    """Run stage one, stage two and the probes; return the report of each probe."""
    step, name, weights = Step(out), *options.backbone
    model = ["--backbone", name, *(["--weights", weights] if weights else []), "--device", options.device]
    model += ["--size", options.size] if options.size else []
    listed = out / "training.txt"
    listed.write_text("".join(f"{path.resolve()}\n" for path in images))
    denoiser = options.denoiser
    if denoiser is None:
        views = ["--views", options.views] if options.views else []
        stage = ["--product", "ensembled", "--solver", options.solver, *views, "--no-pictures"]
        step("stage-one", ["denoise", listed, *model, *stage, "--out", out / "store"])
        denoiser = out / "denoiser.safetensors"
        training = ["--steps", options.steps, "--batch-size", min(8, len(images)), "--device", options.device]
        step("stage-two", ["train", out / "store", "--out", denoiser, *training])
    reports = {}
    for task, root in data.items():
        about, report = TASKS[task], out / f"{task}.json"
        head = ["--head.epochs", options.epochs] if about.probe in ("segmentation", "depth") else []
        arguments = ["probe", about.probe, root, *model, "--denoiser", denoiser, "--force", "--layout", about.layout]
        arguments += [*about.options, *head, "--seeds", options.seeds, "--baselines", "--cache", out / "cache"]
        step(task, [*arguments, "--out", report])
        reports[task] = json.loads(report.read_text())
    return reports


# -- the table --------------------------------------------------------------------------------------------------------


def rows(family: dict[str, Any], reports: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a score: ours and the paper's, raw and denoised, with the differences and our interval."""
    found = []
    for task, report in reports.items():
        ours = {row["variant"]: row for row in report["rows"]}
        for score in TASKS[task].scores:
            paper = family["numbers"].get(task, {}).get(score, {})
            raw, clean = (ours[each]["scores"][score] for each in ("raw", "denoised"))
            headline = report["metric"] == score
            found.append(
                {
                    "task": task,
                    "score": score,
                    "our raw": raw,
                    "our denoised": clean,
                    "difference": clean - raw,
                    "interval": ours["denoised"]["difference_interval"] if headline else None,
                    "paper's raw": paper.get("raw"),
                    "paper's denoised": paper.get("denoised"),
                    "paper's difference": paper["denoised"] - paper["raw"] if paper else None,
                    "paper's table": PAPER["tables"][task] if paper else "not sourced",
                }
            )
    return found


def text(row: dict[str, Any]) -> dict[str, str]:
    """The row as it is printed: shares in per cent, errors in their unit, a dash where nothing is known."""
    share = row["score"] not in ("RMSE", "AbsRel")

    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{100 * value:{sign}.2f}" if share else f"{value:{sign}.4f}"

    cells: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, str):
            cells[name] = f"{value} %" if name == "score" and share else value
        elif name == "interval":
            cells["95 %"] = "-" if value is None else f"[{number(value[0], '+')}, {number(value[1], '+')}]"
        elif name not in cells:
            cells[name] = number(value, "+" if "difference" in name else "")
    return cells


def print_table(lines: list[dict[str, str]]) -> None:
    """Print the table, and in two parts if it is wide."""
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in lines[0]}
    for line in ({name: name for name in widths}, *lines):
        print("  ".join(line[name].rjust(width) for name, width in widths.items()))


def write_page(path: Path, title: str, lines: list[dict[str, str]], notes: list[str]) -> None:
    """Write the table as a page that needs nothing else."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line.values()) + "</tr>" for line in lines
    )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "div{overflow-x:auto}table{border-collapse:collapse;font-size:.85em}th,td{padding:.3em .5em;text-align:right;"
        "border-bottom:1px solid #ccc;white-space:nowrap}td:first-child,th:first-child{text-align:left}"
    )
    page = f"""<!doctype html><html lang="en">
<meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{style}</style><h1>{html.escape(title)}</h1>
<div><table><tr>{head}</tr>{body}</table></div><ul>{listed}</ul></html>
"""
    with whole_file(path) as part:
        part.write_text(page)


# -- smoke ------------------------------------------------------------------------------------------------------------


def smoke_data(root: Path) -> dict[str, Path]:
    """Tiny data sets in the layouts of the real ones, cut from the bundled photographs, with made-up labels."""
    rng, photos = np.random.default_rng(0), sorted((Path(dvt.__file__).parent / "data" / "photos").glob("*.jpg"))
    names = [f"{number:04}" for number in range(6)]
    makers: dict[str, Callable[[Path], None]] = {
        "VOC2012": lambda to: _voc(to, names, rng, "Segmentation"),
        "ADE20K": lambda to: _ade(to, names, rng),
        "NYUv2": lambda to: _nyu(to, names, rng),
        "VOC2007": lambda to: _voc(to, names, rng, "Main"),
    }
    for name, make in makers.items():
        if not (root / name).exists():
            part = root / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            for number, path in enumerate(sorted(part.rglob("*.jpg"))):
                _photo(photos[number % len(photos)], number).save(path, quality=90)
            part.rename(root / name)
    return {name: root / name for name in makers}


def _photo(path: Path, number: int) -> Image.Image:
    image = Image.open(path).convert("RGB").resize((144 + 8 * number, 108 + 6 * number))
    return image.crop((4 * number, 3 * number, 4 * number + 128, 3 * number + 96))


def _blocks(rng: np.random.Generator, classes: int) -> np.ndarray:
    return rng.integers(0, classes, (6, 8), dtype=np.uint8).repeat(16, 0).repeat(16, 1)


def _empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def _voc(root: Path, names: list[str], rng: np.random.Generator, kind: str) -> None:
    sets = {"train": names[:4], "val": names[4:]}
    for split, chosen in sets.items():
        for each in ("Segmentation", "Main"):
            _empty(root / "ImageSets" / each / f"{split}.txt").write_text("".join(f"{name}\n" for name in chosen))
    for name in names:
        _empty(root / "JPEGImages" / f"{name}.jpg")
        if kind == "Segmentation":
            Image.fromarray(_blocks(rng, 3)).save(_empty(root / "SegmentationClass" / f"{name}.png"))
        box = "<bndbox><xmin>30</xmin><ymin>20</ymin><xmax>100</xmax><ymax>80</ymax></bndbox>"
        _empty(root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>128</width><height>96</height><depth>3</depth></size>"
            f"<object><name>cat</name><difficult>0</difficult>{box}</object></annotation>\n"
        )


def _ade(root: Path, names: list[str], rng: np.random.Generator) -> None:
    for split, chosen in (("training", names[:4]), ("validation", names[4:])):
        for name in chosen:
            _empty(root / "images" / split / f"{name}.jpg")
            Image.fromarray(1 + _blocks(rng, 3)).save(_empty(root / "annotations" / split / f"{name}.png"))


def _nyu(root: Path, names: list[str], rng: np.random.Generator) -> None:
    for split, chosen in (("train", names[:4]), ("test", names[4:])):
        for name in chosen:
            folder = root / "official_splits" / split / "kitchen"
            _empty(folder / f"rgb_{name}.jpg")
            depth = 1000 + 500 * _blocks(rng, 4).astype(np.uint16)
            Image.fromarray(depth).save(_empty(folder / f"sync_depth_{name}.png"))


# -- the command ------------------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2", help=f"one of {', '.join(PAPER['families'])}")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER", help=", ".join(TASKS))
    parser.add_argument("--out", type=Path, default=Path("reproduced"))
    parser.add_argument("--images", type=int, default=10_000, help="of stage one; the paper's number")
    parser.add_argument("--solver", choices=("linear", "neural"), default="linear", help="the paper's is neural")
    parser.add_argument("--views", type=int, help="of each image; the paper's number is 768")
    parser.add_argument("--steps", type=int, default=10_000, help="of stage two")
    parser.add_argument("--epochs", type=int, default=25, help="of the linear heads")
    parser.add_argument("--seeds", type=int, default=3)
    published = "take the authors' denoiser from the hub, or from FOLDER: FOLDER/[voc_denoised/]NAME.pth"
    parser.add_argument("--published", nargs="?", const="hub", metavar="FOLDER", help=published)
    parser.add_argument("--denoiser", help="a denoiser's file, instead of both stages; the authors' .pth too")
    parser.add_argument("--weights", help="the backbone's weights, a file instead of the hub")
    parser.add_argument("--size", type=int, help="shorter side of the model's input; by default the model's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dollars", type=float, default=3.5, help="an hour of the machine")
    parser.add_argument("--only-check", action="store_true", help="stop after the checks and the forecast")
    parser.add_argument("--smoke", action="store_true", help="all steps on tiny data and the bundled model")
    return parser.parse_args(arguments)


def chosen_data(options: argparse.Namespace) -> dict[str, Path]:
    found = {}
    for each in options.data:
        name, _, folder = each.partition("=")
        if name not in TASKS or not folder:
            raise SystemExit(f"--data takes NAME=FOLDER with NAME one of {', '.join(TASKS)}; got {each!r}")
        found[name] = Path(folder)
    if not found:
        raise SystemExit("give at least one data set: --data VOC2012=/data/VOC2012, or try --smoke")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    key = ALIASES.get(options.model, options.model)
    if key not in PAPER["families"]:
        raise SystemExit(f"--model {options.model!r} is none of {', '.join(PAPER['families'])}")
    family = PAPER["families"][key]
    options.backbone = (family["backbone"], options.weights)
    if options.smoke:
        options.backbone, options.size = ("vit_tiny_patch16_224", "demo"), 96
        options.images, options.views, options.steps, options.epochs, options.seeds = 4, 6, 4, 2, 2
        options.out.mkdir(parents=True, exist_ok=True)
        data = smoke_data(options.out / "data")
    else:
        data = chosen_data(options)
    counts = check(options, data)
    images = training_images(options, data)
    options.denoiser = given_denoiser(options)
    forecast = predict(options, counts, images)
    if options.only_check:
        return 0
    start = time.perf_counter()
    reports = steps(options, data, images, options.out / key)
    found = rows(family, reports)
    lines = [text(row) for row in found]
    notes = [f"{task}: table {PAPER['tables'][task]} of the paper; {PAPER['sources'][task]}" for task in reports]
    notes += [PAPER["about tables"], PAPER["missing"]]
    notes.append(f"took {(time.perf_counter() - start) / 60:.1f} minutes, predicted {forecast['total']:.1f}")
    if options.smoke:
        notes.insert(0, "SMOKE: tiny folders, made-up labels and the bundled model; our columns mean nothing here")
    print(f"\n{family['title']} ({options.backbone[0]})")
    print_table(lines)
    print("\n".join(f"note: {note}" for note in notes))
    write_page(options.out / f"{key}.html", f"{family['title']}: ours and the paper's", lines, notes)
    with whole_file(options.out / f"{key}.json") as part:
        part.write_text(json.dumps({"rows": found, "forecast": forecast, "notes": notes}, indent=1) + "\n")
    print(f"page: {options.out / f'{key}.html'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DvtError as error:  # data in another layout, weights that are not there
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
