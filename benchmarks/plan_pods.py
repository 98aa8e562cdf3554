"""Writes docs/pods.md: the published pair of towers, planned for pods that nobody needs to have.

Each pod is planned by `python train_tpu.py PRESET --plan TOPOLOGY` in a process of its own. Needs
the compilers for TPUs and GPUs, see docs/tpu.md. What was planned is kept in a folder, so that the
next call only plans what is missing.

Example:

  python benchmarks/plan_pods.py --out docs/pods.md --keep /tmp/plans
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from flax_projector.chips import CHIPS
from flax_projector.planning.topology import parse_topology

ROOT = Path(__file__).parents[1]
PRESET = "whisper-turbo-smollm3-3b"
ROWS = 8  # clips of a chip
PODS = {  # as people call them -> as `--plan` does
    "v5e-16": "v5e-16",
    "v5e-256": "v5e-256",
    "2 x v5e-256": "v5e-256 x 2",
    "v5p-128": "v5p-128",
    "v6e-64": "v6e-64",
    "8 x H100": "h100:8",
}
WAYS = {  # options, and the pods that are planned with them
    "the encoder in the step": ([], list(PODS)),
    "kept frames": (["--data.cache-features"], ["v5e-256"]),
}


def command(topology: str, options: list[str]) -> list[str]:
    """The command line that plans a pod."""
    clips = ROWS * parse_topology(topology).num_chips
    batch = ["--data.batch-size", str(clips), "--accumulation-steps", "1"]
    if options:  # kept frames cannot be masked anew in every step
        options = [*options, "--spec-augment.mask-time-prob", "0"]
    return [PRESET, "--plan", topology, *batch, *options]


def make_plan(topology: str, options: list[str], keep: Path) -> dict[str, Any]:
    """The plan of a pod, as `--json` prints it; kept in a file."""
    words = command(topology, options)
    file = keep / ("_".join(words).replace("/", "-").replace(" ", "") + ".json")
    if not file.is_file():
        program = [sys.executable, "train_tpu.py", *words, "--json", "--out", str(keep / "none")]
        result = subprocess.run(program, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if not result.stdout:
            raise SystemExit(f"{' '.join(words)}: exit code {result.returncode}")
        file.write_text(result.stdout)
    return json.loads(file.read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def longest(plan: dict[str, Any]) -> dict[str, Any]:
    """The bucket of the longest clips."""
    return max(plan["buckets"], key=lambda bucket: bucket["merged_len"])


def overview(plans: dict[str, dict[str, Any]]) -> str:
    """What every pod does, in a line each."""
    rows = []
    for name, plan in plans.items():
        bucket, mixture = longest(plan), plan["mixture"]
        memory = f"{bucket['peak'] / 1e9:.1f} of {bucket['capacity'] / 1e9:.1f}"
        if not mixture:
            rows.append([name, str(plan["chips"]), memory, "does not fit", "", "", ""])
            continue
        rows.append(
            [
                name,
                str(plan["chips"]),
                memory,
                str(plan["most_rows_per_chip"]),
                f"{1e3 * mixture['step_secs']:.0f}",
                f"{mixture['mfu']:.0%}",
                f"{mixture['audio_hours_per_chip_hour']:.0f}",
            ]
        )
    header = [
        "",
        "chips",
        "peak memory, GB",
        "most clips a chip",
        "ms a step",
        "MFU",
        "audio-hours per chip-hour",
    ]
    return table(header, rows)


def parts(plans: dict[str, dict[str, Any]]) -> str:
    """Where the time of the longest bucket goes, of pods that it fits on."""
    found = {name: longest(plan).get("estimate", {}) for name, plan in plans.items()}
    found = {name: each for name, each in found.items() if each}
    names = list(dict.fromkeys(part for each in found.values() for part in each["parts"]))
    rows = [
        [part, *(f"{1e3 * each['parts'].get(part, 0):.0f}" for each in found.values())]
        for part in names
    ]
    return table(["ms of a step", *found], rows)


def limits(plans: dict[str, dict[str, Any]]) -> str:
    """What limits each pod, in a sentence each."""
    lines = []
    for name, plan in plans.items():
        each = longest(plan).get("estimate")
        if each is None:
            lines.append(f"- **{name}**: the memory of a chip.")
            continue
        roofline = sorted(each["roofline"].items(), key=lambda item: -item[1])
        (first, most), *others = [(n, secs) for n, secs in roofline if secs > 0]
        rest = ", ".join(f"{n} {1e3 * secs:.1f} ms" for n, secs in others)
        text = f"- **{name}**: {first}, which takes at least {1e3 * most:.0f} ms ({rest}"
        top = sorted(each["parts"].items(), key=lambda item: -item[1])[:3]
        share = ", ".join(f"{part} {secs / each['secs']:.0%}" for part, secs in top)
        text += f"); the estimate is {1e3 * each['secs']:.0f} ms, of it {share}."
        cores = each["host_cores"]["flac"]
        text += f" Its input needs {cores:.2f} cores of each host."
        lines.append(text)
    return "\n".join(lines)


HEAD = """# Pods, planned

