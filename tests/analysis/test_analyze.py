"""The analysis: planted artifacts, nulls, one pass for all layers, and a report that comes back from disk."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt import grids
from dvt.analysis import AnalyzeConfig, PositionMeans, Report, analyze, torus_windows
from dvt.analysis.metrics import artifacts as metrics
from dvt.analysis.metrics import scores
from dvt.analysis.metrics.information import mic, most_informative
from dvt.analysis.metrics.nulls import shuffled, token_maps
from dvt.analysis.metrics.ridge import held_out
from dvt.analysis.page.viewer import quantise
from dvt.backbones import families
from dvt.errors import BackboneError, ConfigError, ImageError, ShapeError
from dvt.fields.planted import relative_error
from dvt.store import FeatureStore, Job, Record, StoreWriter
from dvt.tokens import Tokens

CHANNELS = 24
SMALL = AnalyzeConfig(share_images=3, windows=4, shift_images=2, mic_images=2, layer_images=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def artifact(grid, strength):
    """Smooth waves, a ramp and a checkerboard; root mean square `strength` times that of the content."""
    x, y = grids.grid_centres(grid).unbind(-1)
    board = (-1.0) ** (torch.arange(grid[0])[:, None] + torch.arange(grid[1]))
    shapes = torch.stack((x - x.mean(), y - y.mean(), torch.sin(6 * x) * 0.3, board * 0.3), dim=-1)
    made = shapes @ noise(4, CHANNELS, seed=7)
    made = made - made.mean((0, 1))
    return strength * made / made.square().mean().sqrt()


def planted_backbone(strength, size=160):
    """A convolution of patches, which knows no position, plus a known artifact; content has unit variance."""
    weight = noise(CHANNELS, 3, 16, 16, seed=3)
    weight = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]

    def tokens(module, images):
        content = torch.nn.functional.conv2d(images, weight, stride=16).permute(0, 2, 3, 1)
        content = content / 1.5
        return Tokens.of(content + artifact(tuple(content.shape[1:3]), strength))

    return dvt.wrap(
        torch.nn.Identity(),
        tokens,
        16,
        name="planted",
        image_size=size,
        feature_dim=CHANNELS,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def photos(count=6, size=(180, 220), seed=0):
    """Smooth random colours, brighter above, as a sky is: position can be read from their layout."""
    made = []
    for number in range(count):
        coarse = noise(1, 3, 9, 11, seed=seed + number) * 0.2
        picture = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0]
        made.append((picture + 0.8 - 0.6 * torch.linspace(0, 1, size[0])[None, :, None]).clamp(0, 1))
    return made


@pytest.fixture(scope="module")
def tiny():
    return dvt.load_backbone("test_vit", pretrained=False)


@pytest.fixture(scope="module")
def report():
    remove = {"cleaned": lambda t: t.with_patches(t.patches - artifact(t.grid, 1.0))}
    return analyze(planted_backbone(1.0), photos(), SMALL, variants=remove)


# --- the pieces


def test_torus_windows_hold_what_the_mirrored_image_holds():
    image = torch.rand(3, 20, 30, generator=generator())
    windows = torus_windows(image, (16, 24), 4, seed=5)
    torus = torch.cat((image, image.flip(-1)), -1)
    torus = torch.cat((torus, torus.flip(-2)), -2)
    places = [
        (y, x)
        for window in windows
        for y in range(40)
        for x in range(60)
        if torch.equal(torus.roll((-y, -x), (1, 2))[:, :16, :24], window)
    ]
    assert len(places) == 4 and len(set(places)) == 4
    with pytest.raises(ConfigError, match="even"):
        torus_windows(image, (16, 24), 3, seed=0)
    with pytest.raises(ShapeError, match="half"):
        torus_windows(image, (48, 24), 2, seed=0)


def test_torus_windows_show_every_place_equally_often_at_every_position():
    """The mean over many windows is the image's mean everywhere, though the image is a ramp."""
    image = torch.linspace(0, 1, 32)[None, :, None].expand(3, 32, 32).contiguous()
    mean = torus_windows(image, (32, 32), 512, seed=0).mean((0, 1))
    assert float((mean - 0.5).abs().max()) < 0.01


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 3.0])
def test_position_share_is_the_planted_one(strength):
    means = PositionMeans()
    for number in range(6):
        means.add(noise(16, 9, 8, CHANNELS, seed=number) + artifact((9, 8), strength))
    share = means.share()
    truth = strength**2 / (1 + strength**2)
    assert share.own.value == pytest.approx(truth, abs=0.01)
    assert share.shared.value == pytest.approx(truth, abs=0.01)
    assert share.own_interval[0] - 0.01 <= truth <= share.own_interval[1] + 0.01
    assert share.shared.beyond_chance == (strength > 0)
    if strength >= 1:
        assert relative_error(share.artifact, artifact((9, 8), strength)) < 0.2


