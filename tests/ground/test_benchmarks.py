"""The cost model against PyTorch's counter and hand-made numbers, and the check of ratios on made-up results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dvt.fields.planted import Planted, PlantedConfig
from dvt.jobs.profile import flop_counter
from dvt.store import Job, Record, StoreWriter

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RECORDED = json.loads((BENCHMARKS / "recorded.json").read_text())["ratios"]


def script(name):
    """A module of benchmarks/, which is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


model = script("cost_model")


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "vit"),
    [
        ("vit_small_patch14_dinov2.lvd142m", (518, 518), model.VITS["vit_small_patch14_dinov2.lvd142m"]),
        ("vit_base_patch14_dinov2.lvd142m", (518, 518), model.VITS["vit_base_patch14_dinov2.lvd142m"]),
        ("vit_large_patch14_dinov2.lvd142m", (518, 518), model.VITS["vit_large_patch14_dinov2.lvd142m"]),
        ("vit_base_patch14_reg4_dinov2.lvd142m", (280, 420), model.Vit(12, 768, 14, prefix=5)),
    ],
)
def test_closed_formula_is_what_the_counter_finds(name, size, vit):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
        images = torch.empty(1, 3, *size)
    with torch.no_grad(), flop_counter() as counter:
        net.forward_features(images)
    grid = (size[0] // vit.patch, size[1] // vit.patch)
    assert vit.flops(grid) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("grid", "views"), [((8, 8), 15), ((6, 9), 31)])
def test_solver_products_are_what_the_counter_finds(photo, grid, views):
    cost = script("cost")
    problem = Planted(photo, PlantedConfig(channels=96, grid=grid, views=views))
    counted = cost.counted_linear(list(problem))
    assert cost.closed_linear(96, grid, len(problem)) == pytest.approx(counted, rel=0.06)


def test_stored_bytes_are_a_shards(tmp_path):
    maps = {term: torch.randn(16, 24, 384) for term in ("raw", "semantic")}
    records = [Record(f"{i}.jpg", f"{i:064x}", (320, 480), maps, torch.randn(5, 384)) for i in range(4)]
    with StoreWriter(tmp_path, Job("vit", "ab")) as writer:
        size = writer.write("shard", records).stat().st_size
    assert size == pytest.approx(4 * model.stored_bytes(384, (16, 24), 5, 2), rel=0.02)


def test_seconds_add_up_or_overlap():
    work = model.Work(forward=10.0, launches=3.0, decoded=8.0, stored=5.0)
    rates = dict.fromkeys((*model.DEVICE, *model.HOST, "stored"), 1.0)
    turns = model.Machine("turns", rates, efficiency=0.5, cores=4, overlap=False)
    assert turns.seconds(work) == {"device": 23.0, "host": 2.0, "writer": 5.0, "all": 30.0}
    assert model.Machine("at once", rates, efficiency=0.5, cores=4).seconds(work)["all"] == 23.0
    assert model.Machine("writers", rates, efficiency=0.5, writers=5).seconds(work)["writer"] == 1.0


def test_work_adds_and_scales_every_field():
    one = model.Work(*range(1, 13))
    assert one + one == one * 2
    assert (one * 3).stored == 36


def test_solving_together_only_shares_launches():
    alone, together = model.linear(768, (37, 37), 65), model.linear(768, (37, 37), 65, batch=8)
    for name, work in alone.items():
        assert together[name].launches == work.launches / 8
        assert together[name].double == work.double


def test_ten_million_images():
    fleet = model.Fleet(10_000_000, rate=100.0, image_bytes=4e6, shard_images=64)
    assert fleet.node_hours == pytest.approx(10_000_000 / 800 / 3600)
    assert (fleet.nodes(24), fleet.nodes(1)) == (1, 4)
    assert (fleet.shards, fleet.shard_bytes) == (156_250, 256e6)


# -- the check --------------------------------------------------------------------------------------------------------


