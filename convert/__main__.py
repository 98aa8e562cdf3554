"""`python -m convert`: checkpoints of PyTorch and of Flax, converted into each other."""

import argparse
import dataclasses
import logging
import math
import sys

import jax

from convert import api
from convert.rules import DTYPES

_log = logging.getLogger("convert")

_EXAMPLES = """\
examples:
  python -m convert to-flax whisper-base/ whisper-base-flax/
  python -m convert to-flax tiny-audio/model.safetensors projector-flax/
  python -m convert to-torch runs/demo/projector/ projector-hf/
  python -m convert to-torch runs/demo/projector/ projector.safetensors --dtype bfloat16
  python -m convert inspect projector-hf/

Projectors, Whisper encoders and Llama models are recognised by their config.json. Every conversion
ends by reading the result, converting it back and comparing every byte.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = _parser().parse_args(argv)
    _log.setLevel(logging.INFO)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        _log.error("error: %s", error)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts checkpoints between PyTorch and Flax, bit for bit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, function, text in (
        ("to-flax", api.to_flax, "PyTorch checkpoint (folder or file) -> Flax folder"),
        ("to-torch", api.to_torch, "Flax folder -> HF folder, or a .safetensors file"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("src", metavar="SRC", help="what to convert")
        command.add_argument("dst", metavar="DST", help="where to write the result")
        command.add_argument(
            "--overwrite", action="store_true", help="replace what an earlier conversion wrote"
        )
        command.add_argument(
            "--no-verify", action="store_true", help="do not convert back and compare"
        )
        command.add_argument("--dtype", choices=DTYPES, help="cast first (default: keep every bit)")
        command.set_defaults(run=_convert, function=function)

    text = "list tensors, dtypes and config of a checkpoint, from its headers"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("path", metavar="PATH", help="folder or file, of PyTorch or of Flax")
    command.set_defaults(run=_inspect)
    return parser


def _convert(args: argparse.Namespace) -> None:
    dst = args.function(
        args.src,
        args.dst,
        overwrite=args.overwrite,
        verify=not args.no_verify,
        dtype=args.dtype,
    )
    _log.info("wrote %s", dst)


def _inspect(args: argparse.Namespace) -> None:
    summary = api.inspect(args.path)
    lines = [f"model   {summary.kind.name if summary.kind else 'unknown'}"]
    if summary.config is not None:
        values = dataclasses.asdict(summary.config).items()
        lines.append("config  " + "\n        ".join(f"{name} = {value}" for name, value in values))
    width = max((len(name) for name in summary.infos), default=0)
    lines += [
        f"{name:<{width}}  {info.dtype.name:<8}  {list(info.shape)}"
        for name, info in sorted(summary.infos.items())
    ]
    count = sum(math.prod(info.shape) for info in summary.infos.values())
    nbytes = sum(info.nbytes for info in summary.infos.values())
    lines.append(f"total   {len(summary.infos)} tensors, {count:,} parameters, {nbytes:,} bytes")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to those who train on them
    # force: a library that we import has set up logging already
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    sys.exit(main())
