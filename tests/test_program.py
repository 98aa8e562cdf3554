"""What is read from the text of a compiled program."""

import re
import textwrap

import pytest

from flax_projector.planning.hlo import Array, arrays_of
from flax_projector.planning.program import Operation, read_program

# A step of 3 layers on 8 chips: a loop that computes, copies and runs a kernel, and what follows.
# The metadata of the kernel spreads its instruction over several lines, as the compiler writes it.
TEXT = textwrap.dedent(
    """\
    HloModule jit_train_step, is_scheduled=true

    %fused_computation.1 (param_0.1: bf16[3,256,512], param_1.1: s32[]) -> bf16[256,512] {
      %param_0.1 = bf16[3,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
      %param_1.1 = s32[]{:T(128)} parameter(1)
      ROOT %dynamic-slice.1 = bf16[256,512]{1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,256,512}
    }

    %fused_computation.2 (param_0.2: bf16[64,256], param_1.2: bf16[256,512]) -> bf16[64,512] {
      %param_0.2 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
      %param_1.2 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(1)
      ROOT %convolution.1 = bf16[64,512]{1,0:T(8,128)(2,1)} convolution(%param_0.2, %param_1.2), dim_labels=bf_io->bf
    }

    %body.1 (arg.1: (s32[], bf16[64,256], bf16[3,256,512])) -> (s32[], bf16[64,256], bf16[3,256,512]) {
      %arg.1 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[3,256,512]{2,1,0}) parameter(0)
      %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
      %x.1 = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
      %w.1 = bf16[3,256,512]{2,1,0} get-tuple-element(%arg.1), index=2
      %fusion.1 = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%w.1, %i.1), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(train_step)/jvp(WhisperEncoder)/while/body/dynamic_slice"}, backend_config={"window_config":{"estimated_cycles":"100"}}
      %fusion.2 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} fusion(%x.1, %fusion.1), kind=kOutput, calls=%fused_computation.2, metadata={op_name="jit(train_step)/jvp(WhisperEncoder)/while/body/layers/fc1/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
      %kernel.7 = (f32[2,128]{1,0}, bf16[2,4,128,64]{3,2,1,0}) custom-call(%x.1), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1]{1,0}, bf16[2,4,128,64]{3,2,1,0}, bf16[2,4,256,64]{3,2,1,0}, bf16[2,4,256,64]{3,2,1,0}}, frontend_attributes={kernel_metadata={
    "xprof_metadata":"{block_q: 128}"
    }}, metadata={op_name="jit(train_step)/jvp(WhisperEncoder)/while/body/layers/self_attn/pallas_call"}
      %all-gather.1 = bf16[64,256]{1,0} all-gather(%x.1), replica_groups=[4,2]<=[8], dimensions={0}
      ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[3,256,512]{2,1,0}) tuple(%i.1, %x.1, %w.1)
    }

    %condition.1 (arg.2: (s32[], bf16[64,256], bf16[3,256,512])) -> pred[] {
      %arg.2 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[3,256,512]{2,1,0}) parameter(0)
      %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
      %constant.1 = s32[]{:T(128)} constant(3)
      ROOT %compare.1 = pred[]{:T(512)} compare(%i.2, %constant.1), direction=LT
    }

    ENTRY %main.1 (p.1: bf16[64,256], p.2: bf16[3,256,512]) -> f32[1000] {
      %p.1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
      %p.2 = bf16[3,256,512]{2,1,0} parameter(1)
      %zero.1 = s32[]{:T(128)} constant(0)
      %tuple.2 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[3,256,512]{2,1,0}) tuple(%zero.1, %p.1, %p.2)
      %while.1 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[3,256,512]{2,1,0}) while(%tuple.2), condition=%condition.1, body=%body.1
      %x.9 = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
      %copy.1 = bf16[64,256]{0,1} copy(%x.9), metadata={op_name="jit(train_step)/transpose(jvp(LlamaDecoder.blocks))/mul"}, backend_config={"window_config":{"estimated_cycles":"7"}}
      %add.1 = f32[1000]{0} add(%copy.1, %copy.1), metadata={op_name="jit(train_step)/transpose(jvp(LlamaDecoder.blocks))/while/body/add_any"}, backend_config={"window_config":{"estimated_cycles":"20"}}
      %all-reduce.1 = f32[1000]{0} all-reduce(%add.1), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, to_apply=%sum
      %all-reduce.2 = f32[1000]{0} all-reduce(%add.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
      %reduce-scatter.1 = f32[250]{0} reduce-scatter(%add.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
      %send.1 = (f32[500]{0}, u32[]{:S(2)}, token[]) send(%add.1), frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",megascale_transfer_type="ALL_REDUCE"}
      ROOT %update.1 = f32[1000]{0} multiply(%all-reduce.1, %all-reduce.2), metadata={op_name="jit(train_step)/mul"}, backend_config={"window_config":{"estimated_cycles":"3"}}
    }
    """  # noqa: E501 - as long as the compiler's
)


