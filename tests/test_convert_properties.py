"""Whatever the config, the round trip of a projector is the identity on its bits."""

import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from convert import api, engine
from convert.checkpoint import DTYPES, Checkpoint, in_memory
from convert.hf_config import config_text, projector_config_dict
from convert.models import PROJECTOR
from convert.torch_files import WEIGHTS, open_torch, write_safetensors
from flax_projector.config import ProjectorConfig
from tests.checkpoints import assert_same_bytes, random_bits
from tests.tiny import read_all, torch_infos

sizes = st.integers(1, 9)
configs = st.builds(
    ProjectorConfig,
    encoder_dim=sizes,
    llm_dim=sizes,
    projector_pool_stride=st.integers(1, 5),
    projector_hidden_dim=st.none() | st.integers(0, 9),
    projector_num_layers=st.sampled_from([0, 1, 2, 3, 11]),  # 11: numbers of two digits
    rms_norm_eps=st.sampled_from([1e-6, 1e-8]),
)
seeds = st.integers(0, 2**32 - 1)


def random_projector(config: ProjectorConfig, dtype: str, prefix: str, seed: int) -> Checkpoint:
    """A torch checkpoint of random bits."""
    return in_memory(random_bits(torch_infos(PROJECTOR, config, dtype, prefix=prefix), seed))


@given(configs, st.sampled_from(sorted(DTYPES)), st.sampled_from(["projector.", ""]), seeds)
@settings(max_examples=100, deadline=None)
def test_there_and_back_is_the_identity(config, dtype, prefix, seed) -> None:
    tensors = random_projector(config, dtype, prefix, seed)
    target = PROJECTOR.leaves(config)
    plan = engine.plan_to_flax(PROJECTOR.table, tensors.infos, target)
    params = in_memory(read_all(engine.as_flax(plan, tensors)))
    back = engine.plan_to_torch(PROJECTOR.table, params.infos, target, prefix=prefix)
    assert_same_bytes(engine.as_torch(back, params), tensors)


@given(
    configs,
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(["hf", "x.safetensors", "x.pt"]),
    st.booleans(),
    seeds,
)
@example(
    ProjectorConfig(1, 1, 1, projector_hidden_dim=1, projector_num_layers=0),
    "bfloat16",
    "hf",
    True,
    0,
)
@settings(max_examples=12, deadline=None)
def test_there_and_back_through_files_is_the_identity(config, dtype, name, is_bare, seed) -> None:
    tensors = random_projector(config, dtype, "projector.", seed)
    with tempfile.TemporaryDirectory() as folder:
        src, flax, dst = (Path(folder) / name for name in ("src", "flax", name))
        src.mkdir()
        write_safetensors(src / WEIGHTS, tensors)
        given = {}
        if is_bare:
            names = ("encoder_dim", "rms_norm_eps", "projector_dropout")
            given = {name: getattr(config, name) for name in names}
        else:
            text = config_text(projector_config_dict(config, dtype=dtype))
            (src / "config.json").write_text(text)
        api.to_flax(src, flax, given=given)
        assert not PROJECTOR.read_config(flax).differences(config)
        api.to_torch(flax, dst)
        assert_same_bytes(open_torch(dst), tensors)
        if name != "x.pt":
            file = dst / WEIGHTS if name == "hf" else dst
            assert file.read_bytes() == (src / WEIGHTS).read_bytes()
