"""The frozen decoder of Llama-family LLMs.

`embed`, `blocks` and `logits` are separate, so that audio can be spliced in between the first two,
and logits computed only where they are needed.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_projector.config import LlamaConfig, RematName
from flax_projector.models.attention import ATTENTION, attend, kernel_length
from flax_projector.models.layers import RMSNorm, dense
from flax_projector.models.rotary import Rotary, rotary_angles, rotate
from flax_projector.sharding import abstract_params, replicated

_MLP = "mlp"  # the name of what only the policy "products" keeps
_POLICIES = {
    "products": jax.checkpoint_policies.save_only_these_names(ATTENTION, "gate_proj", "up_proj"),
    "gates": jax.checkpoint_policies.save_only_these_names(ATTENTION, "gate_proj"),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "layers": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer, in a buffer of static length.

    Attributes:
      k: rotated keys. NumPy arrays become constants of the compiled function; of a prefix, a layer
        sees only its own, without the first axis.
      v: values, likewise.
    """

    k: Float[Array | np.ndarray, "*layers B K C d"]
    v: Float[Array | np.ndarray, "*layers B K C d"]

    def write(
        self,
        layer: Int[Array, ""] | int,
        slot: Int[Array, ""] | int,
        k: Float[Array, "B K L d"],
        v: Float[Array, "B K L d"],
    ) -> "KVCache":
        """The cache with new keys and values of a layer, from a slot on.

        In a loop that carries the cache, they are written in place: nothing else of it is moved.
        """
        start = (layer, 0, 0, slot, 0)
        update = jax.lax.dynamic_update_slice
        return KVCache(k=update(self.k, k[None], start), v=update(self.v, v[None], start))

    def read(
        self, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B K C d"], Float[Array, "B K C d"]]:
        """A layer's keys and values."""
        index = jax.lax.dynamic_index_in_dim
        return index(self.k, layer, keepdims=False), index(self.v, layer, keepdims=False)


def make_cache(
    config: LlamaConfig,
    batch_size: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    *,
    prefix: KVCache | None = None,
) -> KVCache:
    """A cache for `length` positions, which holds nothing but the prefix in its first slots."""
    c = config
    shape = (c.num_hidden_layers, batch_size, c.num_key_value_heads, length, c.head_dim)
    cache = KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
    if prefix is None:
        return cache
    cache = jax.lax.optimization_barrier(cache)  # or else XLA makes one constant of both, as large
    return jax.tree.map(lambda x, first: x.at[:, :, :, : first.shape[3]].set(first), cache, prefix)


def _put_before(
    prefix: Float[Array | np.ndarray, "1 K p d"], x: Float[Array, "B K L d"]
) -> Float[Array, "B K C d"]:
    """Puts the keys or values of the prefix in front of every row's.

    Zeros follow up to the kernel's next `kernel_length`, in the same pass over the memory.
    """
    b, num_heads, length, d = x.shape
    length += prefix.shape[2]
    after = jnp.zeros((b, num_heads, kernel_length(length) - length, d), x.dtype)
    return jnp.concatenate([jnp.broadcast_to(prefix, (b, *prefix.shape[1:])), x, after], axis=2)


@jax.custom_vjp
def _with_gradients_stored(gate: Array, up: Array) -> tuple[Array, Array]:
    """Its arguments, whose gradients are computed once.

    A TPU's compiler would compute SwiGLU's derivative within each product that reads it, and the
    products wait for it.
    """
    return gate, up


_with_gradients_stored.defvjp(
    lambda gate, up: ((gate, up), None), lambda _, grads: jax.lax.optimization_barrier(grads)
)


class LlamaAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: LlamaConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        rotary: Rotary,
        is_rotated: Bool[Array, ""],
        key_valid: Bool[Array, "#B L C"] | None,
        cache: KVCache | None,
        prefix: KVCache | None,
        cache_index: Int[Array, ""] | int,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """As `LlamaDecoder.blocks`, for the layer of this number, given the rotary angles."""
        c = self.config
        b, length, _ = x.shape
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def project(features: int, name: str) -> Float[Array, "B X L d"]:
            y = dense(self, features, ("embed", "heads"), name, use_bias=c.qkv_bias)(x)
            # Of a few tokens, a TPU would transpose the kernel, to make heads within the product.
            if key_valid is not None:
                y = jax.lax.optimization_barrier(y)
            return checkpoint_name(y, ATTENTION).reshape(b, length, -1, c.head_dim).swapaxes(1, 2)

        q, k, v = project(q_dim, "q_proj"), project(kv_dim, "k_proj"), project(kv_dim, "v_proj")
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name="k_norm")(k)
        q = rotate(q, rotary, is_rotated, scale=c.head_dim**-0.5)
        k = rotate(k, rotary, is_rotated)
        if cache is not None:
            cache = cache.write(layer, cache_index, k, v)
            if key_valid is not None:
                k, v = cache.read(layer)
        num_keys = k.shape[2]
        if prefix is not None:
            num_keys += prefix.k.shape[2]
            k, v = _put_before(prefix.k, k), _put_before(prefix.v, v)
        out = attend(q, k, v, is_causal=key_valid is None, num_keys=num_keys, key_valid=key_valid)
        out = out.swapaxes(1, 2).reshape(b, length, q_dim)
        o_proj = dense(self, c.hidden_size, ("heads", "embed"), "o_proj", use_bias=c.o_bias)
        return checkpoint_name(o_proj(out), ATTENTION), cache


