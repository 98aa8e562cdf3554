"""The projector in Flax against the projector in PyTorch: same sizes, f32, forward and backward.

Both run in this process and take turns, so that a noisy machine slows them alike. Prints JSON:
medians in seconds, and ours divided by PyTorch's.

Example:

  python benchmarks/bench_projector.py --rounds 15
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert import engine
from convert.checkpoint import in_memory
from convert.models import PROJECTOR
from convert.torch_projector import ResidualAudioProjector as TorchProjector
from convert.trees import read_tree
from flax_projector.config import ProjectorConfig
from flax_projector.projector import ResidualAudioProjector

# whisper-large-v3-turbo to SmolLM3-3B, 30 s
CONFIG = ProjectorConfig(encoder_dim=1280, llm_dim=2048, projector_hidden_dim=8192)
BATCH, FRAMES = 4, 1500


def make_functions() -> dict[str, tuple[Callable, Callable]]:
    """{"forward": (ours, PyTorch's), ...}; each runs once and waits for its result."""
    torch.manual_seed(0)
    module = TorchProjector(CONFIG).eval()
    source = in_memory({name: x.detach().numpy() for name, x in module.state_dict().items()})
    plan = engine.plan_to_flax(PROJECTOR.table, source.infos, PROJECTOR.leaves(CONFIG))
    params = read_tree(engine.as_flax(plan, source))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, FRAMES, CONFIG.encoder_dim)).astype(np.float32)
    w = rng.normal(size=(BATCH, FRAMES // 4, CONFIG.llm_dim)).astype(np.float32)
    jax_x, jax_w, torch_x, torch_w = jnp.asarray(x), jnp.asarray(w), *map(torch.from_numpy, (x, w))

    @jax.jit
    def forward(params, x):
        return jnp.asarray(ResidualAudioProjector(CONFIG).apply({"params": params}, x))

    @jax.jit
    def gradients(params, x, w):
        return jax.grad(lambda p: jnp.sum(forward(p, x) * w))(params)

    def torch_forward():
        with torch.no_grad():
            return module(torch_x)

    def torch_gradients():
        module.zero_grad(set_to_none=True)
        (module(torch_x) * torch_w).sum().backward()

    return {
        "forward": (lambda: jax.block_until_ready(forward(params, jax_x)), torch_forward),
        "forward and backward": (
            lambda: jax.block_until_ready(gradients(params, jax_x, jax_w)),
            torch_gradients,
        ),
    }


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="of both, one after the other")
    rounds = parser.parse_args().rounds
    results = {}
    for name, pair in make_functions().items():
        for function in pair:  # compilation and warm-up
            function()
        times = [[seconds(function) for function in pair] for _ in range(rounds)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [a / b for a, b in times]
        results[name] = {
            "flax_secs": round(ours, 3),
            "torch_secs": round(theirs, 3),
            "ratio": round(ours / theirs, 3),
            "ratio_of_rounds": [round(r, 3) for r in (min(ratios), max(ratios))],
        }
    setting = {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(), "rounds": rounds}
    json.dump({"benchmark": "projector", **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