What `whisper-large-v3-turbo` with `SmolLM3-3B` would do on pods, by the compilers of their chips,
on a machine that has none of them. **All times are estimates; none was measured on a pod.** This
page is written by `python benchmarks/plan_pods.py`; the same for any preset, pod and option:

```
python train_tpu.py whisper-turbo-smollm3-3b --plan v5e-256 --data.batch-size 4096
```

How it is estimated:

- The step is compiled exactly as training compiles it, for every bucket of lengths. Whether it fits
  is the compiler's own account of memory.
- On TPUs, the time is the sum of the cycles that the compiler estimates for every operation, loops
  multiplied; of the attention kernels, which it does not estimate, counted as FLOPs at the chip's
  peak with heads padded to 128; and of the collectives that nothing hides, as bytes at the speed of
  the links. Waiting for memory that is not in those estimates, and for the input, is not in it.
- On GPUs, whose compiler estimates nothing, the time is the sum over all operations of what their
  FLOPs or their bytes take at the rates that one H100 attained. What was measured there differs
  from such plans by 5% or less with clips of 15 s, by 14% with 5 s ([gpu.md](gpu.md#how-fast)).
- MFU counts the FLOPs that the model needs without padding and recomputation: 2 N a frame in the
  encoder, 6 N an audio token in the projector, 4 N a token in the LLM, 4 V D a label.
- Lengths of clips are assumed: like those of read books, up to 15 s with a mean of 12 s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pods.md")
    parser.add_argument("--keep", type=Path, default=ROOT / "runs/plans")
    parser.add_argument("--pods", nargs="*", default=list(PODS), choices=list(PODS))
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    text = [HEAD]
    for way, (options, pods) in WAYS.items():
        plans = {n: make_plan(PODS[n], options, args.keep) for n in pods if n in args.pods}
        if not plans:
            continue
        text += [
            f"## With {way}\n",
            f"{ROWS} clips a chip, bfloat16, parameters on every chip. All buckets together:\n",
            overview(plans) + "\n",
            "The bucket of the longest clips:\n",
            parts(plans) + "\n",
            "What limits it:\n",
            limits(plans) + "\n",
        ]
    rows = [
        [
            name,
            f"{chip.peak_flops / 1e12:g}",
            f"{chip.hbm_bytes / 1e9:.1f}",
            f"{chip.hbm_bandwidth / 1e9:g}",
            f"{chip.link_bandwidth / 1e9:g}",
            f"{chip.network_bandwidth / 1e9:g}",
            chip.source,
        ]
        for name, chip in CHIPS.items()
    ]
    header = ["", "TFLOP/s, bf16", "GB", "GB/s", "links, GB/s", "network, GB/s", "source"]
    text += [
        "## What the makers say of the chips\n",
        "For a device of JAX. Links and network are what leaves a chip in one direction.\n",
        table(header, rows) + "\n",
    ]
    args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
