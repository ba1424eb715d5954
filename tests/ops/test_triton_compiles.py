"""Every Triton kernel compiles for a GPU, whether or not there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.slow

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_lens_alloc.ops import triton_affinities as affinities
from sae_lens_alloc.ops import triton_topk as topk
from sae_lens_alloc.ops import triton_feature_choice as feature_choice
from sae_lens_alloc.ops import triton_mutual_choice as mutual_choice
from sae_lens_alloc.ops import triton_prefilter as prefilter
from sae_lens_alloc.ops import triton_sparse as sparse

TYPES = {"bound": "*i64", "prefix": "*i64", "rank": "*i64", "done": "*i8", "count": "*i64",
         "starts": "*i64", "stops": "*i64", "real": "*i8", "rows": "*i64", "columns": "*i64", "values": "*fp32",
         "chosen": "*i8", "tiles": "*i64", "n_tiles": "*i64", "bounds": "*i64",
         "thresholds": "*fp32", "cut": "*fp32", "keys": "*i64", "counts": "*i64",
         "fewest": "*i64", "most": "*i64", "above": "*i64", "out": "*fp32",
         "token_errors": "*fp32", "feature_norms": "*fp32", "guess": "*fp32",
         "found": "*i64", "features": "*i64", "n_in_subset": "*i64", "below": "*i64",
         "dense": "*bf16", "left": "*fp32", "right": "*bf16"}

# as a launch finds addresses, strides and sizes to be
ALIGNED = [["tt.divisibility", 16]]

def compile(kernel, options, encoder=None, **constants):
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        if name == "encoder":
            signature[name] = encoder
            for j, kind in enumerate(encoder):
                if kind == "constexpr":
                    is_scale = encoder._fields[j] == "scale"
                    constexprs[i, j] = None if is_scale else 1
                else:
                    attributes[i, j] = ALIGNED
        elif name in constants:
            signature[name] = "constexpr"
        else:
            is_pointer = name.endswith("_ptr")
            signature[name] = TYPES[name[:-4]] if is_pointer else "i32"
            if name not in ("token_bits", "k", "spare"):
                attributes[i,] = ALIGNED
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options=options
    )
    assert compiled.asm["cubin"]
    # what the smallest of the GPUs since Ampere has
    assert compiled.metadata.shared <= 99 * 1024

def compile_encoding(kernel, weights="bf16", scale="*fp32", **constants):
    # both matrices row by row
    strides = ["i32", "constexpr"] * 2
    encoder = affinities.EncoderArguments(
        f"*{weights}", f"*{weights}", f"*{weights}", scale, "i32", "i32", "i32", *strides
    )
    constants = {
        "IN_FLOAT32": False, "PRECISION": "ieee",
        "TOKENS": affinities.TOKENS_PER_TILE, "FEATURES": affinities.FEATURES_PER_TILE,
        "INPUTS": affinities.STEP_BYTES // (4 if weights == "fp32" else 2), **constants,
    }
    options = {"num_warps": affinities.WARPS, "num_stages": affinities.STAGES}
    compile(kernel, options, encoder, **constants)

nothing = {"thresholds_ptr": None, "above_ptr": None}
for weights, precision in (("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee")):
    compile_encoding(mutual_choice.collect_keys_kernel, weights, PRECISION=precision)
compile_encoding(mutual_choice.collect_keys_kernel, scale="constexpr", **nothing)
for shift in (48, 0):
    compile_encoding(mutual_choice.count_digits_kernel, SHIFT=shift)
    compile(
        mutual_choice.find_digit_kernel, {}, SHIFT=shift,
        DIGITS=mutual_choice.N_DIGITS, BLOCK=mutual_choice.DIGITS_PER_BLOCK,
    )
for counts in ({}, nothing):
    compile_encoding(
        prefilter.candidates_kernel, LEAST_ERROR=prefilter.LEAST_ERROR,
        UNCERTAIN_BIT=prefilter.UNCERTAIN_BIT, **counts,
    )
everywhere = {"chosen_ptr": None, "tiles_ptr": None, "n_tiles_ptr": None}
for chosen in ({}, everywhere):
    compile_encoding(
        feature_choice.collect_feature_keys_kernel, VALUE_BITS=31, **chosen
    )
compile_encoding(feature_choice.find_feature_bounds_kernel, VALUE_BITS=31)
for slots in (32, topk.MAX_SLOTS):
    compile_encoding(
        topk.largest_keys_kernel, LEAST=topk.LEAST, SLOTS=slots,
        TOKENS=topk.tokens_per_tile(slots),
    )
for rows in (1, sparse.COLUMNS):
    compile(
        sparse.sparse_times_dense_kernel, {},
        ROWS=rows, PAIRS=sparse.PAIRS, WIDTH=sparse.WIDTH,
    )
for real in ({}, {"real_ptr": None}):
    compile(
        sparse.sampled_products_kernel, {},
        PAIRS=sparse.PAIRS, WIDTH=sparse.WIDTH, **real,
    )
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_a_gpu():
    # in a process of its own, since the interpreter cannot be switched off in this one
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
