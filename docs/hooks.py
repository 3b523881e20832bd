"""Build what the site has besides the pages of this folder: the commands, the benchmarks, and a package for the API.

mkdocs calls these functions. The sources are installed as one package from several folders, which mkdocstrings, reading
them without importing, does not know: it is shown a copy in which they lie as they are installed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {
    f"notebooks/{path.stem}.md": f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.ipynb"))
}
#: Pages made of files elsewhere in the repository.
ELSEWHERE = {"benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md", **NOTEBOOKS}
_PARTS = ("fields", "denoiser", "analysis")


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config: Any) -> Any:
    """Show mkdocstrings the package as it is installed."""
    folder = ROOT / "build" / "site-sources"  # as mkdocs.yml says
    shutil.rmtree(folder, ignore_errors=True)
    no_data = shutil.ignore_patterns("data", "assets", "__pycache__")
    shutil.copytree(ROOT / "dvt", folder / "dvt", ignore=no_data)
    for part in _PARTS:
        shutil.copytree(ROOT / part, folder / "dvt" / part, ignore=no_data)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, not written."""
    from dvt.cli.commands import GROUPS
    from dvt.cli.help import markdown_page

    files.append(File.generated(config, "commands.md", content=markdown_page(GROUPS)))
    for name, source in ELSEWHERE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, name, content=_notebook(text, source) if name in NOTEBOOKS else text))
    return files


def _notebook(text: str, source: str) -> str:
    """Write a notebook as a page: its words, its code, and the outputs that it was saved with."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        content = "".join(cell["source"])
        parts.append(content if cell["cell_type"] == "markdown" else f"```python\n{content}\n```")
        parts += [_output(each) for each in cell.get("outputs", ())]
        if len(parts) == 1:
            parts.append(f"The notebook is `{source}`.")
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if (picture := data.get("image/png")) is not None:
        return f'<img alt="output" src="data:image/png;base64,{"".join(picture).strip()}">'
    if (page := data.get("text/html")) is not None:
        return f"<div>{''.join(page)}</div>"
    lines = "".join(output.get("text") or data.get("text/plain") or "").splitlines()
    return "\n".join(["```text", *lines[:40], *(["..."] if len(lines) > 40 else []), "```"])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files outside of the site to its own pages, or leave their words alone."""
    here = Path(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    depth = len(Path(page.file.src_uri).parts) - 1

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found["words"], found["target"], found["anchor"] or ""
        if "://" in target or not target:
            return found[0]
        place = (ROOT / here / target).resolve()
        if not place.is_relative_to(ROOT):
            return words
        path = place.relative_to(ROOT).as_posix()
        made = next((name for name, source in ELSEWHERE.items() if source == path), None)
        if made is None and path == "README.md":
            made = "index.md"
        if made is None and path.startswith("docs/"):
            made = path.removeprefix("docs/")
        picture = found["picture"]
        if made is None:
            return found[0] if picture else words
        return f"{picture}[{words}]({'../' * depth}{made}{anchor})"

    return _LINK.sub(link, markdown)


_LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\[\]]+)\]\((?P<target>[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")
