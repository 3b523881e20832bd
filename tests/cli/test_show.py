"""`dvt show` and `dvt match` as a user runs them."""

import json

from dvt.cli import main

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64")


def test_photographs_and_their_store_are_shown(photo, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo.mul(255).byte().movedim(0, -1).numpy()).save("a.png")
    assert main(["show", "a.png", *WITH, "--views", "4", "--upsample", "2", "--out", "one", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["terms"] == ["raw", "semantic"] and (tmp_path / "one" / "0000-a.png").is_file()
    assert main(["extract", "a.png", *WITH, "--out", "store"]) == 0
    assert main(["show", "store", "--out", "two", "--foreground"]) == 0
    assert (tmp_path / "two" / "index.html").read_text().count("<img") == 2
    assert main(["show", "store", "--terms", "semantic", "--out", "three"]) == 2
    assert main(["show", "a.png", "--upsample", "0", "--out", "three"]) == 2
    (tmp_path / "a.png").unlink()
    assert main(["show", "store", "--upsample", "2", "--out", "three"]) == 2  # its photograph is gone
    assert not (tmp_path / "three").exists()


def test_a_photograph_matches_itself_place_by_place(photo, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo.mul(255).byte().movedim(0, -1).numpy()).save("a.png")
    assert main(["match", "a.png", "a.png", *WITH, "--views", "0", "--out", "all"]) == 0
    pairs = json.loads((tmp_path / "all" / "matches.json").read_text())["matches"]["raw"]
    assert len(pairs) == 16 and all(pair["first"] == pair["second"] for pair in pairs)
    arguments = [
        "match",
        "a.png",
        "a.png",
        *WITH,
        "--views",
        "0",
        "--points",
        "0.1",
        "0.1",
        "0.9",
        "0.4",
        "--out",
        "two",
    ]
    assert main(arguments) == 0
    assert len(json.loads((tmp_path / "two" / "matches.json").read_text())["matches"]["raw"]) == 2
    assert (tmp_path / "two" / "matches.png").is_file()
    outside = [{"0.9": "7"}.get(each, each) for each in arguments]
    assert main([*outside[:-1], "bad"]) == 2
    assert main(["match", "a.png", "none.png", *WITH, "--out", "bad"]) == 2


def test_a_store_is_searched_for_a_photograph(photo, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    pixels = photo.mul(255).byte().movedim(0, -1).numpy()
    for name, each in {"a": pixels, "b": pixels[::-1], "c": 255 - pixels}.items():
        Image.fromarray(each).save(f"{name}.png")
    assert main(["extract", "a.png", "b.png", "c.png", *WITH, "--out", "store"]) == 0
    arguments = ["search", "c.png", "store", *WITH, "--views", "0", "--box", "0", "0", "0.5", "0.5"]
    assert main([*arguments, "--out", "found"]) == 0
    best = json.loads((tmp_path / "found" / "search.json").read_text())["found"]["raw"][0]
    assert best["path"].endswith("c.png") and best["box"] == [0, 0, 0.5, 0.5]
    assert (tmp_path / "found" / "search.png").is_file()
    assert main([*arguments, "--layer", "5", "--out", "bad"]) == 2  # other features than the store's
    assert not (tmp_path / "bad").exists()
