"""A plan as text, for a terminal."""

from collections.abc import Sequence

from flax_projector.planning.estimate import Estimate
from flax_projector.planning.plan import Plan
from flax_projector.planning.program import PARTS


def report(plan: Plan) -> str:
    """The whole plan as text."""
    topology, chip, config = plan.topology, plan.topology.chip, plan.config
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    frames = "kept frames" if config.data.cache_features else f"{config.data.window_secs:g} s window"
    lines = [
        f"{config.encoder} + {config.llm} on {topology.name}: {topology.num_chips} chips, {mesh}",
        f"{config.dtype}, remat {config.remat}, {frames}, {config.data.batch_size} clips a step in "
        f"{config.accumulation_steps} micro-batches",
        f"a {topology.chip_name} ({chip.source}): {chip.peak_flops / 1e12:g} TFLOP/s in bf16, "
        f"{chip.hbm_bytes / 1e9:.1f} GB at {chip.hbm_bandwidth / 1e9:g} GB/s, "
        f"{chip.link_bandwidth / 1e9:g} GB/s to its neighbours",
        "",
        *_memory(plan),
    ]
    if estimates := [each for each in plan.estimates if each is not None]:
        if chip.clock is not None:
            lines += ["", *_times(plan, estimates)]
        lines += ["", *_speed(plan, estimates), "", *_host(plan, estimates)]
    lines += ["", *(f"note: {note}" for note in [*_sources(plan), *plan.notes])]
    return "\n".join(lines) + "\n"


def _memory(plan: Plan) -> list[str]:
    header = ["memory of a chip, GB", "rows", "arguments", "temporaries", "peak", "of", "fits", "compiled in"]
    rows = [
        [
            _bucket(plan, number),
            str(step.rows),
            _gb(step.arguments),
            _gb(step.temporaries),
            _gb(step.peak),
            _gb(step.capacity),
            "yes" if step.fits else "NO",
            f"{step.compile_secs:.0f} s",
        ]
        for number, step in enumerate(plan.steps)
    ]
    most = (
        f"most rows of a micro-batch that fit on a chip, estimated: {plan.most_rows}, that is "
        f"--data.batch-size {plan.most_clips}"
    )
    return [*table(header, rows), most]


def _times(plan: Plan, estimates: Sequence[Estimate]) -> list[str]:
    names = [name for name in (*PARTS, "kernels", "collectives") if any(name in e.parts for e in estimates)]
    header = ["estimated ms of a step", *(_bucket(plan, n) for n in range(len(plan.steps)))]
    rows = [
        [name, *("-" if e is None else f"{1e3 * e.parts.get(name, 0):.1f}" for e in plan.estimates)]
        for name in names
    ]
    rows.append(["together", *("-" if e is None else f"{1e3 * e.secs:.1f}" for e in plan.estimates)])
    return table(header, rows)


def _speed(plan: Plan, estimates: Sequence[Estimate]) -> list[str]:
    header = ["", *(_bucket(plan, n) for n in range(len(plan.steps))), "mixture"]

    def row(name: str, value, mean: str = "") -> list[str]:
        return [name, *("-" if e is None else value(e) for e in plan.estimates), mean]

    mixed = plan.mixture
    bounds = list(estimates[0].roofline)
    return table(
        header,
        [
            ["share of batches", *(f"{_share(plan, n):.0%}" for n in range(len(plan.steps))), ""],
            row("step, ms", lambda e: f"{1e3 * e.secs:.1f}", f"{1e3 * mixed['step_secs']:.1f}" if mixed else ""),
            *(row(f"  least by {name}", lambda e, n=name: f"{1e3 * e.roofline[n]:.1f}") for name in bounds),
            row("limited by", lambda e: e.limit),
            row("model TFLOPs", lambda e: f"{e.model_flops / 1e12:.1f}"),
            row("MFU", lambda e: f"{e.mfu:.1%}", f"{mixed['mfu']:.1%}" if mixed else ""),
            row("MB sent by a chip", lambda e: f"{e.sent_bytes / 1e6:.1f}"),
            row("  between slices", lambda e: f"{e.network_bytes / 1e6:.1f}"),
            row(
                "audio-hours per chip-hour",
                lambda e: f"{e.audio_hours_per_chip_hour:.1f}",
                f"{mixed['audio_hours_per_chip_hour']:.1f}" if mixed else "",
            ),
        ],
    )


def _host(plan: Plan, estimates: Sequence[Estimate]) -> list[str]:
    most = max(estimates, key=lambda e: e.host_audio_secs_per_sec)
    cores = ", ".join(f"{n:.1f} for {name}" for name, n in most.host_cores.items())
    read = ", ".join(f"{n / 1e6:.2f} MB/s of {name}" for name, n in most.host_read_bytes_per_sec.items())
    sent = max(e.host_to_chips_bytes_per_sec for e in estimates)
    return [
        f"a host of {plan.topology.chips_per_host} chips, estimated: {most.host_audio_secs_per_sec:.0f} "
        f"s of speech a second; cores: {cores}; reads {read}; sends {sent / 1e6:.1f} MB/s to its chips"
    ]


def _sources(plan: Plan) -> list[str]:
    if plan.topology.chip.clock is None:
        return [
            "times are the roofline, the least that is possible: the GPU's compiler estimates none",
            _FLOPS,
        ]
    return [
        "times are estimates: the compiler's own cycles for every operation, loops multiplied; "
        "Pallas kernels as FLOPs at the chip's peak, with heads padded to 128; collectives that "
        "nothing hides as bytes at the speed of the links",
        _FLOPS,
    ]


_FLOPS = (
    "model FLOPs: 2 N_encoder a frame of the window, 6 N_projector an audio token, 4 N_layers a "
    "token of the LLM, 4 V D a label, without padding (FlopCounter)"
)


def _bucket(plan: Plan, number: int) -> str:
    step = plan.steps[number]
    return f"{step.bucket.num_frames / 50:.1f} s, L {step.bucket.merged_len}"


def _share(plan: Plan, number: int) -> float:
    return plan.contents[number].num_batches / sum(each.num_batches for each in plan.contents)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *right]).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
