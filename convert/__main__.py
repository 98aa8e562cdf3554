"""`python -m convert`: checkpoints of PyTorch and of Flax, converted into each other."""

import argparse
import dataclasses
import logging
import math
import sys
import textwrap
from typing import Any

import jax

from convert import api
from convert.checkpoint import DTYPES, TensorInfo
from convert.compare import MAX_OUTPUT_ERROR, Comparison

_log = logging.getLogger("convert")

_EXAMPLES = """\
examples:
  python -m convert to-flax tiny-audio-checkpoint/ projector-flax/
  python -m convert to-flax outputs/ projector-flax/ --step 2000     # outputs/checkpoint-2000
  python -m convert to-flax best.pt projector-flax/ \\
      --encoder-dim 1280 --rms-norm-eps 1e-6 --projector-dropout 0   # no config.json beside it
  python -m convert to-torch runs/demo/projector/ projector-hf/
  python -m convert to-torch runs/demo/ projector.pt --step 480 --prefix ""
  python -m convert to-torch runs/demo/projector/ projector.safetensors --dtype bfloat16
  python -m convert to-flax openai/whisper-base whisper-flax/     # downloaded; its encoder
  python -m convert to-flax SmolLM2-135M-Instruct/ llm-flax/
  python -m convert verify projector-hf/ projector-flax/
  python -m convert inspect projector-hf/

Projectors, Whisper encoders and Llama models are recognised by their config.json, or by the names
of their tensors. Every conversion ends by reading the result, converting it back and comparing
every byte.

exit codes: 0 done, and in `verify` the same; 1 `verify` found differences; 2 an error
"""

