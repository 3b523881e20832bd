"""Do cleaner features score better? Probes on labelled photographs: raw, denoised and baselines, with intervals.

python benchmarks/probes.py crops frames --data DATA --store-frames STORE --store-crops STORE --denoiser FILE
python benchmarks/probes.py depth discovery correspondence --data DATA --limit 40 --seeds 5
python benchmarks/probes.py product-crops product-frames product-discovery product-correspondence --data DATA --limit 60

DATA holds the folders camvid, depth, boxes and natural in the layouts of docs/probes.md. A store that is not given is
made below --cache by stage one, which is most of the time; the minutes of a section are printed before it. What is
chosen is chosen on val and scored on test. The last line of the output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dvt
from dvt.analysis.probes import HeadConfig, ProbeConfig, ProbeReport, prepare, run_probe
from dvt.analysis.probes.correspondence import Correspondence, WarpConfig, correspondence
from dvt.analysis.probes.datasets import pick
from dvt.analysis.probes.features import (
    averaged_tokens,
    cached_tokens,
    position_only,
    stored_tokens,
    with_position,
)
from dvt.analysis.probes.table import make_rows
from dvt.analysis.probes.variants import Variant
from dvt.backbones import Backbone, load_backbone
from dvt.denoiser import Denoiser, fit_linear, fit_subtract
from dvt.fields.config import DenoiseConfig, Product
from dvt.fields.image import denoise_image
from dvt.fields.images import denoise_images
from dvt.images import find_images, load_image
from dvt.store import FeatureStore
from dvt.tokens import Tokens
from dvt.views import ViewConfig

MODEL = "vit_tiny_patch16_224"
CAMVID_VOID = 11
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
Way = Callable[[Tokens], Tokens]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Mixed(FeatureStore):
    """A store whose items are made from the raw, semantic and artifact tokens (h, w, C) of an image."""

    def __init__(self, path: Path, mix: Mix) -> None:
        super().__init__(path, "raw")
        self.mix = mix

    def __getitem__(self, i: int) -> Tokens:
        terms = (torch.from_numpy(self.read(i, term)).float() for term in ("raw", "semantic", "artifact"))
        return Tokens.of(self.mix(*terms)[None])


# -- the rows ---------------------------------------------------------------------------------------------------------


def of_store(path: Path) -> dict[str, Variant]:
    """What stage one gives for each image, at several strengths."""
    rows: dict[str, Variant] = {
        "F": Mixed(path, lambda raw, f, g: f),
        "raw - G": Mixed(path, lambda raw, f, g: raw - g),
        "F, position added": Mixed(path, lambda raw, f, g: with_position(f, "add")),
        "F, position concatenated": Mixed(path, lambda raw, f, g: with_position(f, "concatenate")),
        "raw and F": Mixed(path, lambda raw, f, g: torch.cat((raw, f), dim=-1)),
    }
    for s in STRENGTHS[:-1]:
        rows[f"{s} F"] = Mixed(path, lambda raw, f, g, s=s: raw + s * (f - raw))
    return rows


def controls() -> dict[str, Way]:
    """Raw tokens given what the denoised rows have besides: position, and twice the channels."""

    def of_maps(change: Callable[[Tensor], Tensor]) -> Way:
        return lambda tokens: Tokens.of(torch.stack([change(each) for each in tokens.patches]))

    return {
        "raw, position concatenated": of_maps(lambda each: with_position(each, "concatenate")),
        "raw twice": of_maps(lambda each: torch.cat((each, each), dim=-1)),
    }


def online(shared: Denoiser, denoisers: Sequence[Path], backbone: Backbone) -> dict[str, Way]:
    """What one function makes of any image's tokens, at several strengths."""
    kinds = {"shared G": shared}
    for file in denoisers:
        kinds[file.stem] = Denoiser.from_pretrained(file).eval()
        kinds[file.stem].check_fits(backbone)
    rows: dict[str, Way] = {}
    for name, denoiser in kinds.items():
        for s in STRENGTHS:
            rows[name if s == 1 else f"{s} {name}"] = blended(denoiser, s)
        rows[f"{name}, position added"] = placed(denoiser)
        rows[f"raw and {name}"] = beside(denoiser)
    return rows