def results(**changes):
    """Lines as the benchmarks write them, made so that each ratio is the recorded one, or the one in `changes`."""
    values = {name: entry["value"] for name, entry in RECORDED.items()} | changes
    models = ("vit_small_patch16_224", "vit_base_patch16_224")
    jobs = ("extract", "denoise", "training")
    latency = [
        {
            "model": name,
            "ratio": values[f"{name} with its denoiser over alone, time"],
            "megabytes": 2.0,
            "megabytes_with": 2 * values[f"{name} with its denoiser over alone, memory"],
            "parameter_share": values[f"{name}'s denoiser over the backbone, parameters"],
        }
        for name in models
    ]
    errors = {"F over tokens": "F", "G": "G", "semantic": "semantic"}
    views = [
        {"views": count, **{key: values[f"error of {short}, {count} views"] for key, short in errors.items()}}
        for count in (16, 48, 256)
    ]
    solvers = [
        {"solver": "linear, fixed resolution 64", "processor_seconds": 9.0, "G": 9.0},
        {"solver": "linear, defaults", "processor_seconds": 0.5, "G": 3 * values["linear over neural, error of G"]},
        {
            "solver": "neural, 8 levels, 1,000 steps",
            "processor_seconds": values["neural over linear, processor"] / 2,
            "G": 3.0,
        },
        {"solver": "neural, 8 levels, 2,000 steps, lr .01", "processor_seconds": 9.0, "G": 9.0},
    ]
    with_outliers = values["error of F with outliers over without"]
    outliers = [
        {"outliers": share, "robust": robust, "F over tokens / clean": with_outliers if share and robust else 9.0}
        for share in (0.0, 0.02)
        for robust in (True, False)
    ]
    local = {
        "rows": [{"job": job, "predicted / measured": values[f"{job}, predicted over measured"]} for job in jobs],
        "solver_share": {"measured": values["the solver's share of stage one"]},
        "stored_over_formula": values["a shard's bytes over the formula's"],
    }
    speed = {
        "over_loop": {"median": values["extract over the bare loop, images a second"]},
        "rows": [
            {"what": "loop", "processor_seconds": 2 * values["extract over the bare loop, processor"]},
            {"what": "forward", "processor_seconds": 2 * values["extract over the forward pass, processor"]},
            {"what": "extract", "processor_seconds": 2.0},
        ],
    }
    stored = {
        "store[i] over .npy": values["a store's items over .npy files"],
        "store[[...]] over .npy, stacked": values["a store's batches over stacked .npy files"],
        "DataLoader of the store over DataLoader of .npy": values["a store's loader over one of .npy files"],
    }
    flops = {"worst": values["FLOPs off the formulas, 1 and the worst"] - 1}
    return [
        {"torch": "2", "cost": {"flops": flops, "local": local}, "store": {"ratios": stored}},
        {"threads": 1, "planted": {"rows": solvers, "outliers": outliers}, "views": {"rows": views}},
        {"machine": {"cpu": "x"}, "latency": latency},
        {"machine": "x", "speed": speed},
        {"data": "digits", "conditions": {}},
    ]


def check(tmp_path, lines, *arguments):
    """Exit code, last line, and all of the output."""
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(BENCHMARKS / "check.py"), str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_recorded_ratios_are_those_of_the_check():
    ratios = script("check").ratios({name: value for line in results() for name, value in line.items()})
    assert ratios.keys() == RECORDED.keys()
    assert ratios == pytest.approx({name: entry["value"] for name, entry in RECORDED.items()})


def test_recorded_ratios_pass(tmp_path):
    code, outcome, _ = check(tmp_path, results())
    assert (code, outcome) == (0, {"checked": len(RECORDED), "worse": {}})


def test_each_ratio_made_worse_is_found():
    module = script("check")
    entries = {name: module.Recorded(**entry) for name, entry in RECORDED.items()}
    for name, entry in entries.items():
        sign = -1 if entry.better == "higher" else 1
        for factor, verdict in ((0.99, "ok"), (1.01, "WORSE"), (-9.0, "ok")):  # inside, outside, and far better
            changed = {name: entry.value * (1 + sign * factor * entry.tolerance)}
            lines = results(**changed)
            found = module.ratios({key: value for line in lines for key, value in line.items()})
            verdicts = {row["ratio"]: row["verdict"] for row in module.compare(found, entries)}
            assert verdicts == dict.fromkeys(entries, "ok") | {name: verdict}


def test_a_worse_ratio_fails_and_is_named(tmp_path):
    name = "extract over the bare loop, images a second"
    code, outcome, told = check(tmp_path, results(**{name: 0.1}))
    assert code == 1
    assert outcome["worse"] == {name: 0.1}
    assert "1 of" in told


def test_a_benchmark_that_is_missing_fails(tmp_path):
    code, outcome, told = check(tmp_path, results()[:3])
    assert code == 1
    assert set(outcome["worse"]) == {name for name in RECORDED if name.startswith("extract over")}
    assert "missing" in told


def test_record_takes_medians_and_twice_the_spread(tmp_path):
    name, files = "neural over linear, processor", []
    for number, value in enumerate((10.0, 11.0, 9.5)):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in results(**{name: value})))
    target = tmp_path / "recorded.json"
    code, outcome, _ = check(tmp_path, results(**{name: 10.0}), *files, "--record", "--recorded", target)
    assert (code, outcome["runs"]) == (0, 4)
    entries = json.loads(target.read_text())["ratios"]
    assert (entries[name]["value"], entries[name]["spread"], entries[name]["tolerance"]) == (10.0, 0.15, 0.3)
    assert entries["error of G, 48 views"]["tolerance"] == 0.02
    assert entries.keys() == RECORDED.keys()
    assert check(tmp_path, results(**{name: 10.0}), "--recorded", target)[0] == 0