def test_cycles_are_added_up_by_part_with_loops_multiplied():
    program = read_program(TEXT)
    assert program.cycles == {
        "encoder": 3 * 1000,
        "layout": 3 * 100 + 7,
        "LLM backward": 20,
        "optimizer": 3,
    }
    (loop,) = program.loops.values()
    assert (loop.count, loop.cycles) == (3, 1100)


def test_a_trip_count_that_the_compiler_knows_counts():
    """GPUs' programs carry it; there, constants in conditions may stand for other things."""
    known = 'body=%body.1, backend_config={"known_trip_count":{"n":"5"}}'
    (loop,) = read_program(TEXT.replace("body=%body.1", known)).loops.values()
    assert (loop.count, loop.cycles) == (5, 1100)


def test_a_kernel_counts_by_formula_with_heads_padded_to_lanes():
    (kernel,) = read_program(TEXT).kernels
    assert (kernel.name, kernel.part, kernel.count) == ("kernel", "encoder", 3)
    assert kernel.flops == 3 * 2 * 2 * (2 * 4 * 128 * 256 * 128)


@pytest.mark.parametrize(("name", "num_products"), [("_dkv", 4), ("_dq", 3), ("_fwd", 2)])
def test_the_products_of_a_kernel(name, num_products):
    (kernel,) = read_program(TEXT.replace("%kernel.7 ", f"%splash_mha{name}.7 ")).kernels
    assert kernel.flops == 3 * num_products * 2 * (2 * 4 * 128 * 256 * 128)


def test_a_kernel_that_reads_narrow_heads_with_positions_last():
    turned = TEXT.replace(
        "bf16[2,4,128,64]{3,2,1,0}, bf16[2,4,256,64]", "bf16[2,4,64,128]{3,2,1,0}, bf16[2,4,64,128]"
    )
    turned = turned.replace("bf16[2,4,256,64]{3,2,1,0}}", "bf16[2,4,64,128]{3,2,1,0}}")
    (kernel,) = read_program(turned).kernels
    assert kernel.flops == 3 * 2 * 2 * (2 * 4 * 128 * 128 * 128)


def test_a_backward_kernel_with_all_three_gradients_has_five_products():
    three = "= (f32[2,128]{1,0}, f32[2,128]{1,0}, " + ", ".join(["bf16[2,4,128,64]{3,2,1,0}"] * 3)
    fused = TEXT.replace(
        "%kernel.7 = (f32[2,128]{1,0}, bf16[2,4,128,64]{3,2,1,0}", f"%splash_mha_dkv.7 {three}"
    )
    (kernel,) = read_program(fused).kernels
    assert kernel.flops == 3 * 5 * 2 * (2 * 4 * 128 * 256 * 128)


