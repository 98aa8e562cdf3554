"""The wheel, installed outside the checkout with only what it declares, which leaves out torch."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flax_projector.config import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.torch]

REPO = Path(__file__).parents[1]
PARTS = ["pyproject.toml", "README.md", "LICENSE", "train_tpu.py"]
FOLDERS = ["flax_projector", "convert", "tests", "examples", "benchmarks"]

PROGRAMS = {  # console script: its module, and its commands or presets
    "flax-projector": ("flax_projector", ["transcribe", "evaluate", "report"]),
    "flax-projector-convert": ("convert", ["to-flax", "to-torch", "verify", "inspect"]),
    "flax-projector-train": ("train_tpu", list(PRESETS)),
}
HELP = [[script] for script in PROGRAMS]
HELP += [["python", "-m", module] for module, _ in PROGRAMS.values()]
HELP += [[script, command] for script, (_, commands) in PROGRAMS.items() for command in commands]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the checkout, so that nothing is left behind in it."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "checkout"
    copy.mkdir()
    for name in PARTS:
        shutil.copy(REPO / name, copy)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.ogg")
        shutil.copytree(REPO / name, copy / name, ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, copy]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and the packages that it requires, but no others.

    The packages are links into the environment that the tests run in.
    """
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    options = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "install", *options, wheel], check=True)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (ours,) = distributions(name="flax-projector", path=[str(site_packages)])
    for name in {name for name, _ in requirements(ours)}:
        link_package(distribution(name), site_packages)
    return venv


def requirements(
    package: Distribution, extra: str = "", found: set[tuple[str, str]] | None = None
) -> set[tuple[str, str]]:
    """What a package requires, directly or through others: (name, extra)."""
    found = set() if found is None else found
    for requirement in map(Requirement, package.requires or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (requirement.name, wanted)
            if key not in found:
                found.add(key)
                requirements(distribution(requirement.name), wanted, found)
    return found


def link_package(package: Distribution, site_packages: Path) -> None:
    """Links everything that belongs to a package into another folder of packages."""
    tops = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
    assert tops, f"{package.name} does not record its files"
    for top in tops:
        if not (site_packages / top).exists():  # packages may share a folder, such as google/
            (site_packages / top).symlink_to(str(package.locate_file(top)))


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory) -> Run:
    """Runs a program of that environment outside the checkout, and expects its exit code."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "XLA_FLAGS"}
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONNOUSERSITE": "1"}
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        program, *options = args
        done = subprocess.run(
            [installed / "bin" / program, *options],
            cwd=elsewhere,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == code, f"{args}:\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> list[str]:
    """Options that name a tiny Whisper and a tiny Llama, which this process makes with torch."""
    from tests.tiny import make_towers

    folders = make_towers(tmp_path_factory.mktemp("towers"))
    return ["--encoder", folders["encoder"], "--llm", folders["llm"]]


@pytest.fixture(scope="module")
def finished_run(run, towers, tmp_path_factory) -> Path:
    """The folder of a tiny training by the installed program."""
    from tests.tiny import make_speech

    folder = tmp_path_factory.mktemp("train")
    data = ["--data.train", make_speech(folder / "speech", 13)]
    data += ["--data.eval", make_speech(folder / "heldout", 3, seed=1)]
    run("flax-projector-train", "tiny", *towers, *data, "--out", folder / "run")
    return folder / "run"


def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        path.relative_to(REPO).as_posix()
        for package in ("flax_projector", "convert")
        for path in (REPO / package).rglob("*.py")
    }
    assets = {f"flax_projector/report/assets/report.{end}" for end in ("html", "css", "js")}
    expected = modules | assets
    expected |= {"train_tpu.py", "flax_projector/py.typed", "convert/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("module", ["flax_projector", "convert", "train_tpu"])
def test_module_is_that_of_the_wheel(run, installed, module):
    file = run("python", "-c", f"import {module}; print({module}.__file__)").stdout.strip()
    assert Path(file).is_relative_to(installed)


def test_torch_is_not_installed(run):
    assert "No module named 'torch'" in run("python", "-c", "import torch", code=1).stderr


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help(run, command):
    assert run(*command, "--help").stdout.startswith("usage: ")


def test_conversion_there_and_back_gives_the_same_bytes(run, tmp_path):
    from tests.tiny import make_projector

    hf = make_projector(tmp_path / "hf")
    run("flax-projector-convert", "to-flax", hf, tmp_path / "flax")
    run("flax-projector-convert", "to-torch", tmp_path / "flax", tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_training_ends_with_a_projector(finished_run):
    assert (finished_run / "projector" / "config.json").is_file()
    records = [
        json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(record["step"] for record in records) == PRESETS["tiny"][1].num_steps
    assert (finished_run / "report.html").is_file()


def test_transcribe_with_the_finished_run(run, finished_run):
    clip = finished_run.parent / "heldout" / "0.wav"
    (line,) = run("flax-projector", "transcribe", finished_run, clip).stdout.splitlines()
    path, _, transcript = line.partition("\t")
    assert path == str(clip)
    assert not transcript.startswith("[")  # brackets say why there is no transcript


def test_demo_without_its_speech_says_where_it_is(run, towers, tmp_path):
    sizes = ["--projector.encoder-dim", "24", "--projector.llm-dim", "40"]  # of the towers
    out = ["--out", tmp_path / "run"]
    done = run("flax-projector-train", "demo", *towers, *sizes, *out, code=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "run the demo in a clone" in last
    assert "Traceback" not in done.stderr