def blended(denoiser: Denoiser, strength: float) -> Way:
    def way(tokens: Tokens) -> Tokens:
        clean = denoiser(tokens.patches.float(), tokens.prefix)
        return tokens.with_patches(tokens.patches + strength * (clean - tokens.patches))

    return way


def placed(denoiser: Denoiser) -> Way:
    return lambda tokens: Tokens.of(with_position(denoiser(tokens.patches.float(), tokens.prefix)[0], "add")[None])


def beside(denoiser: Denoiser) -> Way:
    def way(tokens: Tokens) -> Tokens:
        return Tokens.of(torch.cat((tokens.patches, denoiser(tokens.patches.float(), tokens.prefix)), dim=-1))

    return way


def random_vit() -> Backbone:
    """The same architecture with weights that saw nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_backbone(MODEL, pretrained=False)


def mean_artifact(store: FeatureStore, images: Sequence[Path]) -> Denoiser:
    """Subtraction of the mean artifact of some of a store's images."""
    store = FeatureStore(store.path, "artifact")
    return fit_subtract(tokens.patches[0] for tokens in stored_tokens(store, images))


# -- CamVid -----------------------------------------------------------------------------------------------------------

PLAIN = ("F", "raw - G", "shared G", "raw and F")
"""Rows that are always scored on test, besides those chosen on val, the denoisers, the baselines and controls."""