def test_bytes_that_leave_a_chip_by_the_ring_algorithm():
    found = [(c.kind, c.group, c.count, c.sent) for c in read_program(TEXT).collectives]
    assert found == [
        ("all-gather", 2, 3, 3 * 1 / 2 * 64 * 256 * 2),
        ("all-reduce", 8, 1, 2 * 7 / 8 * 4000),
        ("all-reduce", 4, 1, 2 * 3 / 4 * 4000),
        ("reduce-scatter", 4, 1, 3 / 4 * 4000),
        ("send", 2, 1, 2000),
    ]
    assert [c.crosses_slices for c in read_program(TEXT).collectives] == [False] * 4 + [True]
    assert [c.dtype for c in read_program(TEXT).collectives] == ["bf16", *["f32"] * 4]


def test_bytes_in_hbm_are_those_that_an_operation_touches():
    """A slice of a stack is read, not the stack; what is kept on the chip is not in HBM."""
    part, x, vector = 2 * 256 * 512, 2 * 64 * 256, 4 * 1000
    loop = {
        "fusion.1": part + 4 + part,  # 4 bytes of the index
        "fusion.2": x + part,
        "kernel.7": x + 4 * 2 * 128 + 2 * (2 * 4 * 128 * 64),
        "all-gather.1": x + x,
    }
    after = {
        "copy.1": x + x,
        "add.1": 2 * x + vector,
        "all-reduce.1": vector + vector,
        "all-reduce.2": vector + vector,
        "reduce-scatter.1": vector + 4 * 250,
        "send.1": vector + 4 * 500 + 4,
        "update.1": 3 * vector,
    }
    assert read_program(TEXT).hbm_bytes == 3 * sum(loop.values()) + sum(after.values())


NESTED = """\
HloModule jit_f

%inner (a: f32[9,64], i: s32[]) -> f32[64] {
  %a = f32[9,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,64]{1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,64}
}

%outer (b: f32[9,64], j: s32[], c: f32[5,64]) -> f32[5,64] {
  %b = f32[9,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %c = f32[5,64]{1,0} parameter(2)
  %s = f32[1,64]{1,0} fusion(%b, %j), kind=kLoop, calls=%inner
  %e = f32[1,64]{1,0} exponential(%s)
  ROOT %u = f32[5,64]{1,0} dynamic-update-slice(%c, %e, %j)
}

ENTRY %main (x: f32[9,64], y: s32[], z: f32[5,64]) -> f32[5,64] {
  %x = f32[9,64]{1,0} parameter(0)
  %y = s32[] parameter(1)
  %z = f32[5,64]{1,0} parameter(2)
  ROOT %r = f32[5,64]{1,0} fusion(%x, %y, %z), kind=kLoop, calls=%outer
}
"""


def test_a_fusion_in_a_fusion_reads_a_slice_and_writes_into_a_stack():
    assert read_program(NESTED).hbm_bytes == 4 * 64 + 4 + 4 * 64


def test_scratch_memory_of_a_library_does_not_count():
    call = '(f32[5,64]{1,0}, s8[33554432]{0}) custom-call(%z), custom_call_target="gemm"'
    text = re.sub(r"f32\[5,64\]\{1,0\} fusion\(%x.*", lambda _: call, NESTED)
    assert read_program(text).hbm_bytes == 2 * 4 * 5 * 64