def test_an_artifact_of_each_image_is_its_own_and_not_shared():
    means = PositionMeans()
    for number in range(8):
        own = noise(9, 8, CHANNELS, seed=100 + number)
        means.add(noise(16, 9, 8, CHANNELS, seed=number) + own - own.mean((0, 1)))
    share = means.share()
    assert share.own.value == pytest.approx(0.5, abs=0.03)
    assert abs(share.shared.value) < 0.05


def test_position_share_of_smooth_content_lies_within_its_null_most_of_the_time():
    """The null keeps the smoothness: permuting the tokens would give an interval several times too narrow."""
    outside = 0
    for seed in range(20):
        means = PositionMeans(seed=seed)
        for number in range(4):
            coarse = torch.fft.rfft2(noise(8, CHANNELS, 12, 12, seed=1000 * seed + number))
            coarse[..., 3:] = 0
            coarse[..., 3:-2, :] = 0
            means.add(torch.fft.irfft2(coarse, s=(12, 12)).movedim(1, -1))
        outside += means.share(resamples=2).own.beyond_chance
    assert outside <= 4


def test_metric_curves_grow_with_the_planted_artifact():
    """Decodability, MIC, grid peak and position share against growing G; only the first is near its null without G."""
    curves = {name: [] for name in ("position_own", "position_r2", "position_mic", "grid_peak")}
    for strength in (0.0, 0.3, 1.0, 3.0):
        found = analyze(planted_backbone(strength), photos(), SMALL)
        for name, values in curves.items():
            values.append(found.get(name).value)
    for name, values in curves.items():
        assert all(low < high for low, high in pairwise(values)), (name, values)
    assert curves["position_own"][0] < 0.05 and curves["position_own"][-1] > 0.7


def test_shuffled_positions_give_the_null_within_its_interval():
    maps = [Tokens.of(noise(10, 12, CHANNELS, seed=n) + artifact((10, 12), 1.0)) for n in range(6)]
    strong = {row.metric: row for row in scores.static_rows(maps, generator(3), 8, 2, 4)}
    outside = dict.fromkeys(("position_r2", "position_mic", "pooled_mic", "grid_peak"), 0)
    for seed in range(8):
        for row in scores.static_rows(shuffled(maps, generator(seed)), generator(100 + seed), 8, 2, 4):
            if row.metric in outside:
                outside[row.metric] += not row.null_low <= row.value <= row.null_high
                assert strong[row.metric].value > row.null_high
    assert max(outside.values()) <= 2, outside


def test_rows_equal_the_metrics():
    maps = [Tokens.of(noise(10, 12, CHANNELS, seed=n) + artifact((10, 12), 0.5)) for n in range(5)]
    rows = {row.metric: row for row in scores.static_rows(maps, generator(), 3, 5, None)}
    assert rows["position_r2"].value == pytest.approx(metrics.position_decodability(maps), abs=1e-9)
    assert rows["position_mic"].value == pytest.approx(metrics.position_mic(maps), abs=1e-6)
    assert rows["pooled_mic"].value == pytest.approx(metrics.pooled_position_mic(maps, 1), abs=1e-6)
    assert rows["outlier_share"].value == pytest.approx(metrics.norm_outliers(maps).share, abs=1e-9)
    assert rows["grid_peak"].value == pytest.approx(metrics.grid_peak(maps), rel=1e-6)


