"""The layers of the packages, read from their imports: a module imports only what lies below."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest layer first; modules of one layer do not import each other.
LAYERS: list[set[str]] = [
    {"flax_projector.config", "flax_projector.files"},
    {"flax_projector.losses", "flax_projector.sharding", "flax_projector.audio"}
    | {"flax_projector.preemption", "flax_projector.throughput"},
    {"flax_projector.bad_rows"},
    {"flax_projector.manifest"},
    {"flax_projector.attention", "flax_projector.layers"},
    {"flax_projector.projector", "flax_projector.whisper", "flax_projector.llama"},
    {"flax_projector.prompt", "flax_projector.hf_data"},
    {"flax_projector.speech_llm", "flax_projector.batch_plan"},
    {"flax_projector.data"},
    {"flax_projector.train_step", "flax_projector.features"},
    {"flax_projector.decode", "flax_projector.checkpoints"},
    {"flax_projector.evaluate"},
    {"flax_projector.metrics"},
    {"convert.checkpoint", "convert.errors", "convert.paths", "convert.rules"},
    {"convert.tables", "convert.engine", "convert.hf_config", "convert.torch_projector"}
    | {"convert.trees"},
    {"convert.torch_files", "convert.flax_files", "convert.infer"},
    {"convert.sources"},
    {"convert.models"},
    {"convert.load", "convert.compare"},
    {"convert.api"},
    {"convert.__main__", "flax_projector.run"},
    {"flax_projector.__main__"},
    {"train_tpu"},
]
# The converter sees configs and modules (for the shapes of their parameters), not the training.
CONVERT_MAY_SEE = {"config", "projector", "whisper", "llama"}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("flax_projector/*.py"), *ROOT.glob("convert/*.py"), ROOT / "train_tpu.py"]
    named = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name: file for name, file in named.items() if not name.endswith("__init__")}


def imports(path: Path, prefixes: tuple[str, ...]) -> set[str]:
    """Modules that a file imports anywhere, functions included, with one of the prefixes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in prefixes}


def test_every_module_has_a_layer():
    assert set(modules()) == set().union(*LAYERS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_downwards(name):
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    seen = imports(modules()[name], ("flax_projector", "convert", "train_tpu")) & set(level)
    upward = sorted(other for other in seen if level[other] >= level[name])
    assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize("name", sorted(m for m in modules() if m.startswith("convert.")))
def test_converter_does_not_see_training(name):
    seen = {m.split(".")[1] for m in imports(modules()[name], ("flax_projector",)) if "." in m}
    assert seen <= CONVERT_MAY_SEE, f"{name} imports {sorted(seen - CONVERT_MAY_SEE)}"


@pytest.mark.parametrize("name", sorted(m for m in modules() if m.startswith("flax_projector.")))
def test_package_never_names_torch(name):
    assert not imports(modules()[name], ("torch",))


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
