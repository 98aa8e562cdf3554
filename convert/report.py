"""The text that the commands print on standard output."""

import dataclasses
import math
import textwrap

from convert.api import Summary
from convert.checkpoint import TensorInfo
from convert.compare import MAX_OUTPUT_ERROR, Comparison


def comparison_text(result: Comparison) -> str:
    """What `verify` found: a line for every tensor, every difference, and the verdict."""
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
            f"outputs: PyTorch(A) and Flax(B) differ by at most {result.output_error:.1e} of their "
            f"RMS (allowed: {MAX_OUTPUT_ERROR:.0e})"
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
    return "\n".join(lines) + "\n"


def summary_text(summary: Summary) -> str:
    """What `inspect` found: the model, its config, and a line for every tensor."""
    verdict = "supported" if summary.kind else "not supported"
    if summary.kind and summary.problem:
        verdict += ", but this one cannot be converted as it is"
    lines = [f"model   {summary.architecture}: {verdict}"]
    if summary.problem:
        lines.append(textwrap.indent(summary.problem, 8 * " "))
    if summary.config is not None:
        values = dataclasses.asdict(summary.config).items()
        lines.append("config  " + "\n        ".join(f"{name} = {value}" for name, value in values))
    if summary.prompt is not None:
        before, after, end = (summary.prompt[n] for n in ("before_audio", "after_audio", "end"))
        prompt = f"{before}<audio>{after}TRANSCRIPT{end}"
        lines.append("prompt  " + prompt.rstrip("\n").replace("\n", "\n        "))
    width = max((len(name) for name in summary.infos), default=0)
    lines += [
        f"{name:<{width}}  {info.dtype.name:<8}  {list(info.shape)}"
        for name, info in sorted(summary.infos.items())
    ]
    count = sum(math.prod(info.shape) for info in summary.infos.values())
    nbytes = sum(info.nbytes for info in summary.infos.values())
    lines.append(f"total   {len(summary.infos)} tensors, {count:,} parameters, {nbytes:,} bytes")
    return "\n".join(lines) + "\n"


def _header(info: TensorInfo) -> str:
    return f"{info.dtype.name}{list(info.shape)}"
