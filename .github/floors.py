"""Prints constraints for pip that hold the declared packages at their lower bounds.

All other packages stay at the versions of constraints.txt. `make floors.txt` writes the result.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def canonical(name: str) -> str:
    """The form in which names of packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [project["dependencies"], *extras]
    text = "\n".join(requirement for group in declared for requirement in group)
    bounds = re.findall(r"^([\w.-]+)(?:\[.*\])?>=([\w.]+)", text, re.MULTILINE)
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = {canonical(name): version for name, version in [*pins, *bounds]}
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(versions.items()))


if __name__ == "__main__":
    main()
