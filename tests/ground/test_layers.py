"""The architecture, read from the source: who may import whom, what `import dvt` loads, and docstrings."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"dvt": "dvt", "fields": "dvt.fields", "denoiser": "dvt.denoiser", "analysis": "dvt.analysis"}
SIBLINGS = ("dvt.fields", "dvt.denoiser", "dvt.analysis")

# The floors, from below; what lies in a folder of dvt/ that is not named here, or loose in dvt/, is on the ground.
FLOORS = ("ground", "jobs", "wings", "cli")
LOOSE = 10  # modules that may lie loose in dvt/
FILE_LINES, BODY_LINES = 400, 40  # at most; a function's docstring is not counted

ONLY_IN = {
    "h5py": {"dvt.store"},
    "timm": {
        "dvt.backbones",
        "dvt.denoiser.model",
        "dvt.denoiser.distill",
        "dvt.analysis.priors.trunk",
        "dvt.analysis.priors.heads",
    },
    "tyro": {"dvt.cli", "dvt.cli.settings"},
    "mmseg": {"dvt.denoiser.mmseg"},
    "mmengine": {"dvt.denoiser.mmseg"},
}


def module_files():
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = module_files()


def wing(module):
    """The wing that a module lies in, or None."""
    return next((name for name in SIBLINGS if module == name or module.startswith(f"{name}.")), None)


def floor(module):
    """Its height, from its folder alone."""
    if wing(module):
        return FLOORS.index("wings")
    folder = module.removeprefix("dvt").lstrip(".").partition(".")[0]
    folder = "cli" if folder == "__main__" else folder  # the front door, which opens on the commands
    return FLOORS.index(folder) if folder in ("jobs", "cli") else 0


def imports(tree, module):
    """(module imported, whether only type checkers see it) of every import in a file, wherever it stands."""
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; import always dvt.something"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), id(node) in guarded
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0]  # import_module("dvt.something"); of a name that is computed nothing is known
            if isinstance(named, ast.Constant):
                yield named.value, id(node) in guarded


def imported(module):
    return list(imports(ast.parse(MODULES[module].read_text()), module))


def test_the_folders_were_found():
    assert {"dvt", "dvt.grids", "dvt.jobs.run", "dvt.fields.linear", "dvt.analysis.metrics.artifacts"} <= MODULES.keys()
    assert ("dvt.grids", False) in imported("dvt.views.sampling") and ("timm", False) in imported("dvt.backbones.load")


def test_few_modules_lie_loose():
    assert len([path for path in (ROOT / "dvt").glob("*.py") if not path.name.startswith("__")]) <= LOOSE


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dvt"])
def test_a_module_imports_no_higher_floor_and_no_other_wing(module):
    for other, _ in imported(module):
        if other == "dvt" or other.partition(".")[0] != "dvt":
            continue
        assert floor(other) <= floor(module), f"{module} imports {other}, which lies on a higher floor"
        if wing(module) and wing(other):
            assert wing(other) == wing(module), f"{module} imports {other}; fields, denoiser and analysis stay apart"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_it_may(module):
    for other, _ in imported(module):
        root = other.partition(".")[0]
        assert root not in ("fields", "denoiser", "analysis"), f"{module} imports bare {root}: it is dvt.{root}"
        allowed = ONLY_IN.get(root, {module})
        assert {module, module.rpartition(".")[0]} & allowed, (
            f"{module} imports {root}, which belongs in {ONLY_IN[root]}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_knows_what_devices_there_are(module):
    """Names of devices that users give, to Ray for instance, are no questions about a device."""
    if module != "dvt.devices":
        asked = [line for line in MODULES[module].read_text().splitlines() if re.search(r"torch\.cuda|is_cuda", line)]
        asked += re.findall(r"\.type [=!]= .cuda.", MODULES[module].read_text())
        assert not asked, f"{module} asks for a kind of device: {asked}; dvt.devices has what it needs"


def test_no_modules_import_each_other_in_a_circle():
    """Lazy imports, inside functions or by import_module, and those for type checkers count: who reads one must read
    the other too."""
    fronts = {"dvt", *SIBLINGS, *(name for name, path in MODULES.items() if path.name == "__init__.py")}
    graph = {
        module: {other for other, _ in imported(module) if other in MODULES and other not in fronts}
        for module in MODULES
        if module not in fronts
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError


def test_imports_by_name_are_seen():
    tree = ast.parse('import_module("dvt.denoiser.attach").attach(x)\nimportlib.import_module("dvt.grids")')
    assert {name for name, _ in imports(tree, "dvt.views")} == {"dvt.denoiser.attach", "dvt.grids"}


@pytest.mark.parametrize("module", MODULES)
def test_names_that_begin_with_an_underscore_stay_in_their_module(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dvt"):
            private = [alias.name for alias in node.names if re.match("_[a-zA-Z]", alias.name)]
            assert not private, f"{module} imports {private} from {node.module}: a shared name has no underscore"


def test_no_class_or_alias_means_two_things():
    """Of type variables every module may have its own."""
    places = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and "TypeVar(" not in ast.unparse(node):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                names = [name for name in names if re.match("_?[A-Z][a-z]", name)]  # an alias of a type
            else:
                continue
            for name in names:
                places.setdefault(name.lstrip("_"), []).append(module)
    assert len(places) > 100
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= FILE_LINES, f"{module} has {len(text.splitlines())} lines: divide it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= BODY_LINES, f"{module}.{node.name} has {lines} lines below its docstring"


# The verbs that docstrings open with. A list of verbs, not of forbidden words: whoever needs another one adds it here.
VERBS = """
Adapt Add Advance Answer Apply Ask Assign Average Bound Bring Build Call Centre Change Check Choose
Clip Collect Colour Commit Compare Complete Compute Connect Convert Copy Correct Count Create
Cut Decode Decompose Denoise Derive Describe Divide Do Download Draw Eliminate Embed Encode End
Enlarge Escape Estimate Evaluate Export Express Fetch Fill Find Fine-tune Fit Flatten Fold Force Forget
Gather Generate Give Group Guide Hand Hash Hold Implement Import Include Infer Interpolate Invert Join Keep Learn Leave
Lend Let List Load Look Make Map Mark Match Measure Merge Minimise Mix Move Multiply Name
Normalise Open Pair Part Permute Pick Place Plan Plant Predict Prepare Print Project Prune Put Raise
Rank Read Record Recover Refit Refuse Remove Rename Replace Resample Reshape Resize Resolve Return
Roll Round Run Sample Save Say Scale Score Search Seed Select Set Shift Shorten Show Shuffle
Solve Sort Split Start Stop Subtract Sum Summarise Swap Take Tell Test Trace Train Transform Try Turn
Update Upsample Use Wait Walk Warn Weigh Widen Word Wrap Write Yield
"""


def documented(tree):
    """Yield (definition, whether it is a property) of each function, method and property that has a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            yield node, any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def opens_well(sentence, is_property):
    """Tell if it opens with a verb; a property's may open with the thing that it is, but with no question or shape."""
    first = sentence.split()[0].rstrip(",:")
    named = {"The", "A", "An", "All", "True"} if is_property else set()
    return first in named or first in VERBS.split()


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_open_with_a_verb(module):
    for node, is_property in documented(ast.parse(MODULES[module].read_text())):
        sentence = ast.get_docstring(node).splitlines()[0]
        assert opens_well(sentence, is_property), (
            f"{module}.{node.name} opens with {sentence!r}: open with a verb in plain English (a new one goes into "
            "VERBS), then shapes, units and errors; a property may open with 'The ...'"
        )