def test_pooled_mic_tells_a_code_of_position_from_smoothness():
    """Smooth maps of their own: MIC within images is far beyond its shuffled null, the pooled one within its own."""

    def smooth(seed):
        coarse = torch.fft.rfft2(noise(CHANNELS, 12, 14, seed=seed))
        coarse[:, 3:-2] = 0
        coarse[:, :, 3:] = 0
        made = torch.fft.irfft2(coarse, s=(12, 14)).movedim(0, -1)
        return made / made.std()

    plain = [Tokens.of(smooth(n)) for n in range(8)]
    coded = [Tokens.of(each.patches[0] + artifact((12, 14), 1.0)) for each in plain]
    rows, found = (
        {row.metric: row for row in scores.static_rows(maps, generator(1), 6, 8, 4)} for maps in (plain, coded)
    )
    assert rows["position_mic"].value > rows["position_mic"].null_high
    assert rows["pooled_mic"].value <= rows["pooled_mic"].null_high
    assert found["pooled_mic"].value > found["pooled_mic"].null_high


def test_pooled_mic_takes_the_commonest_grid_and_says_so():
    maps = [Tokens.of(noise(*shape, CHANNELS, seed=n)) for n, shape in enumerate([(8, 9), (9, 8), (8, 9)])]
    row = scores.pooled_mic_row(maps, generator(), 3)
    assert row.images == 2 and "1 image of other grids left out" in row.note
    alone = {row.metric: row for row in scores.static_rows(maps[:1], generator(), 3, 1, 4)}["pooled_mic"]
    assert alone.value is None and "two or more images" in alone.note


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(60):
        row = scores._mean_row("blank_energy", noise(30, seed=seed).double(), None, generator(seed))
        covered += row.low <= 0 <= row.high
    assert 50 <= covered <= 60


