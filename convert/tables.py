"""The mapping between PyTorch and Flax: data only, one row per kind of tensor.

Letters: E encoder dim, D LLM dim, k pool stride, F hidden width of an MLP, M mel bins, S encoder
frames, N layers, H heads, K kv heads, d head dim, V vocabulary. Shapes are torch <-> Flax.
"""

# A table is read in columns: its rows stay unwrapped.
# ruff: noqa: E501
# fmt: off

from convert.rules import IDENTITY, Ignore, Rule, Table, Tied, permute, transpose

PROJECTOR = Table(
    name="projector",
    prefixes=("projector.", ""),
    rules=(
        Rule("input_proj.weight",      "input_proj/kernel",     transpose(), hint="llm_dim, projector_pool_stride x encoder_dim"),  # [D, k*E] <-> [k*E, D]
        Rule("input_proj.bias",        "input_proj/bias",       IDENTITY),     # [D]
        Rule("ln_input.weight",        "ln_input/scale",        IDENTITY),     # [D]
        Rule("layers.{i}.fc1.weight",  "layers_{i}/fc1/kernel", transpose()),  # [F, D] <-> [D, F]
        Rule("layers.{i}.fc1.bias",    "layers_{i}/fc1/bias",   IDENTITY),     # [F]
        Rule("layers.{i}.fc2.weight",  "layers_{i}/fc2/kernel", transpose()),  # [D, F] <-> [F, D]
        Rule("layers.{i}.fc2.bias",    "layers_{i}/fc2/bias",   IDENTITY),     # [D]
        Rule("layer_norms.{i}.weight", "layer_norms_{i}/scale", IDENTITY),     # [D]
    ),
)