_GIVEN = {
    "encoder_dim": (int, "width of the encoder's frames"),
    "projector_pool_stride": (int, "encoder frames per audio token"),
    "projector_dropout": (float, "dropout rate of training"),
    "rms_norm_eps": (float, "epsilon of the norms"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code, as diff does: 0 same, 1 different, 2 trouble."""
    args = _parser().parse_args(argv)
    _log.setLevel(logging.INFO)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        _log.error("error: %s", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts checkpoints between PyTorch and Flax, bit for bit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "PyTorch checkpoint (HF or Trainer folder, or file) -> Flax folder"
    to_flax = commands.add_parser("to-flax", help=text, description=text)
    _add_conversion(
        to_flax,
        api.to_flax,
        src="what to convert: a folder, a file or a model's id on the Hugging Face hub",
        step="which checkpoint-N of a Trainer folder",
    )
    to_flax.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors that the model has no place for, 'head.*' for example; may be "
        "repeated. They do not come back",
    )
    _add_given(to_flax, "if there is no config.json, or it lacks a field")

    text = "Flax folder or training run -> HF folder, .safetensors or .pt file"
    to_torch = commands.add_parser("to-torch", help=text, description=text)
    _add_conversion(
        to_torch,
        api.to_torch,
        src="what to convert: a folder",
        step="which checkpoint of a training run",
    )
    to_torch.add_argument("--prefix", help='of the keys (default: "projector." for a projector)')

    text = "tell whether two checkpoints are the same model; exit code 1 if they are not"
    verify = commands.add_parser(
        "verify",
        help=text,
        description="Compares the tensors of two checkpoints byte for byte, and their configs. Two "
        "projectors are run as well, A in PyTorch and B in Flax, on the same random input; Whisper "
        "encoders and Llama models are not. Exit code 0: the same, 1: they differ, 2: an error.",
    )
    verify.add_argument("a", metavar="A", help="checkpoint of PyTorch or of Flax, or hub id")
    verify.add_argument("b", metavar="B", help="checkpoint of PyTorch or of Flax, or hub id")
    verify.add_argument("--step", type=int, help="which checkpoint, of A or B or both")
    _add_given(verify, "if neither has a config.json, or it lacks a field")
    verify.set_defaults(run=_verify)

    text = "tell which model a checkpoint is and whether it converts; list config and tensors"
    inspect = commands.add_parser("inspect", help=text, description=text)
    inspect.add_argument("path", metavar="PATH", help="of PyTorch or of Flax, or hub id")
    inspect.add_argument("--step", type=int, help="which checkpoint, where there are several")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_conversion(
    command: argparse.ArgumentParser, function: Any, *, src: str, step: str
) -> None:
    command.add_argument("src", metavar="SRC", help=src)
    command.add_argument("dst", metavar="DST", help="where to write the result")
    command.add_argument("--step", type=int, help=f"{step} (default: the latest)")
    command.add_argument("--dtype", choices=DTYPES, help="cast first (default: keep every bit)")
    command.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier conversion wrote"
    )
    command.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="do not convert back and compare",
    )
    command.set_defaults(run=_convert, function=function)


def _add_given(command: argparse.ArgumentParser, when: str) -> None:
    group = command.add_argument_group(f"projector's config, {when}")
    for name, (kind, text) in _GIVEN.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def _given(args: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of the config that the user gave out of the arguments."""
    values = {name: args.pop(name, None) for name in _GIVEN}
    return {name: value for name, value in values.items() if value is not None}


def _convert(args: argparse.Namespace) -> int:
    options = {n: v for n, v in vars(args).items() if n not in ("run", "function", "src", "dst")}
    if given := _given(options):
        options["given"] = given
    dst = args.function(args.src, args.dst, **options)
    _log.info("wrote %s", dst)
    return 0


def _verify(args: argparse.Namespace) -> int:
    result = api.verify(args.a, args.b, step=args.step, given=_given(dict(vars(args))))
    sys.stdout.write("\n".join(_comparison_lines(result)) + "\n")
    return 0 if result.is_same else 1


def _comparison_lines(result: Comparison) -> list[str]:
    width = max(len(pair.name) for pair in result.tensors)
    lines = [f"{result.kind.name}, A against B", f"{'tensor':<{width}}  max abs difference"]
    for pair in result.tensors:
        verdict = "same bytes" if pair.is_same else "DIFFERS"
        if pair.a is None or pair.b is None:
            error = "only in A" if pair.b is None else "only in B"
        elif pair.max_abs_error is None or pair.a.dtype != pair.b.dtype:
            error = f"{_header(pair.a)} against {_header(pair.b)}"
        else:
            error = f"{pair.max_abs_error:.3g}"
        lines.append(f"{pair.name:<{width}}  {error:<18}  {verdict}")
    lines += [f"config: {name} is {a!r} in A, {b!r} in B" for name, (a, b) in result.config.items()]
    if result.output_error is not None:
        lines.append(
            f"outputs: PyTorch(A) and Flax(B) differ by {result.output_error:.1e} of their RMS "
            f"at most (allowed: {MAX_OUTPUT_ERROR:.0e})"
        )
    differences = {
        "tensors": sum(not pair.is_same for pair in result.tensors),
        "config fields": len(result.config),
        "outputs": int(not result.outputs_agree),
    }
    found = ", ".join(f"{count} {what}" for what, count in differences.items() if count)
    lines.append(
        "the same model, bit for bit" if result.is_same else f"NOT the same model: {found} differ"
    )
    return lines


def _header(info: TensorInfo) -> str:
    return f"{info.dtype.name}{list(info.shape)}"


def _inspect(args: argparse.Namespace) -> int:
    summary = api.inspect(args.path, step=args.step)
    verdict = "supported" if summary.kind else "not supported"
    if summary.kind and summary.problem:
        verdict += ", but this one cannot be converted as it is"
    lines = [f"model   {summary.architecture}: {verdict}"]
    if summary.problem:
        lines.append(textwrap.indent(summary.problem, 8 * " "))
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
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to those who train on them
    # force: a library that we import has set up logging already
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    sys.exit(main())
