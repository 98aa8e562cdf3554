"""In which precision compiled programs multiply, and add up what chips send each other.

Programs for TPUs and GPUs that nobody needs to have, as in `test_compile`.
"""

import dataclasses
import math
import re

import jax
import pytest

from flax_projector.config import PRESETS, MeshConfig, TrainConfig
from flax_projector.models.projector import abstract_projector
from flax_projector.sharding import make_mesh
from flax_projector.training.objectives import CTCObjective, LLMObjective
from tests.test_compile import (
    SMOLLM2_135M,
    WHISPER_BASE,
    compile_step,
    gpu_devices,
    settings_of_a_run,
    tpu_devices,
)

__all__ = ["settings_of_a_run"]  # a fixture

pytestmark = pytest.mark.slow

WHISPER = dataclasses.replace(WHISPER_BASE, encoder_layers=2)
LLM = dataclasses.replace(SMOLLM2_135M, num_hidden_layers=2)
CONFIG: TrainConfig = PRESETS["whisper-base-smollm2-135m"][1]
OBJECTIVES = {"llm": LLMObjective(), "ctc": CTCObjective(tuple(range(200)), 2)}
DEVICES = {"v5e": lambda: tpu_devices("v5e:2x2"), "h100": gpu_devices}


def compile_for(device: str, objective: str, mesh: MeshConfig, dtype: str) -> str:
    """The program of a training step, as text."""
    config = dataclasses.replace(CONFIG, dtype=dtype, accumulation_steps=1)
    devices = make_mesh(mesh, DEVICES[device]())
    return compile_step(devices, OBJECTIVES[objective], config, WHISPER, LLM).as_text() or ""


def sums_over_chips(program: str) -> list[tuple[str, str]]:
    """Kind and result of each sum that chips compute together.

    Left out are small parameters that are gathered as a sum: each chip writes its part into zeros.
    """
    pattern = r" = (.*?) (all-reduce|reduce-scatter)(?:-start)?\(([^)]*)\)"
    found = re.findall(pattern, program)
    is_gather = lambda operands: all("dynamic-update-slice" in x for x in operands.split(", "))  # noqa: E731
    return [(kind, result) for result, kind, operands in found if not is_gather(operands)]


def dtypes_of(result: str) -> set[str]:
    """f32[2048,8192]{1,0}, or several in parentheses -> {"f32"}."""
    return set(re.findall(r"(\w+)\[", result))


def num_elements(result: str) -> int:
    """Of all arrays in a result."""
    shapes = re.findall(r"\w\[([\d,]*)\]", result)
    return sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4)], ids=["data", "fsdp"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_summed_over_chips_in_f32(device, objective, mesh, report):
    program = compile_for(device, objective, mesh, "bfloat16")
    assert "bf16[" in program
    sums = sums_over_chips(program)
    report(f"{device}, {objective}, {mesh}: {len(sums)} sums over chips")
    params = jax.tree.leaves(abstract_projector(CONFIG.projector))
    share = sum(leaf.size for leaf in params) / mesh.fsdp  # of the gradients, on a chip
    assert sum(num_elements(result) for _, result in sums) >= share, sums
    assert not [s for s in sums if dtypes_of(s[1]) & {"bf16", "f16"}]


def inexact_products(program: str) -> list[str]:
    """Products whose factors are f32, but may be rounded."""
    products = re.findall(r" = [^=]*? (?:dot|convolution)\(.*", program)
    products += re.findall(r" = .*?custom_call_target=\"__cublas.*", program)
    return [p for p in products if "f32[" in p and not re.search(r"highest", p, re.IGNORECASE)]


@pytest.mark.parametrize("device", DEVICES)
def test_f32_is_multiplied_in_f32_in_the_program(device):
    program = compile_for(device, "llm", MeshConfig(), "float32")
    assert not inexact_products(program)


# --- programs that do wrong ------------------------------------------------------------------

WRONG = """
  %all-reduce.1 = f32[]{:T(128)} all-reduce(%a), channel_id=1
  %all-reduce.2 = (bf16[20]{0}, /*index=1*/bf16[5,20]{1,0}) all-reduce(%b, %c), channel_id=2
  %all-reduce-start.1 = bf16[7,3]{1,0} all-reduce-start(%d), channel_id=3
  ROOT %dot.1 = f32[3,5]{1,0} dot(%e, %f), operand_precision={default,default}
  %convolution.1 = f32[3,5]{1,0} convolution(%e, %f), operand_precision={highest,highest}
"""


def test_what_is_wrong_in_a_program_is_found():
    sums = sums_over_chips(WRONG)
    assert [kind for kind, _ in sums] == ["all-reduce"] * 3
    assert [dtypes_of(result) for _, result in sums] == [{"f32"}, {"bf16"}, {"bf16"}]
    assert [num_elements(result) for _, result in sums] == [1, 120, 21]
    assert len(inexact_products(WRONG)) == 1
