"""A plan as text, for a terminal."""

from collections.abc import Callable, Sequence

from flax_projector.lengths import FRAME_SECS
from flax_projector.planning.estimate import Estimate
from flax_projector.planning.plan import Plan
from flax_projector.planning.program import PARTS


def report(plan: Plan) -> str:
    """The whole plan as text."""
    parts = [_heading(plan), _memory(plan)]
    if any(plan.estimates):
        parts += [_times(plan), _speed(plan), _host(plan)]
    parts.append(
        [
            f"decoding {plan.decoding['rows']:g} rows a chip, estimated: "
            f"{_ms(plan.decoding['token_secs'])} ms a token, "
            f"{plan.decoding['tokens_per_sec']:.0f} tokens a second and chip; its bytes take "
            f"{_ms(plan.decoding['hbm_secs'])} ms at least"
        ]
    )
    parts.append([f"note: {note}" for note in [*_sources(plan), *plan.notes]])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _heading(plan: Plan) -> list[str]:
    topology, chip, config = plan.topology, plan.topology.chip, plan.config
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    window = f"a window of {config.data.window_secs:g} s"
    return [
        f"{config.encoder} + {config.llm} on {topology.name}: {topology.num_chips} chips, {mesh}",
        f"{config.dtype}, remat {config.remat}, "
        f"{'kept frames' if config.data.cache_features else window}, "
        f"{config.data.batch_size} clips a step in {config.accumulation_steps} micro-batches",
        f"a {topology.chip_name} ({chip.source}): {chip.peak_flops / 1e12:g} TFLOP/s in bf16, "
        f"{chip.hbm_bytes / 1e9:.1f} GB at {chip.hbm_bandwidth / 1e9:g} GB/s, "
        f"{chip.link_bandwidth / 1e9:g} GB/s to its neighbours",
    ]


def _memory(plan: Plan) -> list[str]:
    columns = ["rows", "arguments", "temporaries", "peak", "of", "fits", "compiled in"]
    rows = [
        [
            _bucket(plan, number),
            str(step.rows),
            *(
                f"{count / 1e9:.2f}"
                for count in (step.arguments, step.temporaries, step.peak, step.capacity)
            ),
            "yes" if step.fits else "NO",
            f"{step.compile_secs:.0f} s",
        ]
        for number, step in enumerate(plan.steps)
    ]
    return [
        *table(["memory of a chip, GB", *columns], rows),
        f"most rows of a micro-batch that fit on a chip, estimated: {plan.most_rows}, that is "
        f"--data.batch-size {plan.most_clips}",
    ]


def _times(plan: Plan) -> list[str]:
    known = [each for each in plan.estimates if each is not None]
    names = [*PARTS, "kernels", "collectives"]
    names = [name for name in names if any(name in each.parts for each in known)]
    rows = [_row(plan, name, lambda e, n=name: _ms(e.parts.get(n, 0.0))) for name in names]
    rows.append(_row(plan, "together", lambda e: _ms(e.secs)))
    return table(["estimated ms of a step", *_buckets(plan), ""], rows)


def _speed(plan: Plan) -> list[str]:
    mixed = plan.mixture
    total = sum(each.num_batches for each in plan.contents)
    bounds = next(each.roofline for each in plan.estimates if each is not None)
    secs, mfu, hours = (
        form(mixed[name]) if mixed else ""
        for name, form in {
            "step_secs": _ms,
            "mfu": "{:.1%}".format,
            "audio_hours_per_chip_hour": "{:.1f}".format,
        }.items()
    )
    rows = [
        ["share of batches", *(f"{each.num_batches / total:.0%}" for each in plan.contents), ""],
        _row(plan, "step, ms", lambda e: _ms(e.secs), secs),
        *(_row(plan, f"  least by {n}", lambda e, n=n: _ms(e.roofline[n])) for n in bounds),
        _row(plan, "limited by", lambda e: e.limit),
        _row(plan, "model TFLOPs", lambda e: f"{e.model_flops / 1e12:.1f}"),
        _row(plan, "MFU", lambda e: f"{e.mfu:.1%}", mfu),
        _row(plan, "MB sent by a chip", lambda e: f"{e.sent_bytes / 1e6:.1f}"),
        _row(plan, "  between slices", lambda e: f"{e.network_bytes / 1e6:.1f}"),
        _row(
            plan,
            "audio-hours per chip-hour",
            lambda e: f"{e.audio_hours_per_chip_hour:.1f}",
            hours,
        ),
    ]
    return table(["estimated", *_buckets(plan), "mixture"], rows)


def _host(plan: Plan) -> list[str]:
    known = [each for each in plan.estimates if each is not None]
    most = max(known, key=lambda each: each.host_audio_secs_per_sec)
    cores = ", ".join(f"{count:.1f} for {name}" for name, count in most.host_cores.items())
    read = most.host_read_bytes_per_sec.items()
    sent = max(each.host_to_chips_bytes_per_sec for each in known)
    return [
        f"a host of {plan.topology.chips_per_host} chips, estimated:",
        f"  {most.host_audio_secs_per_sec:.0f} s of speech a second; cores: {cores}",
        f"  reads {', '.join(f'{count / 1e6:.2f} MB/s of {name}' for name, count in read)}; "
        f"sends {sent / 1e6:.1f} MB/s to its chips",
    ]


def _sources(plan: Plan) -> list[str]:
    times = (
        "times are estimates: the compiler's own cycles for every operation, loops multiplied; "
        "Pallas kernels as FLOPs at the chip's peak, with heads padded to 128; collectives that "
        "nothing hides as bytes at the speed of the links"
    )
    if plan.topology.chip.clock is None:
        attained = plan.topology.chip.attained
        times = (
            "times are estimates: of every operation its FLOPs or its bytes, loops multiplied, at "
            f"what one H100 attained of its peaks ({attained.products:.0%} in products of "
            f"matrices, {attained.kernels:.0%} in attention, {attained.hbm:.0%} of the memory's "
            "bandwidth); collectives that nothing hides as bytes at the speed of the links"
        )
    return [
        times,
        "model FLOPs: 2 N_encoder a frame of the window, 6 N_projector an audio token, 4 N_layers "
        "a token of the LLM, 4 V D a label, without padding (`FlopCounter`)",
    ]


def _row(plan: Plan, name: str, show: Callable[[Estimate], str], mixed: str = "") -> list[str]:
    return [name, *("-" if each is None else show(each) for each in plan.estimates), mixed]


def _ms(secs: float) -> str:
    return f"{1e3 * secs:.1f}"


def _buckets(plan: Plan) -> list[str]:
    return [_bucket(plan, number) for number in range(len(plan.steps))]


def _bucket(plan: Plan, number: int) -> str:
    bucket = plan.steps[number].bucket
    return f"{bucket.num_frames * FRAME_SECS:.1f} s, L {bucket.merged_len}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *right]).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
