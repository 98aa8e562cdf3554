"""The layers of the project, read from its imports: folders are layers, and arrows point down."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

import flax_projector

ROOT = Path(__file__).parents[1]

# What each layer may import, beside its own modules.
LAYERS: dict[str, set[str]] = {
    "base": set(),  # the files named in BASE
    "models": {"base"},
    "data": {"base"},
    "training": {"base", "models", "data"},
    "convert": {"base", "models"},
    "run": {"base", "models", "data", "training", "convert"},
    "inference": {"base", "models", "data", "training", "convert", "run"},
    "planning": {"base", "models", "data", "training", "convert", "run"},
    "report": {"base", "data", "training"},
    "handover": {"base", "models", "data", "training", "convert"},
    "commands": {"base", "data", "training", "run", "inference", "report"},
    "programs": {
        "base",
        "data",
        "training",
        "convert",
        "run",
        "inference",
        "planning",
        "handover",
        "report",
        "commands",
    },
}
# Lowest first; each imports only those before it.
BASE = [
    "lengths",
    "chips",
    "storage",
    "files",
    "file_types",
    "logs",
    "config",
    "run_folder",
    "hosts",
    "sharding",
    "batch",
    "chat",
]
PROGRAMS = {"train_tpu", "flax_projector.__main__", "convert.__main__"}

MAX_LINES = 400
MAX_LINES_OF_MAIN = 120
MAX_LINES_OF_README = 130
MAX_FILES_AT_THE_TOP = 12


@functools.cache
def modules() -> dict[str, Path]:
    files = [
        *ROOT.glob("flax_projector/**/*.py"),
        *ROOT.glob("convert/**/*.py"),
        ROOT / "train_tpu.py",
    ]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


def layer_of(module: str) -> str:
    """The layer of one of our modules, or of a name in it."""
    if module in PROGRAMS:
        return "programs"
    first, *rest = module.split(".")
    if first == "convert":
        return "convert"
    return "base" if rest[0] in BASE else rest[0]


def imports(path: Path) -> set[str]:
    """Everything that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def our_imports(name: str) -> set[str]:
    """Those of our modules that a module imports."""
    return {
        m for m in imports(modules()[name]) & (set(modules()) | PROGRAMS) if "__init__" not in m
    }


# `flax_projector/__init__.py` imports nothing until somebody asks it for a name.
IMPORTERS = sorted(name for name in modules() if name != "flax_projector.__init__")


@pytest.mark.parametrize("name", IMPORTERS)
def test_imports_point_downwards(name):
    mine = layer_of(name)
    upward = {m for m in our_imports(name) if layer_of(m) not in LAYERS[mine] | {mine}}
    if mine == "base":
        order = BASE.index(name.split(".")[1])
        upward |= {m for m in our_imports(name) if BASE.index(m.split(".")[1]) > order}
    assert not upward, f"{name}, in layer {mine!r}, imports {sorted(upward)}"


@pytest.mark.parametrize("name", IMPORTERS)
def test_only_storage_opens_urls(name):
    """So that buckets are patient, and their errors are of one line, wherever they are read."""
    if not name.startswith("flax_projector.storage"):
        assert not re.search(
            r"^\s*(import|from) (fsspec|gcsfs)\b", modules()[name].read_text(), re.M
        )


def test_no_module_imports_itself_in_a_circle():
    below = {name: our_imports(name) for name in IMPORTERS}
    while below:
        leaves = {name for name, imported in below.items() if not imported & below.keys()}
        assert leaves, f"a circle among {sorted(below)}"
        below = {name: imported for name, imported in below.items() if name not in leaves}


def test_an_upward_import_would_be_found():
    """The control of the test above: data must not import training, nor training convert."""
    assert layer_of("flax_projector.training.state") not in LAYERS["data"]
    assert layer_of("convert.load") not in LAYERS["training"]
    assert "flax_projector.batch" in our_imports("flax_projector.data.batches")


@pytest.mark.parametrize("name", [m for m in IMPORTERS if not m.startswith("convert.")])
def test_training_never_names_torch(name):
    assert not {m for m in imports(modules()[name]) if m.split(".")[0] == "torch"}


@pytest.mark.parametrize("name", sorted(m for m in modules() if m.endswith("__init__")))
def test_a_package_says_what_is_in_it(name):
    """In its docstring; the top one names its folders instead of every file."""
    folder = modules()[name].parent
    text = ast.get_docstring(ast.parse(modules()[name].read_text())) or ""
    files = [file.stem for file in folder.glob("*.py")]
    inside = [*files, *(child.parent.name for child in folder.glob("*/__init__.py"))]
    words = set(re.findall(r"\w+", text))
    missing = sorted(name for name in inside if not name.startswith("__") and name not in words)
    assert not missing, f"{name} does not mention {missing}"


def test_sizes():
    """A newcomer can read each part in one go."""
    folders = ["flax_projector", "convert", "tests", "benchmarks", "examples"]
    files = [file for folder in folders for file in (ROOT / folder).glob("**/*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES_OF_README
    top = [file for file in (ROOT / "flax_projector").iterdir() if file.is_file()]
    assert len(top) <= MAX_FILES_AT_THE_TOP
    tree = ast.parse((ROOT / "train_tpu.py").read_text())
    (main,) = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "main"]
    assert main.end_lineno is not None
    assert main.end_lineno - main.lineno < MAX_LINES_OF_MAIN
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Nonlocal)]


def public_functions(body: list[ast.stmt], prefix: str = "") -> dict[str, ast.FunctionDef]:
    """Functions and methods of a module or class whose names say that others may call them."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found |= public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and re.match(r"__call__|[^_]", node.name):
            found[prefix + node.name] = node
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_public_function_has_a_docstring(name):
    tree = ast.parse(modules()[name].read_text())
    bare = [
        function
        for function, node in public_functions(tree.body).items()
        if not ast.get_docstring(node) and not function.startswith("ShapeDtype.")
    ]
    assert not bare, f"{name}: {bare}"


def legend() -> set[str]:
    """The letters that the package's docstring explains."""
    text = flax_projector.__doc__ or ""
    table = text[text.index("Every letter") : text.index("Masks are")]
    return set(re.findall(r"(?:^|\s{2})([A-Za-z]{1,2})  +\w", table, flags=re.M))


def shape_letters(source: str) -> set[str]:
    """Letters in shapes: of jaxtyping's annotations, docstrings and comments.

    Names of three letters and more explain themselves, as in "layers B C K d".
    """
    shapes = re.findall(
        r"\b(?:Float|Int|Bool)\[[\w.| ]+, \"([^\"]*)\"\]", re.sub(r"\s+", " ", source)
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            shapes += re.findall(
                r"\[([A-Za-z0-9*/+ ,|]*\b[A-Z]\b[A-Za-z0-9*/+ ,|]*)\]", token.string
            )
    return {word for shape in shapes for word in re.findall(r"[A-Za-z]+", shape) if len(word) < 3}


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_letter_of_a_shape_is_in_the_legend(name):
    if name == "flax_projector.__init__":
        pytest.skip("it is the legend")
    unknown = shape_letters(modules()[name].read_text()) - legend()
    assert not unknown, f"{name} uses {sorted(unknown)}: see flax_projector/__init__.py"


def test_a_letter_that_is_not_in_the_legend_would_be_found():
    assert {"B", "S", "GQ", "d", "k"} <= legend() and "Y" not in legend()
    text = 'x: Float[Array, "B Y"] = f(y)  # [B, R*d]\n"""[U, 3] of z."""\n'
    assert shape_letters(text) == {"B", "Y", "R", "d", "U"}
