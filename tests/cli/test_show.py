"""`dvt show` as a user runs it."""

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