# What a GPU's compiler writes: cuBLAS, Triton, cuDNN, and a slice of a stack in a loop.
ON_GPU = textwrap.dedent(
    """\
    HloModule jit_train_step

    %gemm (a.1: bf16[64,512], b.1: bf16[512,32]) -> f32[64,32] {
      %a.1 = bf16[64,512]{1,0} parameter(0)
      %b.1 = bf16[512,32]{1,0} parameter(1)
      ROOT %dot.1 = f32[64,32]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %body (arg: (bf16[64,256], bf16[3,256,512], s32[])) -> (bf16[64,256], bf16[3,256,512], s32[]) {
      %arg = (bf16[64,256]{1,0}, bf16[3,256,512]{2,1,0}, s32[]) parameter(0)
      %x = bf16[64,256]{1,0} get-tuple-element(%arg), index=0
      %w = bf16[3,256,512]{2,1,0} get-tuple-element(%arg), index=1
      %i = s32[] get-tuple-element(%arg), index=2
      %w.1 = bf16[256,512]{1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,256,512}
      %matmul.1 = (bf16[64,512]{1,0}, s8[33554432]{0}) custom-call(%x, %w.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/jvp(WhisperEncoder)/while/body/layers/fc1/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
      ROOT %tuple = (bf16[64,256]{1,0}, bf16[3,256,512]{2,1,0}, s32[]) tuple(%x, %w, %i)
    }

    ENTRY %main (x.1: bf16[64,256], w.2: bf16[3,256,512], h: bf16[64,512], v: bf16[512,32], q: bf16[2,24,4,8], k: bf16[2,40,2,8]) -> f32[64,32] {
      %x.1 = bf16[64,256]{1,0} parameter(0)
      %w.2 = bf16[3,256,512]{2,1,0} parameter(1)
      %h = bf16[64,512]{1,0} parameter(2)
      %v = bf16[512,32]{1,0} parameter(3)
      %q = bf16[2,24,4,8]{3,2,1,0} parameter(4)
      %k = bf16[2,40,2,8]{3,2,1,0} parameter(5)
      %zero = s32[] constant(0)
      %start = (bf16[64,256]{1,0}, bf16[3,256,512]{2,1,0}, s32[]) tuple(%x.1, %w.2, %zero)
      %while.1 = (bf16[64,256]{1,0}, bf16[3,256,512]{2,1,0}, s32[]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
      %attention.1 = (bf16[2,24,4,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,24,4,8]{3,2,1,0}, bf16[2,40,2,8]{3,2,1,0}, bf16[2,40,2,8]{3,2,1,0}}, api_version=API_VERSION_STATUS_RETURNING, metadata={op_name="jit(train_step)/jvp(LlamaDecoder.blocks)/while/body/layers/self_attn/dot_product_attention_fwd"}, backend_config={"cudnn_fmha_backend_config":{"mask_type":"NO_MASK"}}
      ROOT %gemm_fusion.1 = f32[64,32]{1,0} fusion(%h, %v), kind=kCustom, calls=%gemm, metadata={op_name="jit(train_step)/jvp(LlamaDecoder.logits)/dot_general"}
    }
    """  # noqa: E501 - as long as the compiler's
)


def test_operations_of_a_gpu_have_flops_and_bytes():
    program = read_program(ON_GPU)
    assert program.operations == [
        Operation("layout", 3, 0.0, 2.0 * (2 * 256 * 512) + 4),
        Operation("encoder", 3, 2.0 * 64 * 256 * 512, 2.0 * (64 * 256 + 256 * 512 + 64 * 512)),
        Operation(
            "head and loss", 1, 2.0 * 64 * 512 * 32, 2.0 * (64 * 512 + 512 * 32) + 4 * 64 * 32
        ),
    ]
    assert not program.cycles
    moved = sum(each.count * each.hbm_bytes for each in program.operations)
    assert program.hbm_bytes == moved + 2 * (2 * 24 * 4 * 8 * 2 + 2 * (2 * 40 * 2 * 8))


@pytest.mark.parametrize(("name", "num_products"), [("", 2), ("Backward", 5)])
@pytest.mark.parametrize(("mask", "seen"), [("NO_MASK", 1), ("CAUSAL", 1 / 2)])
def test_attention_of_a_gpu_counts_what_a_query_sees(name, num_products, mask, seen):
    text = ON_GPU.replace("fmhaSoftmax", f"fmhaSoftmax{name}").replace("NO_MASK", mask)
    (kernel,) = read_program(text).kernels
    assert (kernel.name, kernel.part, kernel.count) == ("attention", "LLM forward", 1)
    assert kernel.flops == seen * num_products * 2 * (2 * 4 * 24 * 40 * 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[]{:T(128)}", [Array("f32", (), False)]),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", [Array("bf16", (2, 3), True)]),
        ("(s8[4]{0}, pred[2,2])", [Array("s8", (4,), False), Array("pred", (2, 2), False)]),
        ("token[]", []),
    ],
)
def test_types(text, expected):
    assert arrays_of(text) == expected
