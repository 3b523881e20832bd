"""The notebooks of examples/ run, on the model that comes with the package, and hold what they printed."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SWITCH = "BUNDLED = False"
QUICK = ("dinov2_end_to_end", "matching", "transformers")


def sources(book):
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in BOOKS
        if path.stem != "analyze"
    ],
)
def test_a_notebook_runs(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    if path.stem != "transformers":  # which loads the bundled weights into another library's model
        assert sum(SWITCH in source for source in sources(book)) == 1 and "vit_small_patch14_dinov2" in sources(book)[0]
    assert all(cell.outputs for cell in book.cells if cell.cell_type == "code" and "show(" in cell.source[:6])
    for cell in book.cells:
        cell.source = cell.source.replace(SWITCH, "BUNDLED = True")
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert said and not any(output.output_type == "error" for output in said)


def test_the_notebooks_are_there():
    if not EXAMPLES.exists():
        pytest.skip("the examples are not part of an installed package")
    names = (
        "dinov2_end_to_end",
        "segmentation_from_features",
        "store_in_training",
        "upsampling",
        "matching",
        "transformers",
    )
    assert {path.stem for path in BOOKS} >= set(names)
    readme = (EXAMPLES.parent / "README.md").read_text()
    models = (EXAMPLES.parent / "docs" / "models.md").read_text()
    assert all(f"examples/{name}.ipynb" in readme + models for name in names)
