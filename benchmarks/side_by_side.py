"""Times our code and PyTorch's in turns, so that a busy machine slows both equally."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from convert import engine
from convert.checkpoint import in_memory
from convert.models import ModelKind
from convert.trees import read_tree

Pair = tuple[Callable[[], object], Callable[[], object]]
"""Our function and PyTorch's; each runs once and waits for its result."""


def flax_params(kind: ModelKind, config: Any, module: torch.nn.Module) -> dict[str, Any]:
    """Copies a PyTorch module's parameters into the tree our module with this config takes."""
    copies = {name: x.detach().clone().numpy() for name, x in module.state_dict().items()}
    checkpoint = in_memory(copies)
    plan = engine.plan_to_flax(kind.table, checkpoint.infos, kind.leaves(config))
    return read_tree(engine.as_flax(plan, checkpoint))


def compare(
    benchmark: str,
    pairs: Mapping[str, Pair],
    *,
    rounds: int,
    audio_secs: Mapping[str, float] | None = None,
) -> None:
    """Times each pair; prints the medians in seconds, and ours divided by PyTorch's, as JSON.

    Args:
      benchmark: name of the benchmark.
      pairs: what to compare, by name.
      rounds: how many times to run both functions, one after the other.
      audio_secs: length of the speech that a function hears, by name, for real-time factors.
    """
    results = {}
    for name, pair in pairs.items():
        for function in pair:  # compiles and warms up
            function()
        times = [[_seconds(function) for function in pair] for _ in range(rounds)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [a / b for a, b in times]
        results[name] = {
            "flax_secs": round(ours, 3),
            "torch_secs": round(theirs, 3),
            "ratio": round(ours / theirs, 3),
            "ratio_of_rounds": [round(r, 3) for r in (min(ratios), max(ratios))],
        }
        if audio_secs is not None:
            results[name]["real_time_factor"] = round(ours / audio_secs[name], 4)
    setting = {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(), "rounds": rounds}
    json.dump({"benchmark": benchmark, **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