def test_blocks_of_targets_have_strengths_of_their_own():
    groups = [(noise(30, 8, seed=n), noise(30, 4, seed=50 + n)) for n in range(6)]
    groups = [(x, torch.cat((x[:, :2] + 0.1 * y[:, :2], y[:, 2:]), 1)) for x, y in groups]
    both = held_out(groups[:4], groups[4:], width=2).r2()
    apart = [
        held_out([(x, y[:, part]) for x, y in groups[:4]], [(x, y[:, part]) for x, y in groups[4:]]).r2()
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert both.tolist() == pytest.approx(torch.cat(apart).tolist(), abs=1e-9)


def test_candidates_hold_the_most_informative_channel():
    position = torch.arange(12.0).repeat(10)
    features = noise(120, 60)
    features[:, 17] += position * 0.3
    features[:, 40] += (position - 6).square() * 0.2
    found = most_informative(features, position, 2).tolist()
    assert sorted(found) == [17, 40]
    assert int(mic(features, position).argmax()) in found


def test_log_norm_outliers_are_found_where_norms_are_even_or_skewed():
    even = noise(4, 20, 20, 64)
    even.view(-1, 64)[:16] *= 5
    assert float(metrics.log_norm_outliers(Tokens.of(even)).mean()) == pytest.approx(0.01)
    skewed = noise(4, 20, 20, 64) * noise(4, 20, 20, 1, seed=1).exp()
    assert (
        float(metrics.log_norm_outliers(Tokens.of(skewed)).mean())
        < 0.001
        < metrics.norm_outliers(Tokens.of(skewed)).share
    )


# --- layers


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_one_pass_gives_what_a_pass_for_each_layer_gives(name):
    backbones = [dvt.load_backbone(name, pretrained=False, layer=-1)]
    count = backbones[0].num_layers
    state = backbones[0].model.state_dict()
    for layer in range(count - 1):
        backbones.append(dvt.load_backbone(name, pretrained=False, layer=layer))
        backbones[-1].model.load_state_dict(state)
    images = torch.rand(2, 3, *backbones[0].image_size, generator=generator())
    found = backbones[0].at_layers(images, [-1, *range(count)])
    assert sorted(found) == list(range(-1, count))
    for backbone in backbones:
        alone = backbone(images)
        torch.testing.assert_close(found[backbone.layer].patches, alone.patches)
        torch.testing.assert_close(found[backbone.layer].prefix, alone.prefix)
    assert not torch.allclose(found[count - 1].patches, found[-1].patches)
    with pytest.raises(BackboneError, match="blocks"):
        backbones[0].at_layers(images, [count])


def test_layers_are_read_in_one_pass(tiny, monkeypatch):
    calls = []
    real = families.layer_tokens
    monkeypatch.setattr(families, "layer_tokens", lambda *a, **k: calls.append(a[2]) or real(*a, **k))
    found = analyze(
        tiny, photos(2), AnalyzeConfig(layers="all", share_images=1, windows=2, shift_images=1, mic_images=1)
    )
    layers = {row.layer for row in found.rows}
    assert layers == {-1, *range(tiny.num_layers)}
    assert len(calls) == 2 + 1 + 1 + 1  # images, windows, shifts and greys
    assert all(set(call) == layers for call in calls)
    assert found.get("position_r2", layer=0).value is not None
    assert len(found.tables()) == 2 and "Layers of" in found.to_text()


# --- the report


def test_planted_artifact_is_measured_and_removed(report):
    for name in ("position_own", "position_r2", "blank_energy"):
        raw, clean = report.get(name), report.get(name, "cleaned")
        assert raw.value > clean.value, name
        assert raw.low <= raw.value <= raw.high, name
    assert report.get("position_shared").null_high < 0.2 < report.get("position_shared").value
    assert abs(report.get("position_shared", "cleaned").value) < 0.05
    assert report.get("blank_energy", "cleaned").value == pytest.approx(0, abs=1e-6)
    assert report.get("blank_correlation").value > 0.9
    # The photographs are brighter above: position can be read, though nothing of it stays at the position.
    assert report.get("position_r2", "cleaned").value > report.get("position_r2", "cleaned").null_high
    assert report.get("shift_p5").value < report.get("shift_p5", "cleaned").value
    assert report.get("shift_p50", "cleaned").value == pytest.approx(1, abs=1e-4)


def test_every_row_has_a_null_and_an_interval(report):
    for row in report.rows:
        assert row.value is not None and row.null is not None, row
        if row.metric != "pooled_mic":  # images drawn twice would agree with themselves
            assert row.low <= row.value <= row.high or row.metric in ("position_r2", "grid_peak"), row
        assert row.images > 0
    assert {row.metric for row in report.rows} == set(scores.METRICS)


def test_seconds_add_up(report):
    seconds = report.seconds
    parts = sum(seconds[name] for name in ("forward", "fields", "denoisers", "metrics"))
    assert parts == pytest.approx(seconds["total"]) and min(seconds.values()) >= 0
    assert report.share == pytest.approx((seconds["total"] - seconds["forward"]) / seconds["forward"])


def test_report_comes_back_from_disk(report, tmp_path):
    folder = report.save(tmp_path / "new" / "report")
    assert {
        "report.json",
        "data.npz",
        "table.txt",
        "table.md",
        "table.csv",
        "position.png",
        "norms.png",
        "pca.png",
    } <= {each.name for each in folder.iterdir()}
    assert not list(folder.glob("*.part"))
    back = Report.load(folder)
    assert back.rows == report.rows and back.to_text() == report.to_text() and back.index == report.index
    assert back.arrays.keys() == report.arrays.keys()
    assert all(np.array_equal(back.arrays[name], report.arrays[name]) for name in report.arrays)
    content = json.loads((folder / "report.json").read_text())
    assert content["schema"] == "dvt-report/1" and len(content["rows"]) == len(report.rows)
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + len(report.rows) and lines[0].startswith("metric,value,null")
    for name in ("position.png", "norms.png", "pca.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 5


def test_damaged_reports_are_refused(report, tmp_path):
    with pytest.raises(ConfigError, match="dvt analyze"):
        Report.load(tmp_path)
    folder = report.save(tmp_path / "report")
    (folder / "data.npz").write_bytes((folder / "data.npz").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="two runs"):
        Report.load(folder)
    np.savez(folder / "data.npz", evil=np.array([{}], dtype=object))
    with pytest.raises(ConfigError):
        Report.load(folder)
    (folder / "report.json").write_text('{"schema": "dvt-report/99"}')
    with pytest.raises(ConfigError, match="dvt-report/99"):
        Report.load(folder)


def test_maps_keep_cosines_and_mixtures(report):
    """What the viewer computes from bytes is what the tokens give."""
    backbone, image = planted_backbone(1.0), photos()[2]
    size = backbone.input_size(tuple(image.shape[1:]))
    raw = backbone(dvt.views.resize(image, size)[None])
    truth = {"raw": raw.patches[0], "cleaned": raw.patches[0] - artifact(raw.grid, 1.0)}
    found = {}
    for entry in report.index["maps"]:
        if entry["image"] == 2:
            found[entry["variant"]] = torch.from_numpy(report.arrays[entry["array"]]).float() * entry["scale"]
    assert found.keys() == truth.keys()
    truth["half"], found["half"] = ((m["raw"] + m["cleaned"]) / 2 for m in (truth, found))
    for name in truth:
        centred = (truth[name] - truth[name].mean((0, 1))).flatten(0, 1)
        expected = torch.nn.functional.normalize(centred, dim=-1)
        given = torch.nn.functional.normalize(found[name].flatten(0, 1), dim=-1)
        assert float((expected @ expected.T - given @ given.T).abs().mean()) < 0.02


def test_quantised_maps_have_no_more_directions_than_asked_for():
    maps = [noise(5, 6, 30), noise(4, 4, 30, seed=1)]
    for values, scale in quantise(maps, 7):
        assert values.dtype == np.int8 and values.shape[-1] == 7 and scale > 0 and np.abs(values).max() == 127


def test_html_is_escaped(report):
    html = Report(
        [scores.Row("position_r2", 0.5, variant="<script>", backbone="b&b")],
        ["a"],
        [{"label": "b&b", "layer": -1}],
        {"forward": 1.0, "fields": 0.0, "denoisers": 0.0, "metrics": 1.0, "total": 2.0},
    )._repr_html_()
    assert "&lt;script&gt;" in html and "<script>" not in html and "<table>" in html
    assert "<caption>" in report._repr_html_()


# --- inputs


def test_decomposition_by_a_function_and_its_time():
    backbone = planted_backbone(1.0)

    def decompose(pixels):
        size = backbone.input_size(tuple(pixels.shape[1:]))
        raw = backbone(dvt.views.resize(pixels, size)[None]).patches[0]
        made = artifact(tuple(raw.shape[:2]), 1.0)
        return {"semantic": raw - made, "artifact": made, "unknown": raw}

    found = analyze(backbone, photos(3), SMALL, semantic=decompose)
    assert found.get("position_r2", "semantic").value < found.get("position_r2").value
    assert found.get("position_r2", "artifact").value > 0.99
    assert found.get("shift_p50", "semantic").value == pytest.approx(1, abs=1e-3)
    assert found.get("blank_energy", "semantic").value == pytest.approx(0, abs=1e-6)
    assert found.get("position_own", "semantic").value is None and found.get("position_own", "semantic").note
    assert found.seconds["fields"] < found.seconds["forward"]  # it does nothing but its backbone's passes
    with pytest.raises(ConfigError, match="at least 'semantic'"):
        analyze(backbone, photos(1), SMALL, semantic=lambda pixels: {})


def test_decomposition_from_a_store(tiny, tmp_path):
    paths, records = [], []
    for number, picture in enumerate(photos(4)):
        path = tmp_path / f"{number}.png"
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(path)
        size = tiny.input_size(tuple(picture.shape[1:]))
        raw = tiny(dvt.views.resize(dvt.images.load_image(path), size)[None]).patches[0]
        paths.append(path)
        if number != 2:
            records.append(
                Record(str(path), f"{number:064x}", (180, 220), {"raw": raw, "semantic": raw * 0 + noise(*raw.shape)})
            )
    job = Job(tiny.name, tiny.weights_sha256)
    with StoreWriter(tmp_path / "store", job) as writer:
        writer.write("a", records)
    store = FeatureStore(tmp_path / "store")
    found = analyze(tiny, paths, SMALL, semantic=store)
    assert found.images == [str(paths[i]) for i in (0, 1, 3)]
    assert found.get("position_r2", "semantic").images == 3
    assert "store" in found.get("shift_p50", "semantic").note
    with pytest.raises(ConfigError, match="none of the images"):
        analyze(tiny, [paths[2]], SMALL, semantic=store)
    with pytest.raises(ConfigError, match="other weights"):
        analyze(planted_backbone(0.0), paths, SMALL, semantic=store)


def test_several_backbones_are_compared(tiny):
    found = analyze([tiny, tiny, planted_backbone(1.0)], photos(3), SMALL)
    assert [each["label"] for each in found.backbones] == ["test_vit", "test_vit (2)", "planted"]
    assert (
        found.get("position_r2") == pytest.approx(found.get("position_r2"))
        and found.get("position_r2", backbone="test_vit (2)").value == found.get("position_r2").value
    )
    assert found.get("position_own", backbone="planted").value > 0.2
    assert "planted, raw" in found.to_text()
    with pytest.raises(ConfigError, match="one for each backbone"):
        analyze([tiny, tiny], photos(1), SMALL, variants={"a": lambda t: t})


def test_the_sample_is_spread_over_the_images(tiny):
    config = AnalyzeConfig(images=3, share_images=1, windows=2, shift_images=1, mic_images=1, shown=2)
    found = analyze(tiny, torch.rand(9, 3, 160, 160, generator=generator()), config)
    assert len(found.images) == 3 and found.get("position_r2").images == 3
    assert len(found.index["jpegs"]) == 2


def test_one_image_says_that_it_is_one(tiny):
    found = analyze(tiny, photos(1), SMALL)
    row = found.get("position_r2")
    assert row.low is None and "optimistic" in row.note
    assert found.get("position_own").low is None


def test_small_grids_are_reported_not_fatal():
    found = analyze(planted_backbone(1.0, size=96), photos(3), SMALL)
    assert found.get("grid_peak").value is None and "8 x 8" in found.get("grid_peak").note
    assert found.get("position_r2").value is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"images": 0}, "images"), ({"windows": 3}, "even"), ({"draws": 1}, "draws"), ({"layers": "some"}, "layers")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AnalyzeConfig(**options)


def test_bad_input_is_refused(tiny):
    with pytest.raises(ImageError, match="no image"):
        analyze(tiny, [], SMALL)
    with pytest.raises(ConfigError, match="cannot be called"):
        analyze(tiny, photos(1), SMALL, variants={"raw": lambda t: t})
    with pytest.raises(ConfigError, match="keep the shape"):
        analyze(tiny, photos(1), SMALL, variants={"less": lambda t: Tokens.of(t.patches[..., :3])})
    with pytest.raises(ConfigError, match="it has the metrics"):
        analyze(tiny, photos(1), SMALL).get("nothing")
    assert token_maps([Tokens.of(noise(2, 2, 3))])


# --- the notebook


def test_notebook_runs(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "analyze.ipynb"
    if not path.exists():
        pytest.skip("the examples are not part of an installed package")
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    try:
        import nbclient
    except ImportError:
        names: dict = {}
        for source in code:
            exec(compile(source, str(path), "exec"), names)
        assert names["report"].get("position_r2").value > 0.5
    else:
        nbformat = pytest.importorskip("nbformat")
        book = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
