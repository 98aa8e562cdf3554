"""The mapping between PyTorch and Flax: data only, one row per kind of tensor.

Shapes are torch <-> Flax, in the letters that the docstring of `flax_projector` explains. "layers x"
means one torch tensor for each layer; Flax stacks them on axis 0.
"""

# A table is read in columns: its rows stay unwrapped.
# ruff: noqa: E501
# fmt: off

from convert.rules import IDENTITY, Ignore, Rule, Table, Tied, permute, transpose

WRAPPERS = {  # what a wrapper adds to the names of the module in it, at the start or further in
    "_orig_mod.":                 "torch.compile",
    "_fsdp_wrapped_module.":      "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.":           "Lightning",
    "base_model.model.":          "PEFT",
    "module.":                    "DistributedDataParallel, DataParallel or DeepSpeed",
}

ADAPTERS = (  # parts of the names of what is trained beside a frozen model, and must be merged into it
    ".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.",
    ".base_layer.", ".hada_", ".lokr_", ".ia3_", ".modules_to_save.",
)

PROJECTOR = Table(
    name="projector",
    prefixes=("projector.", ""),
    rules=(
        Rule("input_proj.weight",      "input_proj/kernel",     transpose(), hint="llm_dim, projector_pool_stride x encoder_dim"),  # [D, k*E] <-> [k*E, D]
        Rule("input_proj.bias",        "input_proj/bias",       IDENTITY),     # [D]
        Rule("ln_input.weight",        "ln_input/scale",        IDENTITY),     # [D]
        Rule("layers.{i}.fc1.weight",  "layers_{i}/fc1/kernel", transpose()),  # [I, D] <-> [D, I]
        Rule("layers.{i}.fc1.bias",    "layers_{i}/fc1/bias",   IDENTITY),     # [I]
        Rule("layers.{i}.fc2.weight",  "layers_{i}/fc2/kernel", transpose()),  # [D, I] <-> [I, D]
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
        Rule("layers.{i}.self_attn_layer_norm.weight", "layers/self_attn_layer_norm/scale", IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.self_attn_layer_norm.bias",   "layers/self_attn_layer_norm/bias",  IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.self_attn.q_proj.weight",     "layers/self_attn/q_proj/kernel",    transpose()),       # layers x [E, E] <-> [layers, E, E]
        Rule("layers.{i}.self_attn.q_proj.bias",       "layers/self_attn/q_proj/bias",      IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.self_attn.k_proj.weight",     "layers/self_attn/k_proj/kernel",    transpose()),       # layers x [E, E] <-> [layers, E, E]
        Rule("layers.{i}.self_attn.v_proj.weight",     "layers/self_attn/v_proj/kernel",    transpose()),       # layers x [E, E] <-> [layers, E, E]
        Rule("layers.{i}.self_attn.v_proj.bias",       "layers/self_attn/v_proj/bias",      IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.self_attn.out_proj.weight",   "layers/self_attn/out_proj/kernel",  transpose()),       # layers x [E, E] <-> [layers, E, E]
        Rule("layers.{i}.self_attn.out_proj.bias",     "layers/self_attn/out_proj/bias",    IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.final_layer_norm.weight",     "layers/final_layer_norm/scale",     IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.final_layer_norm.bias",       "layers/final_layer_norm/bias",      IDENTITY),          # layers x [E] <-> [layers, E]
        Rule("layers.{i}.fc1.weight",                  "layers/fc1/kernel",                 transpose()),       # layers x [I, E] <-> [layers, E, I]
        Rule("layers.{i}.fc1.bias",                    "layers/fc1/bias",                   IDENTITY),          # layers x [I] <-> [layers, I]
        Rule("layers.{i}.fc2.weight",                  "layers/fc2/kernel",                 transpose()),       # layers x [E, I] <-> [layers, I, E]
        Rule("layers.{i}.fc2.bias",                    "layers/fc2/bias",                   IDENTITY),          # layers x [E] <-> [layers, E]
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
        Rule("layers.{i}.input_layernorm.weight",          "layers/input_layernorm/scale",          IDENTITY),                   # layers x [D] <-> [layers, D]
        Rule("layers.{i}.self_attn.q_proj.weight",         "layers/self_attn/q_proj/kernel",        transpose()),                # layers x [H*d, D] <-> [layers, D, H*d]
        Rule("layers.{i}.self_attn.k_proj.weight",         "layers/self_attn/k_proj/kernel",        transpose()),                # layers x [K*d, D] <-> [layers, D, K*d]
        Rule("layers.{i}.self_attn.v_proj.weight",         "layers/self_attn/v_proj/kernel",        transpose()),                # layers x [K*d, D] <-> [layers, D, K*d]
        Rule("layers.{i}.self_attn.o_proj.weight",         "layers/self_attn/o_proj/kernel",        transpose()),                # layers x [D, H*d] <-> [layers, H*d, D]
        Rule("layers.{i}.self_attn.q_proj.bias",           "layers/self_attn/q_proj/bias",          IDENTITY),                   # layers x [H*d] <-> [layers, H*d]; Qwen2
        Rule("layers.{i}.self_attn.k_proj.bias",           "layers/self_attn/k_proj/bias",          IDENTITY),                   # layers x [K*d] <-> [layers, K*d]; Qwen2
        Rule("layers.{i}.self_attn.v_proj.bias",           "layers/self_attn/v_proj/bias",          IDENTITY),                   # layers x [K*d] <-> [layers, K*d]; Qwen2
        Rule("layers.{i}.self_attn.o_proj.bias",           "layers/self_attn/o_proj/bias",          IDENTITY),                   # layers x [D] <-> [layers, D]; attention_bias
        Rule("layers.{i}.self_attn.q_norm.weight",         "layers/self_attn/q_norm/scale",         IDENTITY),                   # layers x [d] <-> [layers, d]; Qwen3
        Rule("layers.{i}.self_attn.k_norm.weight",         "layers/self_attn/k_norm/scale",         IDENTITY),                   # layers x [d] <-> [layers, d]; Qwen3
        Rule("layers.{i}.post_attention_layernorm.weight", "layers/post_attention_layernorm/scale", IDENTITY),                   # layers x [D] <-> [layers, D]
        Rule("layers.{i}.mlp.gate_proj.weight",            "layers/mlp/gate_proj/kernel",           transpose()),                # layers x [I, D] <-> [layers, D, I]
        Rule("layers.{i}.mlp.up_proj.weight",              "layers/mlp/up_proj/kernel",             transpose()),                # layers x [I, D] <-> [layers, D, I]
        Rule("layers.{i}.mlp.down_proj.weight",            "layers/mlp/down_proj/kernel",           transpose()),                # layers x [D, I] <-> [layers, I, D]
        Rule("norm.weight",                                "norm/scale",                            IDENTITY),                   # [D]
        Rule("lm_head.weight",                             "lm_head/kernel",                        transpose(), at_root=True),  # [V, D] <-> [D, V]; untied models only
    ),
    ignore=(
        Ignore("*.rotary_emb.inv_freq", "recomputed from rope_theta; only old checkpoints hold it"),
    ),
    tied=(Tied("lm_head.weight", "embed_tokens.weight"),),
)