def test_what_is_no_verb_is_seen():
    bad = [
        "What it holds.",
        "Whether it is.",
        "(h, w, C) tokens.",
        "`dvt denoise`: 0.",
        "Computes it.",
        "Tokens of it.",
    ]
    assert not [line for line in bad if opens_well(line, False) or opens_well(line, True)]
    assert opens_well("The size of a patch.", True) and not opens_well("The size of a patch.", False)


def run_python(code, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


def test_import_dvt_is_light(tmp_path):
    heavy = "matplotlib sklearn ray mmseg timm torchvision accelerate transformers tyro diffusers"
    code = f"import sys, dvt; print(*[name for name in {heavy.split()} if name in sys.modules])"
    assert run_python(code, tmp_path) == []


def test_the_solvers_and_metrics_need_no_model_library(tmp_path):
    heavy = ["matplotlib", "sklearn", "ray", "timm", "torchvision", "h5py"]
    code = f"""
import sys, dvt.fields, dvt.analysis
for front in (dvt.fields, dvt.analysis):
    assert all(hasattr(front, name) for name in front.__all__)  # they are loaded when first used
print(*[name for name in {heavy} if name in sys.modules])
"""
    assert run_python(code, tmp_path) == []


def test_a_folder_of_the_users_cannot_shadow_ours(tmp_path):
    (tmp_path / "analysis.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "fields.py").write_text("raise RuntimeError('shadowed')")
    run_python("import dvt.analysis, dvt.fields", tmp_path)


def test_a_clone_named_dvt_does_not_shadow_the_package(tmp_path):
    (tmp_path / "dvt").symlink_to(ROOT)
    run_python("import dvt, dvt.fields, dvt.cli; dvt.Denoiser; dvt.demo_weights().stat()", tmp_path)


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if ">>>" in path.read_text()])
def test_docstring_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]


def exists(name):
    """Tell if a dotted name is a module, or something in one."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:place]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:place]))
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_what_exists(path):
    names = set(re.findall(r"(?<![\w/.-])dvt(?:\.[A-Za-z_]\w*)+", path.read_text()))
    names = {name for name in names if not name.endswith(".X") and "mmseg" not in name}  # mmseg: another environment
    assert not {name for name in names if not exists(name)}


def test_messages_do_not_say_1_images():
    """A length before a plural goes through dvt.text.counted; those named here are two or more."""
    plural = re.compile(r"\{(len\([^{}]*\))\} (?:[a-z-]+ )?(images|photographs|files|pictures|maps|samples|frames)\b")
    found = [
        f"{module}: {length} {noun}"
        for module, path in MODULES.items()
        for length, noun in plural.findall(path.read_text(encoding="utf-8"))
        if length not in ("len(same)", "len(found)", "len(store)")
    ]
    assert not found