def camvid_config(protocol: str, options: argparse.Namespace, **settings: Any) -> ProbeConfig:
    """Settings of segmentation on CamVid, with half as many images of the test as of the training."""
    return ProbeConfig(
        "segmentation",
        options.data / "camvid",
        ignore=(CAMVID_VOID,),
        protocol=protocol,
        train_images=options.limit,
        test_images=options.limit and max(2, options.limit // 2),
        cache=options.cache,
        **settings,
    )


def camvid(protocol: str, options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """Linear and kNN segmentation; the denoised variant is chosen on val by the same probe, then scored on test."""
    config = camvid_config(protocol, options, baselines=(), views=options.average_views)
    parts = {split: prepare(replace(config, evaluate=split), told) for split in ("val", "test")}
    images = [e.image for data in parts.values() for part in data.splits.values() for e in part]
    train = [e.image for e in parts["test"].splits["train"]]
    store = stage_one(options.store_frames if protocol == "frames" else options.store_crops, protocol, images, options)
    variants: dict[str, Variant] = {
        **of_store(store.path),
        **online(mean_artifact(store, train), options.denoiser, backbone),
    }
    found = {}
    for task in options.tasks:
        val = replace(config, task=task, evaluate="val", seeds=1, head=HeadConfig(epochs=options.select_epochs))
        chosen = choose(val, backbone, variants)
        names = [*PLAIN, *(file.stem for file in options.denoiser), *chosen["best"].values()]
        rows: dict[str, Variant] = {name: variants[name] for name in dict.fromkeys(names)}
        baselines = ("position-only", "linear-removal", "view-averaging")
        scored = replace(config, task=task, evaluate="test", seeds=options.seeds, baselines=baselines)
        rows |= {**controls(), "random-weights ViT": random_vit()}
        estimate(scored, backbone, len(rows) + len(baselines) + 1)
        report = run_probe(scored, backbone, rows, told)
        show(f"CamVid {protocol}, {task}, test", report, chosen)
        found[task] = {"chosen": chosen, **report.to_dict()}
    return found


def choose(config: ProbeConfig, backbone: Backbone, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """The best variant on val: of raw's width, and of any; and all scores there."""
    estimate(config, backbone, len(variants) + 1)
    report = run_probe(config, backbone, variants, told)
    scores = {row.variant: row.scores["mIoU"] for row in report.rows}
    narrow = [n for n in variants if "and" not in n.split() and "concatenated" not in n]
    best = {
        "of raw's width": max(narrow, key=scores.__getitem__),
        "of any width": max(variants, key=scores.__getitem__),
    }
    print(f"\n{config.protocol}, {config.task}, mIoU on val: {_listed(scores)}\nchosen: {best}", flush=True)
    return {"best": best, "val": scores}


def _listed(scores: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {100 * (value or 0):.1f}" for name, value in scores.items())


def estimate(config: ProbeConfig, backbone: Backbone, rows: int) -> None:
    """Print the minutes that all rows will take, estimated from one row of one seed."""
    once = replace(config, seeds=1, baselines=())
    run_probe(replace(once, head=replace(config.head, epochs=1)), backbone, progress=told)  # fills the cache
    start = time.perf_counter()
    run_probe(once, backbone)
    seconds = time.perf_counter() - start
    seeds = 1 if config.task == "knn" else config.seeds
    print(f"\n{config.task}, {config.protocol}: about {seconds * rows * seeds / 60:.1f} minutes for {rows} rows and "
          f"{seeds} seeds", flush=True)  # fmt: skip


# -- depth ------------------------------------------------------------------------------------------------------------

KITCHEN_TRAIN, KITCHEN_TEST = 40, 10


def depth(options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """Fitted on the first 40 kitchen frames; scored on the last 10, and apart on the five pictures of other places."""
    store = stage_one(options.store_depth, "depth", find_images([options.data / "depth" / "images"]), options)
    found = {}
    for name, pattern in {"kitchen": "kitchen_*", "other places": "[!k]*"}.items():
        config = ProbeConfig(
            "depth",
            blocks(options.data / "depth", options.cache / f"depth-{name.replace(' ', '-')}", pattern),
            evaluate="test",
            baselines=("position-only", "subtract", "linear-removal", "view-averaging"),
            seeds=options.seeds,
            cache=options.cache,
            views=options.average_views,
        )
        train = [e.image for e in prepare(config).splits["train"]]
        everything = {**of_store(store.path), **online(mean_artifact(store, train), options.denoiser, backbone)}
        rows = [*PLAIN, "0.5 F", "F, position added", *(file.stem for file in options.denoiser)]
        estimate(config, backbone, len(rows) + 6)
        variants = {name: everything[name] for name in rows}
        report = run_probe(config, backbone, {**variants, "random-weights ViT": random_vit()}, told)
        show(f"depth, {name}", report)
        found[name] = report.to_dict()
    return found


def blocks(source: Path, folder: Path, pattern: str) -> Path:
    """The data with split folders: a contiguous block to fit, and the last kitchen frames or the others to score."""
    kitchen = sorted(path.stem for path in (source / "images").glob("kitchen_*"))
    test = [p.stem for p in (source / "images").glob(pattern)]
    test = kitchen[-KITCHEN_TEST:] if pattern.startswith("kitchen") else sorted(test)
    for split, names in {"train": kitchen[:KITCHEN_TRAIN], "test": test}.items():
        for kind, ending in {"images": ".jpg", "depth": ".png"}.items():
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            for name in names:
                link = folder / kind / split / f"{name}{ending}"
                if not link.exists():
                    link.symlink_to((source / kind / f"{name}{ending}").resolve())
    return folder


# -- discovery --------------------------------------------------------------------------------------------------------


def discovery(options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """CorLoc of LOST and TokenCut beside boxes that see no image, with each image's mean token subtracted and not."""
    images = find_images([options.data / "boxes" / "images"])
    store = stage_one(options.store_boxes, "boxes", images, options)
    everything = {**of_store(store.path), **online(mean_artifact(store, images), options.denoiser, backbone)}
    rows = ["F", "0.5 F", "raw - G", "shared G", *(file.stem for file in options.denoiser)]
    variants = {name: everything[name] for name in rows}
    found = {}
    for method in ("lost", "tokencut"):
        for centred in (True, False):
            config = ProbeConfig(
                "discovery",
                options.data / "boxes",
                method=method,
                centred=centred,
                test_images=options.limit,
                baselines=("subtract", "linear-removal", "view-averaging"),
                views=options.average_views,
                cache=options.cache,
            )
            report = run_probe(config, backbone, {**variants, "random-weights ViT": random_vit()}, told)
            name = f"{method}, {'centred' if centred else 'as published'}"
            show(f"discovery, {name}", report)
            found[name] = report.to_dict()
    return found


# -- correspondence ---------------------------------------------------------------------------------------------------


def matches(options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """PCK under known warps: of what one function makes of tokens, and of what needs many views of each warped view.

    The second table costs minutes an image, so it has fewer images, with the same raw features and denoisers.
    """
    files = find_images([options.data / "boxes" / "images"])
    learn = pick(find_images([options.data / "natural"]), 60)
    raw = [tokens.patches[0] for tokens in cached_tokens(backbone, learn, options.cache, progress=told)]
    shared = fit_subtract(each - each.mean((0, 1)) for each in raw)
    every = online(shared, options.denoiser, backbone)
    denoisers = {file.stem: every[file.stem] for file in options.denoiser}
    ways = {"subtract": blended(shared, 1.0), "0.5 subtract": blended(shared, 0.5)}
    ways |= {"linear-removal": blended(fit_linear(raw), 1.0), "position-only": position_only}
    ways |= {"raw, position concatenated": controls()["raw, position concatenated"]}
    views = DenoiseConfig(views=ViewConfig(count=options.views))
    averages = ViewConfig(count=options.average_views)

    def both(image: Tensor) -> Tensor:
        parts = denoise_image(backbone, image, views).decomposition
        return torch.cat((parts.raw, parts.semantic), dim=-1)

    second = {"F": lambda tokens: Tokens.of(tokens.patches[..., backbone.feature_dim :])}
    fast: Passes = {"raw": (backbone, {**ways, **denoisers}), "random-weights ViT": (random_vit(), {})}
    slow: Passes = {
        "raw": (backbone, denoisers),
        "view-averaging": (per_view(lambda image: averaged_tokens(backbone, image, averages).patches[0]), {}),
        "raw and F": (per_view(both), second),
    }
    tables = {"one pass": (fast, options.match_images), "many views": (slow, options.match_views_images)}
    return {
        name: matched(
            f"correspondence, {name}", passes, pick(files, min(options.limit or count, count)), options
        ).to_dict()
        for name, (passes, count) in tables.items()
    }


Passes = dict[str, tuple[Callable[[Tensor], Tokens], Mapping[str, Way]]]
"""Row -> what makes tokens of a batch of images, and further rows that are functions of these."""


def matched(title: str, passes: Passes, files: Sequence[Path], options: argparse.Namespace) -> ProbeReport:
    """A table of one kind of rows; the minutes come from one image."""
    images, input_size = [load_image(path) for path in files], demo().input_size
    start = time.perf_counter()
    for model, own in passes.values():
        correspondence(model, images[:1], input_size, WarpConfig(), own)
    minutes = (time.perf_counter() - start) * len(images) * options.seeds / 60
    print(f"\n{title}: about {minutes:.1f} minutes for {len(images)} images and {options.seeds} draws", flush=True)
    draws: dict[str, list[Tensor]] = {}
    for seed in range(options.seeds):
        for row, (model, own) in passes.items():
            found = correspondence(model, images, input_size, WarpConfig(seed=seed), own)
            for name, statistics in found.items():
                draws.setdefault(row if name == "raw" else name, []).append(statistics)
    compare = partial(make_rows, {n: torch.stack(d) for n, d in draws.items()}, Correspondence.summarise, "PCK")
    report = ProbeReport("correspondence", "PCK", "raw", compare("raw"), {"test": len(images)}, compare=compare)
    show(title, report)
    return report


def per_view(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tokens]:
    """A backbone of batches from what is computed for one image (3, H, W)."""
    return lambda batch: Tokens.of(torch.stack([make(each) for each in batch]))


# -- the products of stage one ----------------------------------------------------------------------------------------

PRODUCTS: tuple[Product, ...] = ("blend", "removed", "ensembled")


def product_stores(name: str, images: Sequence[Path], options: argparse.Namespace) -> dict[str, FeatureStore]:
    """The store of each product with its own views, made below the cache where it is not there yet."""
    stores = {}
    for product in PRODUCTS:
        folder = options.cache / f"products-{name}-{product}"
        config = DenoiseConfig(product=product, dtype=options.dtype)
        denoise_images(demo(), sorted(set(images)), folder, config, keep_terms=True, progress=told)
        stores[product] = FeatureStore(folder, "semantic")
    return stores


def product_rows(stores: Mapping[str, FeatureStore], beside: bool) -> dict[str, Variant]:
    """Each product, and beside the raw tokens (twice the channels) where this is wanted."""
    rows: dict[str, Variant] = dict(stores)
    for name, store in stores.items() if beside else ():
        rows[f"raw and {name}"] = Mixed(store.path, lambda raw, f, g: torch.cat((raw, f), dim=-1))
    return rows


def against_both(title: str, report: ProbeReport, first: str) -> dict[str, Any]:
    """The table over raw and over another row."""
    other = report.against(first)
    show(f"{title}, over raw", report)
    show(f"{title}, over {first}", other)
    return {"over raw": report.to_dict(), f"over {first}": other.to_dict()}


def product_camvid(protocol: str, options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """Linear and kNN segmentation of each product, of raw beside it and of denoisers; nothing is chosen."""
    config = camvid_config(protocol, options, baselines=("position-only",), evaluate="test", seeds=options.seeds)
    images = [e.image for part in prepare(config, told).splits.values() for e in part]
    rows = product_rows(product_stores(protocol, images, options), beside=True)
    rows |= {file.stem: blended(Denoiser.from_pretrained(file).eval(), 1.0) for file in options.denoiser}
    rows["raw twice"] = controls()["raw twice"]
    return {
        task: against_both(
            f"products, CamVid {protocol}, {task}", run_probe(replace(config, task=task), backbone, rows, told), "blend"
        )
        for task in options.tasks
    }


def product_discovery(options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """CorLoc of each product, each image's mean token subtracted."""
    images = pick(find_images([options.data / "boxes" / "images"]), options.limit or None)
    rows = product_rows(product_stores("boxes", images, options), beside=False)
    rows |= {file.stem: blended(Denoiser.from_pretrained(file).eval(), 1.0) for file in options.denoiser}
    found = {}
    for method in ("lost", "tokencut"):
        config = ProbeConfig(
            "discovery",
            options.data / "boxes",
            method=method,
            test_images=options.limit,
            baselines=(),
            cache=options.cache,
        )
        found[method] = against_both(f"products, {method}", run_probe(config, backbone, rows, told), "blend")
    return found


def product_matches(options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """PCK under known warps: denoisers in one pass, and each product made anew of every warped view."""
    files = find_images([options.data / "boxes" / "images"])
    denoisers = {file.stem: blended(Denoiser.from_pretrained(file).eval(), 1.0) for file in options.denoiser}
    found = {}
    if denoisers:
        passes: Passes = {"raw": (backbone, denoisers)}
        report = matched("products, correspondence, one pass", passes, pick(files, options.match_images), options)
        found["one pass"] = against_both("products, correspondence, one pass", report, next(iter(denoisers)))
    if not options.match_views_images:
        return found

    def made(product: Product) -> Callable[[Tensor], Tokens]:
        config = DenoiseConfig(product=product, dtype=options.dtype)
        return per_view(lambda image: denoise_image(backbone, image, config).decomposition.semantic)

    views: Passes = {"raw": (backbone, {}), **{product: (made(product), {}) for product in PRODUCTS}}
    title = "products, correspondence, many views"
    report = matched(title, views, pick(files, options.match_views_images), options)
    return found | {"many views": against_both(title, report, "blend")}


# -- the whole --------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[argparse.Namespace, Backbone], dict[str, Any]]] = {
    "crops": lambda options, backbone: camvid("crops", options, backbone),
    "frames": lambda options, backbone: camvid("frames", options, backbone),
    "depth": depth,
    "discovery": discovery,
    "correspondence": matches,
    "product-crops": lambda options, backbone: product_camvid("crops", options, backbone),
    "product-frames": lambda options, backbone: product_camvid("frames", options, backbone),
    "product-discovery": product_discovery,
    "product-correspondence": product_matches,
}


def stage_one(given: Path | None, name: str, images: Sequence[Path], options: argparse.Namespace) -> FeatureStore:
    """The store of a section; without one it is made, after the minutes that it will take."""
    if given is not None:
        return FeatureStore(given)
    folder = options.cache / f"stage-one-{name}-{options.views}"
    backbone, config = demo(), DenoiseConfig(views=ViewConfig(count=options.views))
    start = time.perf_counter()
    denoise_image(backbone, load_image(images[0]), config)
    minutes = (time.perf_counter() - start) * len(set(images)) / 60
    print(f"stage one, {name}: about {minutes:.1f} minutes for {len(set(images))} images of {options.views} views "
          "if none is there yet; fewer --views take less", flush=True)  # fmt: skip
    denoise_images(backbone, sorted(set(images)), folder, config, keep_terms=True, progress=told)
    return FeatureStore(folder)


def told(what: str, done: int, total: int) -> None:
    """Progress on one line that is written over."""
    end = "\n" if done == total else "\r"
    if done == total or done % 10 == 0:
        print(f"  {what} {done}/{total}   ", end=end, flush=True)


def show(title: str, report: ProbeReport, chosen: Mapping[str, Any] | None = None) -> None:
    print(f"\n== {title} ({report.data.get('train', 0)} training, {report.data['test']} test images; load {load()})")
    print(report.table(), flush=True)
    for width, name in (chosen or {"best": {}})["best"].items():
        row = report.row(name)
        print(f"chosen on val {width}: {name}, {_difference(row.difference, row.difference_interval)}", flush=True)


def _difference(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "no difference defined"
    return f"{100 * value:+.2f} [{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}] points over raw"


def load() -> str:
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def demo() -> Backbone:
    return load_backbone(MODEL, weights=dvt.demo_weights())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"])
    parser.add_argument("--data", type=Path, required=True, help="folder of camvid, depth, boxes and natural")
    parser.add_argument(
        "--denoiser", type=Path, nargs="*", default=[], help="files of `dvt train`; rows by their names"
    )
    for name in ("frames", "crops", "depth", "boxes"):
        parser.add_argument(f"--store-{name}", type=Path, help="a store of `dvt denoise --keep-terms` with the images")
    parser.add_argument("--limit", type=int, help="training images; half as many of val and of test; all if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--select-epochs", type=int, default=25, help="epochs of the choice on val, of one seed")
    parser.add_argument("--tasks", nargs="+", default=["segmentation", "knn"], choices=["segmentation", "knn"])
    parser.add_argument("--views", type=int, default=24, help="views of stage one where no store is given")
    parser.add_argument("--average-views", type=int, default=10, help="views of view averaging")
    parser.add_argument("--match-images", type=int, default=20, help="photographs of correspondence")
    parser.add_argument("--match-views-images", type=int, default=6, help="of its second table, minutes each; 0: none")
    parser.add_argument("--cache", type=Path, default=Path("probes-cache"), help="folder for features, crops, stores")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the products' passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    names = list(SECTIONS) if "all" in options.sections else list(dict.fromkeys(options.sections))
    result: dict[str, Any] = {"machine": {"cpu": platform.machine(), "threads": options.threads}}
    for name in names:
        before, start = load(), time.perf_counter()
        numbers = SECTIONS[name](options, demo())
        minutes = (time.perf_counter() - start) / 60
        result[name] = {"numbers": numbers, "minutes": minutes, "load": [before, load()]}
        print(f"{name}: {minutes:.1f} minutes, load {before} -> {load()}", flush=True)
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
