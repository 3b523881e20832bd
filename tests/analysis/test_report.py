"""The page of a report: nothing is fetched, no name becomes markup, and what it shows is what was measured."""

import base64
import functools
import io
import json
import random
import re
import shutil
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt.analysis import AnalyzeConfig, DoctorConfig, Report, Row, analyze, diagnose
from dvt.analysis.page.plots import layer_figure, pca_figure, position_figure
from dvt.analysis.page.report import fitting, render, write_report
from dvt.errors import ConfigError
from dvt.tokens import Tokens

EVIL_IMAGE = "<img src=x onerror=window.hacked=1>.png"
EVIL_DENOISER = "half</script><script>window.hacked=1</script>"
LIMIT = 8_000_000


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A real analysis of three smooth pictures, two layers, a denoiser and a decomposition; names are hostile."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    paths = []
    for name, (height, width) in ((EVIL_IMAGE, (160, 240)), ("wide&.png", (160, 320)), ("tall'\".png", (260, 160))):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        paths.append(folder / name)
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(paths[-1])
    tiny = dvt.load_backbone("test_vit", pretrained=False)
    with torch.no_grad():
        for name, parameter in sorted(tiny.model.named_parameters()):
            if parameter.ndim > 1:
                spread = 0.5 if name == "pos_embed" else parameter[0].numel() ** -0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def decompose(pixels):
        size = tiny.input_size(tuple(pixels.shape[1:]))
        raw = tiny(torch.nn.functional.interpolate(pixels[None], size=size, mode="bilinear")).patches[0]
        artifact = 0.5 * raw.mean(0, keepdim=True).expand_as(raw)
        return {"semantic": raw - artifact, "artifact": artifact, "residual": torch.zeros_like(raw)}

    def half(tokens):
        return Tokens(tokens.patches.roll(1, 1) - 0.5 * tokens.patches, tokens.prefix)

    config = AnalyzeConfig(layers=(0,), share_images=2, windows=2, shift_images=1, mic_images=1)
    return analyze(tiny, paths, config, variants={EVIL_DENOISER: half}, semantic=decompose)


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    """The folder of the report; not to be changed."""
    return report.save(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(saved, tmp_path_factory):
    """The page that is made of the saved report."""
    with warnings.catch_warnings():  # which would be printed between the lines of `dvt report`
        warnings.simplefilter("error")
        return write_report(saved, tmp_path_factory.mktemp("page") / "deep" / "report.html")


class Parsed(HTMLParser):
    """Elements with their attributes, the words between, and the texts of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.scripts = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data
        elif self.lasttag != "style":
            self.words += data


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page.read_text(encoding="utf-8"))


def cosines(report, index, layer, variant, strength, patch):
    """What the page has to compute, from the arrays of the report."""

    def values(name):
        entry = next(
            each
            for each in report.index["maps"]
            if (each["image"], each["layer"], each["variant"]) == (index, layer, name)
        )
        return entry["scale"] * report.arrays[entry["array"]].astype(np.float64)

    tokens = strength * values(variant) + (1 - strength) * values("raw")
    norms = np.linalg.norm(tokens, axis=-1)
    return tokens @ tokens[patch] / np.maximum(norms * norms[patch], 1e-30)


# -- without a browser


def test_the_page_is_one_file_that_names_nothing_outside(page, parsed):
    text = page.read_text(encoding="utf-8")
    assert 50_000 < len(text.encode()) < LIMIT
    assert not re.search(r"https?:|@import|url\(|//cdn", text)
    addresses = [
        value for _, attributes in parsed.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses and all(value.startswith("data:") for value in addresses)
    policy = next(each["content"] for _, each in parsed.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_names_are_text_and_never_markup(page, parsed):
    assert not [tag for tag, attributes in parsed.elements if any(name.startswith("on") for name in attributes)]
    assert len(parsed.scripts) == 2 and json.loads(parsed.scripts[0])["images"][0]["name"] == EVIL_IMAGE
    assert EVIL_DENOISER in parsed.words
    alts = {attributes.get("alt") for tag, attributes in parsed.elements if tag == "img"}
    assert {EVIL_IMAGE, "wide&.png", "tall'\".png"} <= alts
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text and text.count("</script>") == 2


def test_folders_of_the_images_are_not_told(report, page):
    assert report.images[0].endswith(EVIL_IMAGE) and report.images[0] != EVIL_IMAGE
    assert report.images[0].removesuffix(EVIL_IMAGE) not in page.read_text(encoding="utf-8")


def test_images_of_the_same_name_are_numbered(report):
    names = ["a/x.png", "b/x.png", "y.png"]
    data = json.loads(Parsed(render(replace(report, images=names))).scripts[0])
    assert [each["name"] for each in data["images"]] == ["x.png (1)", "x.png (2)", "y.png"]


def test_the_table_has_every_value_with_interval_and_null(report, parsed):
    for row in report.rows:
        if row.layer == -1:
            known = [value for value in (row.value, row.low, row.high, row.null) if value is not None and value < 1000]
            for value in known:
                text = "0.000" if abs(value) < 0.0005 else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
                assert text in parsed.words
            assert row.note in parsed.words


def test_a_value_that_cannot_be_had_has_its_reason(report):
    rows = [
        replace(row, value=None, note="for this reason") if row.metric == "grid_peak" else row for row in report.rows
    ]
    assert "for this reason" in Parsed(render(replace(report, rows=rows))).words


def test_the_summary_says_on_which_side_of_its_null_raw_is(report):
    def words(value):
        about = {"null": 0.1, "null_low": 0.05, "null_high": 0.15, "backbone": "test_vit"}
        return Parsed(render(replace(report, rows=[Row("position_r2", value, **about)]))).words

    assert "raw is above its" in words(0.9) and "raw is within its" in words(0.1) and "raw is below its" in words(-0.3)
    assert "0.900" in words(0.9)


def test_report_doctor_and_analyze_tell_one_number_by_one_name(tmp_path, make_tiny_backbone):
    """Position shares of one backbone and one denoiser on the same images: the same numbers under the same words."""
    tiny, generator = make_tiny_backbone(), torch.Generator().manual_seed(0)
    level = torch.tensor([0.2, 0.5, 0.9])[:, None, None, None]  # the artifact differs with the light
    photos = list(level * torch.rand(3, 3, 120, 150, generator=generator))
    ramp = torch.linspace(-1, 1, 6)[:, None, None]
    tilted = {"tilted": lambda tokens: tokens.with_patches(tokens.patches + ramp)}
    found = analyze(tiny, photos, AnalyzeConfig(windows=4, shift_images=1, mic_images=1), variants=tilted)
    diagnosis = diagnose(tiny, photos, tilted, DoctorConfig(windows=4))
    own, shared, treated = (
        found.get("position_own").value,
        found.get("position_shared").value,
        found.get("position_own", "tilted").value,
    )
    assert abs(own - shared) > 0.001 and own != treated
    assert diagnosis.own.value == pytest.approx(own, rel=1e-5)
    assert diagnosis.shared.value == pytest.approx(shared, rel=1e-5)
    assert diagnosis.treated[0].share == pytest.approx(treated, rel=1e-5)
    page = Parsed(render(Report.load(found.save(tmp_path)))).words
    headline = page[: page.index("Position R\N{SUPERSCRIPT TWO}")]
    assert f"{100 * own:.1f}\N{NARROW NO-BREAK SPACE}%" in headline
    assert f"{100 * treated:.1f}\N{NARROW NO-BREAK SPACE}%" in headline
    for text in (str(diagnosis), found.to_text(), page):
        assert "osition share" in text and "same in all" in text
    assert f"{own:.3f}" in str(diagnosis) and f"{own:.3f}" in found.to_text() and f"{own:.3f}" in page


def test_position_maps_of_a_layer_have_one_scale(report):
    """A removed artifact is dark: half as strong is half as bright, beside raw at its brightest."""
    entry = next(each for each in report.index["positions"] if each["layer"] == -1 and each["variant"] == "raw")
    raw = report.arrays[entry["array"]]
    index = {**report.index, "positions": [entry, {**entry, "variant": "semantic", "array": "half"}]}
    halved = replace(report, index=index, arrays={**report.arrays, "half": raw / 2})
    figure = position_figure(halved)
    pictures = [axis.images[0] for axis in figure.axes if axis.images and not axis.get_label()]
    assert [each.get_clim() for each in pictures] == [(0, raw.max())] * 2
    shown = re.findall(r'position: (?:raw|semantic), final layer"', page := render(halved))
    maps = list(re.findall(r'class="map" src="data:image/png;base64,([^"]+)"', page))[:2]
    first, second = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in maps)
    assert len(shown) == 2 and first.max() > second.max()
    assert f"at most {raw.max() / 2:.3f}, scale 0 to {raw.max():.3f}" in page


def test_a_term_that_is_zero_is_no_column_of_the_picture(report):
    titles = [axis.get_title(loc="left") for axis in pca_figure(report).axes]
    assert "semantic" in titles and "residual" not in titles


def test_charts_say_their_values_in_words(report, parsed):
    labels = " ".join(
        attributes["aria-label"] for tag, attributes in parsed.elements if tag == "svg" and "role" in attributes
    )
    value = report.get("position_r2", layer=0).value
    assert f"Position R² over layers: 0 {value:.3f}".replace("-", "\N{MINUS SIGN}") in labels
    assert "Histogram of token norms" in labels


def test_a_term_that_is_zero_is_said_and_not_shown(parsed):
    data = json.loads(parsed.scripts[0])
    assert "residual" not in {each["variant"] for each in data["maps"]}
    assert "The residual of 3 of 3 images is zero" in parsed.words


def test_token_maps_are_those_of_the_report(report, parsed):
    data = json.loads(parsed.scripts[0])
    shown = [entry for entry in report.index["maps"] if entry["variant"] != "residual"]
    assert len(data["maps"]) == len(shown) == 3 * 5
    for entry, made in zip(shown, data["maps"], strict=True):
        values = np.frombuffer(base64.b64decode(made["values"]), np.int8).reshape(made["shape"])
        assert np.array_equal(values, report.arrays[entry["array"]]) and made["scale"] == entry["scale"]
        assert all(made[name] == entry[name] for name in ("image", "layer", "variant"))


def large(report, images, layers, side=37, directions=19):
    """A report of noise: photographs and maps compress as badly as can be."""
    generator = np.random.default_rng(0)
    out = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(out, "JPEG", quality=80)
    jpeg = np.frombuffer(out.getvalue(), np.uint8)
    entries = [
        {"image": image, "layer": layer, "variant": variant, "backbone": "test_vit", "scale": 0.1, "array": "map"}
        for image in range(images)
        for layer, variant in [(-1, "raw"), (-1, "semantic"), (-1, "artifact"), *((i, "raw") for i in range(layers))]
    ]
    arrays = {"jpeg": jpeg, "map": generator.integers(-127, 128, (side, side, directions), dtype=np.int8)}
    index = {
        "jpegs": [{"image": i, "array": "jpeg"} for i in range(images)],
        "maps": entries,
        "positions": [],
        "norms": [],
    }
    return replace(report, images=[f"{i}.png" for i in range(images)], index=index, arrays=arrays)


def test_twelve_images_of_a_vit_b_with_all_layers_stay_below_8_mb(report):
    big = large(report, images=12, layers=12)
    fit, text = fitting(big), render(big)
    assert 0.8 * LIMIT < len(text.encode()) < LIMIT
    assert fit.left_out == 0 and 8 <= fit.directions < 19
    assert f"8 bits, in {fit.directions} of" in text and "The report has 19 directions" in text
    assert {each["shape"][2] for each in json.loads(Parsed(text).scripts[0])["maps"]} == {fit.directions}


def test_what_cannot_fit_loses_images_rather_than_all_directions(report):
    big = large(report, images=40, layers=24)
    fit = fitting(big)
    assert fit.directions >= 8 and 0 < len(fit.images) < 40 and fit.images == sorted(set(fit.images))
    text = render(big)
    assert len(text.encode()) < LIMIT and f"{fit.left_out} of 40 images left out" in text


def test_two_backbones_have_a_table_and_a_gallery_each(report):
    def twin(entries):
        return entries + [{**each, "backbone": "other"} for each in entries]

    index = {kind: entries if kind == "jpegs" else twin(entries) for kind, entries in report.index.items()}
    rows = report.rows + [replace(row, backbone="other") for row in report.rows]
    both = replace(
        report, backbones=[*report.backbones, {**report.backbones[0], "label": "other"}], index=index, rows=rows
    )
    found = Parsed(render(both))
    assert sum(tag == "table" for tag, _ in found.elements) == 4
    assert "other, final layer" in found.words


def test_a_report_without_token_maps_is_a_page_without_viewer(report):
    bare = replace(report, index={kind: [] for kind in report.index}, arrays={})
    found = Parsed(render(bare))
    assert (
        next(attributes for _, attributes in found.elements if attributes.get("id") == "viewer").get("hidden", 0)
        is None
    )
    assert "kept no token maps" in found.words


def test_a_folder_without_report_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="dvt analyze"):
        write_report(tmp_path, tmp_path / "report.html")
    from dvt.cli import main

    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "dvt analyze" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_is_refused(saved, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", tmp_path / "file" / "report.html"):
        with pytest.raises(ConfigError, match=r"cannot write .* name a file"):
            write_report(saved, out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("maps", None, "lacks the array"),
        ("maps", np.zeros((3, 3, 4), np.float32), "int8"),
        ("maps", np.zeros((3, 3), np.int8), "3 dimensions"),
        ("jpegs", np.zeros(9, np.uint8), "schema"),
        ("norms", np.zeros(3, np.int64), "schema"),
        ("positions", np.zeros((0, 4), np.float32), "shape"),
    ],
)
def test_arrays_that_are_missing_or_wrong_are_refused(report, kind, change, message):
    name = report.index[kind][0]["array"]
    arrays = {key: value for key, value in report.arrays.items() if key != name} | (
        {} if change is None else {name: change}
    )
    with pytest.raises(ConfigError, match=message):
        render(replace(report, arrays=arrays))


@pytest.mark.parametrize("change", [{"scale": float("nan")}, {"image": 7}, {"image": "0"}, {"layer": "<b>"}])
def test_entries_that_make_no_sense_are_refused(report, change):
    maps = [{**report.index["maps"][0], **change}, *report.index["maps"][1:]]
    with pytest.raises(ConfigError):
        render(replace(report, index={**report.index, "maps": maps}))


def test_an_array_missing_on_disk_is_refused(report, saved, tmp_path):
    content = json.loads((saved / "report.json").read_text())
    del content["data_sha256"]  # as in reports of before
    (tmp_path / "report.json").write_text(json.dumps(content))
    with np.load(saved / "data.npz") as data:
        arrays = dict(data)
    arrays.pop(report.index["maps"][0]["array"])
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ConfigError, match="misses"):
        write_report(tmp_path, tmp_path / "report.html")


WRONG = (None, True, "words", -1, 10**400, 1e400, float("nan"), [], {}, [[]], {"a": 1})


def places(value, *path):
    """The way to everything in a JSON document."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], *path, key)


def test_edited_reports_are_read_or_refused_in_words(saved, tmp_path):
    """Entries are left out, or replaced by what they are not; nothing may end in another error."""
    shutil.copytree(saved, tmp_path / "edited")
    text = (saved / "report.json").read_text()
    every, chance, refused = [*places(json.loads(text))][1:], random.Random(0), 0
    for path in chance.sample(every, 150):
        content = json.loads(text)
        *way, last = path
        holder = functools.reduce(lambda value, key: value[key], way, content)
        value = chance.choice((*WRONG, "left out"))
        if value == "left out":
            del holder[last]
        else:
            holder[last] = value
        (tmp_path / "edited" / "report.json").write_text(json.dumps(content))
        try:
            render(Report.load(tmp_path / "edited"))
        except ConfigError:
            refused += 1
    assert 75 < refused < 150


@pytest.mark.parametrize("kind", ["a header of terabytes", "half a gigabyte of zeros"])
def test_arrays_that_announce_more_than_they_hold_cost_no_memory(report, saved, tmp_path, kind):
    folder = shutil.copytree(saved, tmp_path / "huge")
    name = report.index["maps"][0]["array"]
    content = json.loads((saved / "report.json").read_text())
    del content["data_sha256"]
    (folder / "report.json").write_text(json.dumps(content))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|i1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 1)})
    with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other, array in report.arrays.items():
            if other != name:
                np.save(part := io.BytesIO(), array)
                archive.writestr(f"{other}.npy", part.getvalue())
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            for piece in [head.getvalue()] if kind == "a header of terabytes" else [bytes(1 << 20)] * 513:
                file.write(piece)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="declares"):
        Report.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_numbers_and_maps_of_two_runs_are_not_mixed(report, saved, tmp_path):
    """As a run that was killed between its files leaves them."""
    shutil.copytree(saved, tmp_path / "mixed")
    arrays = {name: array + array.dtype.type(1) for name, array in report.arrays.items()}
    np.savez_compressed(tmp_path / "mixed" / "data.npz", **arrays)
    with pytest.raises(ConfigError, match="two runs"):
        Report.load(tmp_path / "mixed")


