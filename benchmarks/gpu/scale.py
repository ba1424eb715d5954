"""How large the campaign is: on a card, and in a rehearsal."""

from dataclasses import dataclass

from benchmarks.measure import GPU_PACE, Pace
from benchmarks.shape import Shape
from benchmarks.subject import Machine

# How precisely each step table computes.
PRECISIONS = {
    "float32": Machine(),
    "bfloat16 autocast": Machine(autocast=True),
    "TF32": Machine(matmul="high"),
}


# Subject, backend, and whether a CUDA graph is asked for. Torch's backend asks the device how many
# pairs there are, so that it cannot be a graph.
StepRow = tuple[str, str | None, bool]
FIRST_ROWS: tuple[StepRow, ...] = (
    ("mutual_choice", "triton", False),
    ("SAELens batchtopk", None, False),
    ("mutual_choice, first quarter", "triton", False),
    ("mutual_choice", "triton", True),
    ("mutual_choice", "triton_prefilter", False),
    ("sparsify topk", None, False),
    ("mutual_choice", "torch", False),
)
LATER_ROWS: tuple[StepRow, ...] = (
    ("mutual_choice", None, False),  # as ours starts a training
    ("mutual_choice", "triton_prefilter", True),
    ("mutual_choice, Muon", "triton", False),
    ("mutual_choice, row-sparse Adam", "triton", False),
    ("mutual_choice, first quarter", "triton", True),
    ("mutual_choice, first quarter", "triton_prefilter", False),
    ("mutual_choice, first quarter", "triton_prefilter", True),
    ("mutual_choice, first quarter", "torch", False),
    ("SAELens topk", None, False),
    ("SAELens jumprelu", None, False),
    ("dictionary_learning batchtopk", None, False),
    ("sparsify topk, Adam", None, False),
    ("dictionary_learning topk", None, False),
)


@dataclass(frozen=True)
class LanguageModelScale:
    """
    The randomly initialised language model, and the training on it.

    Args:
        d_model: Width of the model, and d_in of the SAE.
        n_layers: Its blocks.
        n_heads: Its heads.
        context_size: Tokens of a text.
        vocabulary: Number of different tokens.
        hooked_layer: The SAE reads the residual stream before this block.
        d_sae: Number of features.
        k: Active features per token.
        batch: Tokens per training step.
        training_tokens: Tokens to train on.
    """

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    context_size: int = 256
    vocabulary: int = 50_257
    hooked_layer: int = 8
    d_sae: int = 24_576
    k: int = 32
    batch: int = 4096
    training_tokens: int = 4096 * 150


@dataclass(frozen=True)
class SyntheticScale:
    """
    Trainings on the synthetic benchmark.

    Args:
        num_features: Known features.
        hidden_dim: Dimensions of the activations.
        root_nodes: Trees that the known features are in.
        d_sae: Number of features of the SAEs.
        matryoshka_widths: Of the nested ones.
        k: Features per token in training, and of the thresholds.
        batch: Samples per training step.
        samples: Lengths of trainings, ascending.
        evaluated: Samples of each evaluation.
    """

    num_features: int = 16_384
    hidden_dim: int = 768
    root_nodes: int = 128
    d_sae: int = 4096
    matryoshka_widths: tuple[int, ...] = (128, 512, 2048, 4096)
    k: int = 25
    batch: int = 1024
    samples: tuple[int, ...] = (
        *(500_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000),
        *(50_000_000, 100_000_000, 200_000_000),
    )
    evaluated: int = 100_000


@dataclass(frozen=True)
class Scale:
    """
    Args:
        name: What it is called in the results.
        checked: Shapes at which kernels are compared with a reference: first as in training,
            then odd ones.
        trained: Shape at which gradients are compared.
        large: A shape with more than 2^32 affinities.
        centre: Shape of the step table.
        wide: Shape of the second one, in bfloat16.
        pace: How often steps are timed, None for what the device asks for.
        precisions: Those of the step table at the centre; the first two, of the pipeline.
        first_rows: Rows of the step tables in the order in which they are measured.
        later_rows: Further rows at the centre.
        memory_d_in: Widths of the activations in the memory table.
        memory_d_sae: Numbers of features there, the most interesting first.
        product: Side of the square matrices whose product gives the rate of products.
        copied: Bytes whose copy gives the memory bandwidth.
        language_model: Of the whole pipeline.
        synthetic: Of the synthetic benchmark.
    """

    name: str = "card"
    checked: tuple[Shape, ...] = (
        Shape(d_in=768, d_sae=32_768, k=32, batch=4096),
        Shape(d_in=250, d_sae=3001, k=7, batch=517),
        Shape(d_in=33, d_sae=130, k=3, batch=1),
    )
    trained: Shape = Shape(d_in=250, d_sae=3001, k=7, batch=517)
    large: Shape = Shape(d_in=64, d_sae=2**20, k=8, batch=4608)
    centre: Shape = Shape(d_in=768, d_sae=32_768, k=32, batch=4096)
    wide: Shape = Shape(d_in=2304, d_sae=65_536, k=32, batch=8192)
    pace: Pace | None = GPU_PACE
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    first_rows: tuple[StepRow, ...] = FIRST_ROWS
    later_rows: tuple[StepRow, ...] = LATER_ROWS
    memory_d_in: tuple[int, ...] = (768, 4096)
    memory_d_sae: tuple[int, ...] = (2**20, 2**17, 2**15, 2**18, 2**19, 2**16)
    product: int = 8192
    copied: int = 2**32
    language_model: LanguageModelScale = LanguageModelScale()
    synthetic: SyntheticScale = SyntheticScale()


CARD = Scale()
# Every part and every kind of measurement, at sizes that Triton's interpreter gets through.
REHEARSAL = Scale(
    name="rehearsal",
    checked=(Shape(d_in=5, d_sae=13, k=2, batch=5),),
    trained=Shape(d_in=5, d_sae=13, k=2, batch=5),
    large=Shape(d_in=5, d_sae=40, k=2, batch=9),
    centre=Shape(d_in=8, d_sae=12, k=2, batch=4),
    wide=Shape(d_in=12, d_sae=16, k=2, batch=4),
    pace=Pace(warm_up_steps=1, steps_per_round=1, rounds=1),
    precisions=("float32",),
    first_rows=(
        ("mutual_choice", "triton", False),
        ("SAELens batchtopk", None, False),
        ("mutual_choice, first quarter", "triton", False),
        ("mutual_choice", "triton_prefilter", False),
    ),
    later_rows=(
        ("mutual_choice", None, False),
        ("mutual_choice", "triton", True),
        ("mutual_choice, Muon", "triton", False),
        ("mutual_choice, row-sparse Adam", "triton", False),
        ("sparsify topk", None, False),
    ),
    memory_d_in=(8,),
    memory_d_sae=(16,),
    product=64,
    copied=2**16,
    language_model=LanguageModelScale(
        d_model=16,
        n_layers=2,
        n_heads=2,
        context_size=128,
        vocabulary=50,
        hooked_layer=1,
        d_sae=64,
        k=2,
        batch=128,
        training_tokens=128 * 4,
    ),
    synthetic=SyntheticScale(
        num_features=64,
        hidden_dim=16,
        root_nodes=4,
        d_sae=32,
        matryoshka_widths=(8, 32),
        k=3,
        batch=64,
        samples=(64 * 6, 64 * 12),
        evaluated=256,
    ),
)
