"""`dvt view`: the page of a real store, in Chromium where there is one, and its server, for this machine alone."""

import http.client
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from dvt.analysis.page.store_page import store_page
from dvt.cli import main
from dvt.cli.view import page_server
from dvt.store import FeatureStore, Job, Record, StoreWriter


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two photographs, one of them deleted later, and their store."""
    folder = tmp_path_factory.mktemp("view")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((120, 90), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    images = [str(folder / "a.png"), str(folder / "b.png")]
    options = ["--weights", "demo", "--size", "96", "--views", "4", "--no-pictures", "--out", str(folder / "store")]
    assert main(["denoise", *images, *options]) == 0
    (folder / "b.png").unlink()
    return folder


def test_the_page_of_a_store_is_one_file_and_measures_nothing(work, capsys, caplog):
    assert main(["view", str(work / "store"), "--out", str(work / "page.html")]) == 0
    text = (work / "page.html").read_text()
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")
    assert "The numbers" not in text and str(work) not in text
    assert ">2 images of a feature store, with raw and semantic." in text and "Raw = semantic" not in text
    assert "1 of 2 photographs" in caplog.text
    assert main(["view", str(work / "store"), "--out", str(work / "page.pdf")]) == 2
    assert main(["view", str(work / "store"), "--images", "0", "--out", str(work / "page.html")]) == 2
    assert main(["view", str(work), "--out", str(work / "page.html")]) == 2
    assert "not a feature store" in " ".join(capsys.readouterr().err.split())


def test_a_patch_is_compared_as_the_store_says_by_tap_and_by_key(work):
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    (work / "tap.html").write_text(store_page(work / "store"))
    tokens = FeatureStore(work / "store").read(0, "semantic").astype(np.float64)
    centred = tokens - tokens.mean((0, 1))
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    said = []
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto((work / "tap.html").as_uri())
        stage = tab.locator("#right .stage")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        tab.touchscreen.tap(box["x"] + box["width"] * 0.99, box["y"] + box["height"] * 0.01)
        found = tab.evaluate("dvtReport.panels()")[1]
        assert tab.evaluate("dvtReport.patch()") == {"row": 0, "column": tokens.shape[1] - 1}
        assert found["variant"] == "semantic"
        values = np.array(found["values"]).reshape(found["height"], found["width"])
        assert np.abs(values - unit @ unit[0, -1]).max() < 0.05  # of 48 directions in 8 bits
        tab.locator("#photo .stage").focus()
        tab.keyboard.press("ArrowDown")
        assert tab.evaluate("dvtReport.patch()")["row"] == 1
        assert tab.locator("#images input").count() == 2 and not tab.locator("#right .strength input").is_disabled()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert not said


def test_overlapping_patches_are_tapped_where_they_look(tmp_path):
    """A store of stride 8: the frame and the map lie at the patches' centres, and keys go from one to the next."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    values = np.eye(77, dtype=np.float16).reshape(7, 11, 77)  # each patch is like itself alone
    with StoreWriter(tmp_path / "store", Job("vit_tiny_patch16_224", "0" * 64, stride=8, size=64)) as writer:
        writer.write("one", [Record("x.jpg", "a" * 64, (64, 96), {"raw": values})])
    (tmp_path / "page.html").write_text(store_page(tmp_path / "store"))
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto((tmp_path / "page.html").as_uri())
        stage = tab.locator("#photo .stage")
        stage.scroll_into_view_if_needed()
        for row, column in ((0, 0), (3, 4), (6, 10)):  # the centres lie at 8, 16, 24, ... pixels of 64 x 96
            box = stage.bounding_box()
            y, x = 8 * (row + 1), 8 * (column + 1)
            tab.mouse.click(box["x"] + box["width"] * x / 96, box["y"] + box["height"] * y / 64)
            assert tab.evaluate("dvtReport.patch()") == {"row": row, "column": column}
            frame, quarter = tab.locator("#photo .frame").bounding_box(), 2 / 64 * box["height"]
            assert abs(frame["y"] - box["y"] - box["height"] * (0 if row == 0 else y - 4) / 64) <= quarter
            assert abs(frame["x"] - box["x"] - box["width"] * (0 if column == 0 else x - 4) / 96) <= quarter
            lit = tab.locator("#left canvas").evaluate(
                "e => [e.width, e.height, ...e.getContext('2d').getImageData(0, 0, e.width, e.height).data]"
            )
            width, height = lit[:2]
            green = np.array(lit[2:]).reshape(height, width, 4)[..., 1]
            rows, columns = (np.nonzero(green > 200)[k] for k in (0, 1))
            assert rows.min() / height * 64 <= y <= (rows.max() + 1) / height * 64
            assert columns.min() / width * 96 <= x <= (columns.max() + 1) / width * 96
        tab.keyboard.press("ArrowLeft")
        assert tab.evaluate("dvtReport.patch()") == {"row": 6, "column": 9}
        browser.close()


def test_the_server_answers_this_machine_by_its_name_only():
    server = page_server(b"<p>page</p>", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert server.server_address[0] == "127.0.0.1"

        def ask(path, host):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert ask("/", f"localhost:{server.server_port}") == (200, b"<p>page</p>")
        assert ask("/", f"evil.example:{server.server_port}")[0] == 403
        assert ask("/etc/passwd", f"127.0.0.1:{server.server_port}")[0] == 404
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_store_with_a_term_that_is_zero_has_a_page(work):
    """Of `--keep-terms`, where no token is an outlier: the residual is zero in all images."""
    store = work / "terms"
    options = [
        "--weights",
        "demo",
        "--size",
        "96",
        "--views",
        "4",
        "--no-pictures",
        "--keep-terms",
        "--out",
        str(store),
    ]
    assert main(["denoise", str(work / "a.png"), *options]) == 0
    assert not FeatureStore(store).read(0, "residual").any()
    page = store_page(store)
    assert "residual" in page and "is zero and not shown" in page