WHISPER_ENCODER = Table(
    name="whisper encoder",
    prefixes=("model.encoder.", "encoder.", ""),
    rules=(
        Rule("conv1.weight",                           "conv1/kernel",                      permute(2, 1, 0)),  # [E, M, 3] <-> [3, M, E]
        Rule("conv1.bias",                             "conv1/bias",                        IDENTITY),          # [E]
        Rule("conv2.weight",                           "conv2/kernel",                      permute(2, 1, 0)),  # [E, E, 3] <-> [3, E, E]
        Rule("conv2.bias",                             "conv2/bias",                        IDENTITY),          # [E]
        Rule("embed_positions.weight",                 "embed_positions/embedding",         IDENTITY),          # [S, E]
        Rule("layers.{i}.self_attn_layer_norm.weight", "layers/self_attn_layer_norm/scale", IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.self_attn_layer_norm.bias",   "layers/self_attn_layer_norm/bias",  IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.self_attn.q_proj.weight",     "layers/self_attn/q_proj/kernel",    transpose()),       # N x [E, E] <-> [N, E, E]
        Rule("layers.{i}.self_attn.q_proj.bias",       "layers/self_attn/q_proj/bias",      IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.self_attn.k_proj.weight",     "layers/self_attn/k_proj/kernel",    transpose()),       # N x [E, E] <-> [N, E, E]
        Rule("layers.{i}.self_attn.v_proj.weight",     "layers/self_attn/v_proj/kernel",    transpose()),       # N x [E, E] <-> [N, E, E]
        Rule("layers.{i}.self_attn.v_proj.bias",       "layers/self_attn/v_proj/bias",      IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.self_attn.out_proj.weight",   "layers/self_attn/out_proj/kernel",  transpose()),       # N x [E, E] <-> [N, E, E]
        Rule("layers.{i}.self_attn.out_proj.bias",     "layers/self_attn/out_proj/bias",    IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.final_layer_norm.weight",     "layers/final_layer_norm/scale",     IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.final_layer_norm.bias",       "layers/final_layer_norm/bias",      IDENTITY),          # N x [E] <-> [N, E]
        Rule("layers.{i}.fc1.weight",                  "layers/fc1/kernel",                 transpose()),       # N x [F, E] <-> [N, E, F]
        Rule("layers.{i}.fc1.bias",                    "layers/fc1/bias",                   IDENTITY),          # N x [F] <-> [N, F]
        Rule("layers.{i}.fc2.weight",                  "layers/fc2/kernel",                 transpose()),       # N x [E, F] <-> [N, F, E]
        Rule("layers.{i}.fc2.bias",                    "layers/fc2/bias",                   IDENTITY),          # N x [E] <-> [N, E]
        Rule("layer_norm.weight",                      "layer_norm/scale",                  IDENTITY),          # [E]
        Rule("layer_norm.bias",                        "layer_norm/bias",                   IDENTITY),          # [E]
    ),
    ignore=(
        Ignore("model.decoder.*", "the decoder is not used: the LLM takes its place"),
        Ignore("decoder.*",       "the decoder is not used: the LLM takes its place"),
        Ignore("proj_out.weight", "the decoder's output layer is not used"),
    ),
)

LLAMA = Table(
    name="llama",
    prefixes=("model.", ""),
    rules=(
        Rule("embed_tokens.weight",                        "embed_tokens/embedding",                IDENTITY),                   # [V, D]
        Rule("layers.{i}.input_layernorm.weight",          "layers/input_layernorm/scale",          IDENTITY),                   # N x [D] <-> [N, D]
        Rule("layers.{i}.self_attn.q_proj.weight",         "layers/self_attn/q_proj/kernel",        transpose()),                # N x [H*d, D] <-> [N, D, H*d]
        Rule("layers.{i}.self_attn.k_proj.weight",         "layers/self_attn/k_proj/kernel",        transpose()),                # N x [K*d, D] <-> [N, D, K*d]
        Rule("layers.{i}.self_attn.v_proj.weight",         "layers/self_attn/v_proj/kernel",        transpose()),                # N x [K*d, D] <-> [N, D, K*d]
        Rule("layers.{i}.self_attn.o_proj.weight",         "layers/self_attn/o_proj/kernel",        transpose()),                # N x [D, H*d] <-> [N, H*d, D]
        Rule("layers.{i}.self_attn.q_proj.bias",           "layers/self_attn/q_proj/bias",          IDENTITY),                   # N x [H*d] <-> [N, H*d]; Qwen2
        Rule("layers.{i}.self_attn.k_proj.bias",           "layers/self_attn/k_proj/bias",          IDENTITY),                   # N x [K*d] <-> [N, K*d]; Qwen2
        Rule("layers.{i}.self_attn.v_proj.bias",           "layers/self_attn/v_proj/bias",          IDENTITY),                   # N x [K*d] <-> [N, K*d]; Qwen2
        Rule("layers.{i}.self_attn.o_proj.bias",           "layers/self_attn/o_proj/bias",          IDENTITY),                   # N x [D] <-> [N, D]; attention_bias
        Rule("layers.{i}.self_attn.q_norm.weight",         "layers/self_attn/q_norm/scale",         IDENTITY),                   # N x [d] <-> [N, d]; Qwen3
        Rule("layers.{i}.self_attn.k_norm.weight",         "layers/self_attn/k_norm/scale",         IDENTITY),                   # N x [d] <-> [N, d]; Qwen3
        Rule("layers.{i}.post_attention_layernorm.weight", "layers/post_attention_layernorm/scale", IDENTITY),                   # N x [D] <-> [N, D]
        Rule("layers.{i}.mlp.gate_proj.weight",            "layers/mlp/gate_proj/kernel",           transpose()),                # N x [F, D] <-> [N, D, F]
        Rule("layers.{i}.mlp.up_proj.weight",              "layers/mlp/up_proj/kernel",             transpose()),                # N x [F, D] <-> [N, D, F]
        Rule("layers.{i}.mlp.down_proj.weight",            "layers/mlp/down_proj/kernel",           transpose()),                # N x [D, F] <-> [N, F, D]
        Rule("norm.weight",                                "norm/scale",                            IDENTITY),                   # [D]
        Rule("lm_head.weight",                             "lm_head/kernel",                        transpose(), at_root=True),  # [V, D] <-> [D, V]; untied models only
    ),
    ignore=(
        Ignore("*.rotary_emb.inv_freq", "recomputed from rope_theta; only old checkpoints hold it"),
    ),
    tied=(Tied("lm_head.weight", "embed_tokens.weight"),),
)
