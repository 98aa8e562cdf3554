"""How the rows of an encoder are split: over the devices, and over time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.config import MeshConfig, SpecAugmentConfig
from flax_projector.models.whisper import WhisperEncoder, abstract_encoder
from flax_projector.sharding import batch_sharding, make_mesh, map_parts, use_mesh
from tests.parity import assert_close
from tests.test_step_program import collectives
from tests.tiny_model import SAMPLES, WHISPER, make_model, make_params

pytestmark = pytest.mark.xdist_group("test_encoder_rows")

MESH_CONFIG = MeshConfig(data=2, fsdp=2, tensor=2)
AUGMENTATION = SpecAugmentConfig(mask_time_prob=0.5)


def make_samples(num_rows: int) -> np.ndarray:
    samples = 0.1 * np.random.default_rng(0).standard_normal((num_rows, SAMPLES))
    return samples.astype(np.float32)


def encode_augmented(params: Any, samples: jax.Array) -> jax.Array:
    """Frames of augmented clips."""
    model = make_model(augmentation=AUGMENTATION)
    num_samples = jnp.full(len(samples), SAMPLES)
    return model.encode(params, samples, num_samples, augment_key=jax.random.key(0))


encode: Any = jax.jit(encode_augmented)


def encode_on_mesh(num_rows: int) -> tuple[Any, str]:
    """The frames of that many rows of a batch, and the program of each device."""
    mesh = make_mesh(MESH_CONFIG)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_encoder(WHISPER, mesh=mesh))
    params = jax.device_put(make_params()[1], shardings)
    samples = jax.device_put(make_samples(num_rows), batch_sharding(mesh))
    with use_mesh(mesh):
        compiled = encode.lower(params, samples).compile()
    return compiled(params, samples), compiled.as_text() or ""


@pytest.fixture(params=[1, None], ids=["one row at a time", "all rows"])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(WhisperEncoder, "rows_at_once", lambda *_: request.param)
    encode.clear_cache()  # traced with another number


@pytest.mark.consistency("ours on one device")
@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("num_rows", [16, 4])
def test_rows_are_split_over_all_devices(num_rows):
    """None sends anything. 4 rows are too few: devices with the same row of the batch share it."""
    expected = encode(make_params()[1], make_samples(num_rows))
    frames, program = encode_on_mesh(num_rows)
    assert_close(frames, expected, 1e-5)
    assert f"f32[{num_rows // 8 or 1},{SAMPLES}]" in program
    assert frames.sharding.shard_shape(frames.shape)[0] == (num_rows // 8 or 1)
    assert not collectives(program)


@pytest.mark.parametrize(
    ("most", "parts"), [(None, 1), (6, 1), (5, 2), (3, 2), (2, 3), (1, 6)], ids=str
)
def test_parts_have_equally_many_rows_of_every_device(most, parts):
    seen = []

    def double(rows):
        seen.append(len(rows))
        return 2 * rows

    mesh = make_mesh(MESH_CONFIG)
    rows = jax.device_put(np.arange(24.0).reshape(24, 1), batch_sharding(mesh))
    with use_mesh(mesh):  # four times six rows
        run = jax.jit(lambda rows: map_parts(double, rows, most))
        compiled = run.lower(rows).compile()
    np.testing.assert_array_equal(compiled(rows), 2 * rows)
    assert set(seen) == {24 // parts}
    assert not collectives(compiled.as_text() or "")
