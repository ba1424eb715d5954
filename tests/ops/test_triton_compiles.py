"""Every Triton kernel compiles for a GPU, whether or not there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_lens_alloc.ops import triton_affinities as affinities
from sae_lens_alloc.ops import triton_feature_select as feature_select
from sae_lens_alloc.ops import triton_select as select, triton_sparse as sparse

TYPES = {"x": "*bf16", "W_enc": "*bf16", "b_enc": "*bf16", "scale": "*fp32",
         "bound": "*i64", "done": "*i32", "out": "*i64", "count": "*i64",
         "offsets": "*i64", "rows": "*i64", "columns": "*i64", "values": "*fp32",
         "chosen": "*i8", "tiles": "*i64", "n_tiles": "*i64", "bounds": "*i64",
         "thresholds": "*fp32", "cut": "*fp32", "keys": "*i64", "counts": "*i64",
         "fewest": "*i64", "most": "*i64", "above": "*i64",
         "dense": "*bf16", "left": "*fp32", "right": "*bf16"}

def compile(kernel, out_type, options, **constants):
    types = {**TYPES, "out": out_type}
    signature = {
        name: "constexpr" if name in constants
        else types[name[:-4]] if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options=options
    )
    assert compiled.asm["cubin"]
    # what the smallest of the GPUs since Ampere has
    assert compiled.metadata.shared <= 99 * 1024

def compile_encoding(kernel, **constants):
    compile(
        kernel, "*i64",
        {"num_warps": affinities.WARPS, "num_stages": affinities.STAGES},
        HAS_SCALE=True, IN_FLOAT32=False, PRECISION="ieee",
        TOKENS=affinities.TOKENS_PER_TILE, FEATURES=affinities.FEATURES_PER_TILE,
        INPUTS=affinities.STEP_BYTES // 2, **constants,
    )

for shift, counts in ((-1, True), (-1, False), (48, False), (0, False)):
    compile_encoding(select.encode_keys_kernel, SHIFT=shift, COUNTS=counts)
for all_features in (True, False):
    compile_encoding(
        feature_select.collect_feature_keys_kernel, VALUE_BITS=31, ALL=all_features
    )
compile_encoding(feature_select.find_feature_bounds_kernel, VALUE_BITS=31)
for rows in (1, sparse.COLUMNS):
    compile(
        sparse.sparse_times_dense_kernel, "*fp32", {},
        ROWS=rows, PAIRS=sparse.PAIRS, WIDTH=sparse.WIDTH,
    )
compile(
    sparse.sampled_products_kernel, "*fp32", {}, PAIRS=sparse.PAIRS, WIDTH=sparse.WIDTH
)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_a_gpu():
    # in a process of its own, since the interpreter cannot be switched off in this one
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