class LlamaMLP(nn.Module):
    """SwiGLU MLP."""

    config: LlamaConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """[B, L, D] in `dtype`."""
        c = self.config

        def project(name: str) -> Array:
            y = dense(self, c.intermediate_size, ("embed", "mlp"), name, use_bias=False)(x)
            return checkpoint_name(y, name)

        gate, up = _with_gradients_stored(project("gate_proj"), project("up_proj"))
        down = dense(self, c.hidden_size, ("mlp", "embed"), "down_proj", use_bias=False)
        return down(nn.silu(gate) * up)


class LlamaLayer(nn.Module):
    """Pre-norm transformer layer, as `nn.scan` expects it: (carry, ...) -> (carry, None)."""

    config: LlamaConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B L D"], KVCache | None],
        rotary: Rotary,
        is_rotated: Bool[Array, ""],
        layer: Int[Array, ""] | int,
        key_valid: Bool[Array, "#B L C"] | None,
        prefix: KVCache | None,
        cache_index: Int[Array, ""] | int,
    ) -> tuple[tuple[Float[Array, "B L D"], KVCache | None], None]:
        """As `LlamaDecoder.blocks`, for the layer of this number, given the rotary angles."""
        c = self.config
        x, cache = carry
        args = (c, self.dtype, self.param_dtype)
        norm_args = (c.rms_norm_eps, self.dtype, self.param_dtype)
        attention = LlamaAttention(*args, name="self_attn")
        h = RMSNorm(*norm_args, name="input_layernorm")(x)
        h, cache = attention(h, rotary, is_rotated, key_valid, cache, prefix, cache_index, layer)
        x = x + h
        h = RMSNorm(*norm_args, name="post_attention_layernorm")(x)
        x = x + LlamaMLP(*args, name="mlp")(h)
        return (nn.with_logical_constraint(x, ("batch", None, None)), cache), None


class LlamaDecoder(nn.Module):
    """Llama decoder with scanned layers: parameters of all layers are stacked on axis 0.

    Attributes:
      config: the decoder's shape.
      dtype: compute dtype; norms, rotary embeddings, softmax and logits use at least f32.
      param_dtype: storage dtype.
      remat: what the backward pass recomputes; see `TrainConfig.remat`.

    Source: `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `SmolLM3ForCausalLM`
    (transformers).
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: RematName = "products"

    def setup(self) -> None:
        """Creates the submodules that the methods share."""
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocab", "embed")
            ),
        )
        layer = LlamaLayer
        if self.remat != "none":
            policy = _POLICIES[self.remat]
            layer = nn.remat(LlamaLayer, policy=policy, prevent_cse=False)  # the scan prevents it
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0, nn.broadcast, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.param_dtype)
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype)
        if not c.tie_word_embeddings:
            wide = jnp.promote_types(self.dtype, jnp.float32)
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.normal(0.02), ("embed", "vocab")
                ),
                dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=wide),
            )

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Input embeddings of token ids."""
        return self.embed_tokens(tokens)

    def blocks(
        self,
        x: Float[Array, "B L D"],
        *,
        positions: Int[Array, "#B L"],
        key_valid: Bool[Array, "#B L C"] | None = None,
        cache: KVCache | None = None,
        cache_index: Int[Array, ""] | int = 0,
        prefix: KVCache | None = None,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Runs all layers and the final norm.

        Args:
          x: input embeddings, text and audio merged.
          positions: rotary position of each input.
          key_valid: True where a query may see a key of the cache, whose length C is; without a
            cache, one of x. None means the causal mask over the prefix and x, and allows the
            platform's fused kernel: nothing is read from the cache.
          cache: keys and values so far; new ones are written from `cache_index` on.
          cache_index: first slot to write to.
          prefix: keys and values of tokens in front of every row: the cache returned for a batch of
            one. `key_valid` must then be None, and `positions` must continue the prefix.

        Returns:
          Hidden states after the final norm, and the new cache (None without one).
        """
        c = self.config
        rotary = rotary_angles(positions, c)
        layers = np.arange(c.num_hidden_layers)
        is_rotated = np.isin(layers, c.no_rope_layers, invert=True)
        (x, cache), _ = self.layers(
            (x, cache),
            rotary,
            jnp.asarray(is_rotated),
            jnp.asarray(layers),
            key_valid,
            prefix,
            cache_index,
        )
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits of hidden states after the final norm, accumulated in at least f32."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        embedding = self.embed_tokens.embedding.astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=wide)

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Logits of a right-padded batch of texts, at every position."""
        length = tokens.shape[1]
        hidden, _ = self.blocks(
            self.embed(tokens),
            positions=jnp.arange(length)[None],
        )
        return self.logits(hidden)


def embedding_rms(params: dict, mesh: Mesh) -> float:
    """Root mean square of all elements of a decoder's embedding table, computed in its shards.

    Args:
      params: the decoder's parameters.
      mesh: the mesh that they are on.
    """

    def run(table: Float[Array, "V D"]) -> Float[Array, ""]:
        # Row by row first: a single sum over millions of elements would lose digits in f32.
        return jnp.sqrt(jnp.mean(jnp.mean(jnp.square(table.astype(jnp.float32)), axis=-1)))

    table = params["embed_tokens"]["embedding"]
    return float(jax.jit(run, out_shardings=replicated(mesh))(table))


def abstract_decoder(
    config: LlamaConfig, *, param_dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> dict:
    """Shapes, dtypes and shardings of the decoder's parameters."""
    module = LlamaDecoder(config, param_dtype=param_dtype)
    return abstract_params(module, jax.ShapeDtypeStruct((1, 1), jnp.int32), mesh)