# -- in a browser


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, page):
    """A function that opens the page; at the end nothing was logged, and nothing but the page was asked for."""
    contexts, said, asked = [], [], []

    def open_page(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        return tab

    yield open_page
    hacked = [tab.evaluate("window.hacked") for context in contexts for tab in context.pages]
    for context in contexts:
        context.close()
    assert not said and not any(hacked)
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


def panels(tab):
    return [
        {**each, "values": np.array(each["values"]).reshape(each["height"], each["width"])}
        for each in tab.evaluate("dvtReport.panels()")
    ]


def middle(tab, row, column, where="#photo"):
    """The place on the screen of the middle of a patch."""
    box = tab.locator(f"{where} .stage").bounding_box()
    left = panels(tab)[0]
    return box["x"] + box["width"] * (column + 0.5) / left["width"], box["y"] + box["height"] * (row + 0.5) / left[
        "height"
    ]


def slide(tab, selector, value):
    tab.locator(selector).evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value)


def pixels(tab, side):
    data = tab.locator(f"#{side} canvas").evaluate("e => e.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_tap_changes_both_maps_to_the_cosines_of_the_report(opened, report):
    tab = opened(390, 844, has_touch=True, is_mobile=True)
    tab.locator("#viewer h2").scroll_into_view_if_needed()
    before = panels(tab)
    tab.touchscreen.tap(*middle(tab, 2, 3))
    after = panels(tab)
    assert tab.evaluate("dvtReport.patch()") == {"row": 2, "column": 3}
    assert [each["variant"] for each in after] == ["raw", EVIL_DENOISER]
    for old, new in zip(before, after, strict=True):
        wanted = cosines(report, 0, -1, new["variant"], 1.0, (2, 3))
        assert np.abs(new["values"] - wanted).max() < 1e-5
        assert np.abs(new["values"] - old["values"]).max() > 0.1
    assert np.abs(after[0]["values"] - after[1]["values"]).max() > 0.1


def test_the_canvas_shows_the_values_in_viridis(opened):
    from matplotlib import colormaps

    tab = opened()
    values = panels(tab)[1]["values"]
    wanted = colormaps["viridis"](np.clip((values + 0.5) / 1.5, 0, 1))[..., :3]
    assert np.abs(pixels(tab, "right") / 255 - wanted).max() < 0.02


def test_the_pointer_shows_a_patch_and_a_click_holds_it(opened):
    tab = opened()
    tab.mouse.move(*middle(tab, 1, 1))
    assert tab.evaluate("dvtReport.patch()") == {"row": 1, "column": 1}
    tab.mouse.click(*middle(tab, 4, 6, "#right"))
    tab.mouse.move(*middle(tab, 0, 0, "#left"))
    assert tab.evaluate("dvtReport.patch()") == {"row": 0, "column": 0}
    tab.mouse.move(5, 5)
    assert tab.evaluate("dvtReport.patch()") == {"row": 4, "column": 6}
    assert panels(tab)[1]["values"][4, 6] == pytest.approx(1, abs=1e-5)


def test_strength_mixes_and_zero_is_raw(opened, report):
    tab = opened()
    full = pixels(tab, "right")
    patch = tuple(tab.evaluate("dvtReport.patch()").values())
    slide(tab, "#right .strength input", 30)
    left, right = panels(tab)
    assert right["strength"] == 0.3
    assert np.abs(right["values"] - cosines(report, 0, -1, EVIL_DENOISER, 0.3, patch)).max() < 1e-5
    assert not np.array_equal(pixels(tab, "right"), full) and np.abs(left["values"] - right["values"]).max() > 0.02
    slide(tab, "#right .strength input", 0)
    left, right = panels(tab)
    assert np.abs(left["values"] - right["values"]).max() < 1e-6
    assert np.array_equal(pixels(tab, "left"), pixels(tab, "right"))
    assert tab.locator("#left .strength input").is_disabled()


def test_layers_variants_and_images_can_be_chosen(opened, report):
    tab = opened()
    slide(tab, "#left .layer input", 0)
    tab.select_option("#right select", "semantic")
    left, right = panels(tab)
    patch = tuple(tab.evaluate("dvtReport.patch()").values())
    assert (left["layer"], right["layer"]) == (0, -1) and tab.locator("#left .layer b").inner_text() == "block 0"
    assert np.abs(left["values"] - cosines(report, 0, 0, "raw", 1, patch)).max() < 1e-5
    assert np.abs(right["values"] - cosines(report, 0, -1, "semantic", 1, patch)).max() < 1e-5
    tab.locator("#images input").nth(2).check()
    left, right = panels(tab)
    patch = tuple(tab.evaluate("dvtReport.patch()").values())
    assert (left["layer"], right["variant"], tab.locator("#photo-name").inner_text()) == (0, "semantic", "tall'\".png")
    assert left["height"] > left["width"]
    assert np.abs(right["values"] - cosines(report, 2, -1, "semantic", 1, patch)).max() < 1e-5
    box = tab.locator("#photo .stage").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(160 / 260, rel=0.02)


def test_the_keyboard_moves_the_patch_and_stops_at_the_border(opened):
    tab = opened()
    start = tab.evaluate("dvtReport.patch()")
    stage = tab.locator("#photo .stage")
    while not stage.evaluate("e => e === document.activeElement"):
        tab.keyboard.press("Tab")
    assert stage.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowDown", "ArrowDown"):
        tab.keyboard.press(key)
    assert tab.evaluate("dvtReport.patch()") == {"row": start["row"] + 1, "column": start["column"] - 2}
    for _ in range(40):
        tab.keyboard.press("ArrowRight")
    last = panels(tab)[0]["width"] - 1
    assert tab.evaluate("dvtReport.patch()") == {"row": start["row"] + 1, "column": last}
    assert f"column {last + 1}" in tab.locator("#spoken").inner_text()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('figure').id") == "left"


def test_light_and_dark_follow_the_system_and_the_button(opened):
    def brightness(tab):
        return sum(
            int(each) for each in re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        )

    for scheme, dark in (("light", False), ("dark", True)):
        tab = opened(color_scheme=scheme)
        assert (brightness(tab) < 150) is dark
        tab.locator("#theme").click()
        assert (brightness(tab) < 150) is not dark


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_no_width_makes_the_page_scroll_sideways(opened, width):
    tab = opened(width, 844)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    photo, left, right = (tab.locator(f"#{name} .stage").bounding_box() for name in ("photo", "left", "right"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert (photo["y"] + photo["height"] <= left["y"]) is (width < 700)


def test_everything_has_a_name(opened):
    tab = opened()
    words = "[...e.labels].map(l => l.innerText + (l.querySelector('img')?.alt ?? '')).join('').trim()"
    nameless = f"[...document.querySelectorAll('input, select')].filter(e => !{words}).length"
    assert tab.evaluate(nameless) == 0
    assert tab.evaluate("[...document.images].filter(e => !e.alt).length") == 0
    assert tab.evaluate("[...document.querySelectorAll('canvas, button')].filter(e => !e.ariaLabel).length") == 0
    tab.get_by_role("slider", name="Strength").nth(1).focus()
    tab.keyboard.press("ArrowLeft")
    assert panels(tab)[1]["strength"] == 0.99
    assert "99 percent" in tab.locator("#right canvas").get_attribute("aria-label")


def test_numbers_and_charts_need_no_script(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator("table").first.is_visible() and tab.locator(".charts svg").first.is_visible()
    assert "need JavaScript" in tab.locator("noscript").inner_text()
    context.close()


def test_the_saved_report_makes_the_same_page(report, saved, page):
    assert render(report) == page.read_text(encoding="utf-8") == render(Report.load(saved))


def test_the_last_point_of_a_curve_over_layers_is_the_final_norm_s(report):
    """It lies behind the last block drawn, and is named; a metric of one layer has no curve."""
    figure = layer_figure(report)
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.lines]
    assert titles and not any(title.startswith("Pooled") for title in titles)
    for axis in figure.axes:
        if axis.lines:
            assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "final"]
            assert list(axis.lines[0].get_xdata()) == [0, 1]
