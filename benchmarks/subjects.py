"""What is compared: each library's own training loop, from batch to updated weights."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

from benchmarks.shape import Shape
from sae_lens_alloc import (
    AllocSAETrainer,
    AllocSAETrainerConfig,
    FeatureChoiceTrainingSAE,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.training.trainer import DataEndedError

MANY_STEPS = 10**6
# In the first phase of the recipe the budget falls from 2 k to k. It is measured half-way, where
# it falls by a few pairs a step.
HALF_WAY = 1.5
DECAY_STEPS = 10**4


@dataclass(frozen=True)
class Machine:
    """
    Where and how to compute.

    Args:
        device: A torch device.
        autocast: Under bfloat16 autocast.
        matmul: Torch's precision of float32 products: "highest", or "high" for TF32.
        backend: Backend of ours, None for the one that it chooses itself.
        cuda_graph: Whether ours are asked to replay their step as a CUDA graph.
    """

    device: str = "cpu"
    autocast: bool = False
    matmul: str = "highest"
    backend: str | None = None
    cuda_graph: bool = False

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def prepare(self) -> None:
        """Settings of the whole process."""
        torch.set_float32_matmul_precision(self.matmul)
        if self.backend is not None:
            os.environ[BACKEND_VARIABLE] = self.backend


@dataclass
class Subject:
    """
    A trainer about to start.

    Args:
        train: Trains on the batches, each of shape (B, d_in), until there are no more.
        parameters: What is trained.
        optimizers: Whatever has a `state` that maps parameters to dicts of tensors.
        replays_graph: Whether its steps are the replay of a CUDA graph by now.
    """

    train: Callable[[Iterator[torch.Tensor]], object]
    parameters: list[torch.Tensor]
    optimizers: list[Any]
    replays_graph: Callable[[], bool] = lambda: False

    def persistent_bytes(self) -> int:
        """Bytes of the parameters, their gradients and the optimizers' state."""
        moments = [
            value
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return 2 * _n_bytes(self.parameters) + _n_bytes(moments)


@dataclass(frozen=True)
class SubjectKind:
    """
    Args:
        build: Makes the subject for a shape.
        module: What must be importable for it.
        swept: Measured along the sweeps too, rather than at the centre alone.
        has_aux: Has an auxiliary loss for dead features.
        config: The config of ours, whose memory `sae_lens_alloc` foretells.
    """

    build: Callable[[Shape, Machine], Subject]
    module: str = "sae_lens_alloc"
    swept: bool = False
    has_aux: bool = True
    config: Callable[[Shape, Machine], Any] | None = None

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None


def mutual_choice_config(
    shape: Shape, machine: Machine
) -> MutualChoiceTrainingSAEConfig:
    """The recipe once Mutual Choice allocates, as it does for three quarters of a training."""
    return MutualChoiceTrainingSAEConfig(
        **_our_fields(shape, machine), feature_choice_steps=0
    )


def first_phase_config(shape: Shape, machine: Machine) -> MutualChoiceTrainingSAEConfig:
    """The recipe while Feature Choice allocates a budget that falls."""
    return MutualChoiceTrainingSAEConfig(
        **_our_fields(shape, machine),
        feature_choice_steps=MANY_STEPS,
        k_start=HALF_WAY * shape.k,
        k_decay_steps=DECAY_STEPS,
    )


def feature_choice_config(
    shape: Shape, machine: Machine
) -> FeatureChoiceTrainingSAEConfig:
    return FeatureChoiceTrainingSAEConfig(**_our_fields(shape, machine))


def _our_fields(shape: Shape, machine: Machine) -> dict[str, Any]:
    return {
        **_size(shape, machine),
        "k": shape.k,
        # Random activations follow no Zipf law: only the dead features are to be flagged.
        "underuse_fraction": 1e-6,
    }


def _size(shape: Shape, machine: Machine) -> dict[str, Any]:
    return {"d_in": shape.d_in, "d_sae": shape.d_sae, "device": machine.device}


def mutual_choice(shape: Shape, machine: Machine, optimizer: str = "adam") -> Subject:
    sae = MutualChoiceTrainingSAE(mutual_choice_config(shape, machine))
    return _with_our_trainer(sae, shape, machine, optimizer)


def mutual_choice_row_sparse(shape: Shape, machine: Machine) -> Subject:
    return mutual_choice(shape, machine, "row_sparse_adam")


def mutual_choice_first_phase(shape: Shape, machine: Machine) -> Subject:
    sae = MutualChoiceTrainingSAE(first_phase_config(shape, machine))
    return _with_our_trainer(sae, shape, machine)


def mutual_choice_in_stock_trainer(shape: Shape, machine: Machine) -> Subject:
    sae = MutualChoiceTrainingSAE(mutual_choice_config(shape, machine))
    return _with_stock_trainer(sae, shape, machine)


def feature_choice(shape: Shape, machine: Machine) -> Subject:
    sae = FeatureChoiceTrainingSAE(feature_choice_config(shape, machine))
    return _with_our_trainer(sae, shape, machine)


def sae_lens_batchtopk(shape: Shape, machine: Machine) -> Subject:
    cfg = BatchTopKTrainingSAEConfig(**_size(shape, machine), k=shape.k)
    return _with_stock_trainer(BatchTopKTrainingSAE(cfg), shape, machine)


def sae_lens_topk(shape: Shape, machine: Machine) -> Subject:
    cfg = TopKTrainingSAEConfig(**_size(shape, machine), k=shape.k)
    return _with_stock_trainer(TopKTrainingSAE(cfg), shape, machine)


def sae_lens_jumprelu(shape: Shape, machine: Machine) -> Subject:
    cfg = JumpReLUTrainingSAEConfig(
        **_size(shape, machine), pre_act_loss_coefficient=3e-6 if shape.aux else None
    )
    return _with_stock_trainer(JumpReLUTrainingSAE(cfg), shape, machine)


def _with_our_trainer(
    sae: Any, shape: Shape, machine: Machine, optimizer: str = "adam"
) -> Subject:
    cfg = AllocSAETrainerConfig(
        **_training(shape, machine),
        optimizer=optimizer,
        cuda_graph=machine.cuda_graph,
    )
    return _with_trainer(AllocSAETrainer(cfg, sae, iter(())), shape)


def _with_stock_trainer(sae: Any, shape: Shape, machine: Machine) -> Subject:
    cfg = SAETrainerConfig(**_training(shape, machine))
    return _with_trainer(SAETrainer(cfg, sae, iter(())), shape)


def _training(shape: Shape, machine: Machine) -> dict[str, Any]:
    return {
        "total_training_samples": MANY_STEPS * shape.batch,
        "train_batch_size_samples": shape.batch,
        "lr": 1e-4,
        "lr_end": 1e-5,
        "device": machine.device,
        "autocast": machine.autocast,
    }


def _with_trainer(trainer: SAETrainer[Any, Any], shape: Shape) -> Subject:
    def kill() -> None:
        trainer.n_forward_passes_since_fired[: shape.n_dead] = float("inf")

    def train(batches: Iterator[torch.Tensor]) -> None:
        trainer.data_provider = _before_each(batches, kill) if shape.aux else batches
        # how SAELens' loop, and ours, report that the data is exhausted
        with suppress(StopIteration, DataEndedError):
            trainer.fit()

    def replays_graph() -> bool:
        graph = getattr(trainer, "_graph", None)
        return graph is not None and graph._recorded is not None

    return Subject(
        train, list(trainer.sae.parameters()), [trainer.optimizer], replays_graph
    )


def sparsify_topk(shape: Shape, machine: Machine, optimizer: str = "signum") -> Subject:
    if machine.device == "cpu":
        # its Triton kernel needs a GPU; it has an eager decoder for where there is none
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    sparsify: Any = import_module("sparsify")
    model = _ActivationsOnly(shape, machine)
    trainer = sparsify.Trainer(
        sparsify.TrainConfig(
            sae=sparsify.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k),
            batch_size=1,
            optimizer=optimizer,
            auxk_alpha=1 / 32 if shape.aux else 0.0,
            hookpoints=["activations"],
            log_to_wandb=False,
        ),
        dataset=_OneBatchPerItem(model, iter(()), machine.matmul),
        model=model,
    )
    # `fit` ends with a checkpoint
    trainer.save = lambda: None
    (sae,) = trainer.saes.values()
    (tokens_since_fired,) = trainer.num_tokens_since_fired.values()

    def kill() -> None:
        tokens_since_fired[: shape.n_dead] = 10**9

    def train(batches: Iterator[torch.Tensor]) -> None:
        trainer.dataset = _OneBatchPerItem(
            model,
            _before_each(batches, kill) if shape.aux else batches,
            machine.matmul,
        )
        trainer.fit()

    return Subject(train, list(sae.parameters()), trainer.optimizers)


def sparsify_topk_adam(shape: Shape, machine: Machine) -> Subject:
    return sparsify_topk(shape, machine, "adam")


class _ActivationsOnly(torch.nn.Module):
    """Stands in for the language model whose activations sparsify's trainer hooks."""

    def __init__(self, shape: Shape, machine: Machine):
        super().__init__()
        self.activations = torch.nn.Identity()
        self.device = torch.device(machine.device)
        self.batch = torch.zeros(1, shape.d_in, device=machine.device)

    @property
    def base_model(self) -> "_ActivationsOnly":
        return self

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.activations(self.batch.unsqueeze(0))


class _OneBatchPerItem:
    """A dataset whose items are "texts" of B tokens with the next batch as activations."""

    def __init__(
        self, model: _ActivationsOnly, batches: Iterator[torch.Tensor], matmul: str
    ):
        self.model = model
        self.batches = batches
        self.matmul = matmul

    def __len__(self) -> int:
        return MANY_STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # `fit` asks for TF32, which would stay for the floor and may not be what is compared.
        torch.set_float32_matmul_precision(self.matmul)
        self.model.batch = next(self.batches)
        return {"input_ids": torch.zeros(len(self.model.batch), dtype=torch.long)}


def dictionary_learning_batchtopk(shape: Shape, machine: Machine) -> Subject:
    return _with_dictionary_learning_trainer("BatchTopKTrainer", shape, machine)


def dictionary_learning_topk(shape: Shape, machine: Machine) -> Subject:
    return _with_dictionary_learning_trainer("TopKTrainer", shape, machine)


def _with_dictionary_learning_trainer(
    trainer_name: str, shape: Shape, machine: Machine
) -> Subject:
    if "nnsight" not in sys.modules and find_spec("nnsight") is None:
        # needed by its activation buffer, which is not in use here
        stand_in: Any = ModuleType("nnsight")
        stand_in.LanguageModel = None
        sys.modules["nnsight"] = stand_in
    trainer: Any = getattr(import_module("dictionary_learning.trainers"), trainer_name)(
        steps=MANY_STEPS,
        activation_dim=shape.d_in,
        dict_size=shape.d_sae,
        k=shape.k,
        layer=0,
        lm_name="none",
        device=machine.device,
        # as it is for all but the first 1000 steps of a run
        threshold_start_step=0,
    )

    def kill() -> None:
        trainer.num_tokens_since_fired[: shape.n_dead] = 10**9

    def train(batches: Iterator[torch.Tensor]) -> None:
        if shape.aux:
            batches = _before_each(batches, kill)
        for step, batch in enumerate(batches):
            # its `trainSAE` runs the update under autocast
            with _autocast(machine):
                trainer.update(step, batch)

    return Subject(train, list(trainer.ae.parameters()), [trainer.optimizer])


def floor(shape: Shape, machine: Machine) -> Callable[[torch.Tensor], object]:
    """
    The step that no method which looks at every affinity can avoid: one dense encoder
    product and one fused Adam step over all parameters.
    """
    W_enc = torch.randn(shape.d_in, shape.d_sae, device=machine.device)
    sizes = (W_enc.shape, W_enc.T.shape, (shape.d_sae,), (shape.d_in,))
    parameters = [
        torch.nn.Parameter(torch.zeros(size, device=machine.device)) for size in sizes
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    out = torch.empty(shape.batch, shape.d_sae, device=machine.device)

    def step(batch: torch.Tensor) -> None:
        if machine.autocast:
            with _autocast(machine):
                _ = batch @ W_enc
        else:
            torch.mm(batch, W_enc, out=out)
        optimizer.step()

    return step


def _before_each(
    batches: Iterator[torch.Tensor], action: Callable[[], None]
) -> Iterator[torch.Tensor]:
    for batch in batches:
        action()
        yield batch


def _autocast(machine: Machine) -> Any:
    if not machine.autocast:
        return nullcontext()
    return torch.autocast(torch.device(machine.device).type, torch.bfloat16)


def _n_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


SUBJECTS = {
    "mutual_choice": SubjectKind(
        mutual_choice, swept=True, config=mutual_choice_config
    ),
    "mutual_choice, first quarter": SubjectKind(
        mutual_choice_first_phase, swept=True, config=first_phase_config
    ),
    "mutual_choice, row-sparse Adam": SubjectKind(
        mutual_choice_row_sparse, config=mutual_choice_config
    ),
    "mutual_choice, stock trainer": SubjectKind(
        mutual_choice_in_stock_trainer, has_aux=False
    ),
    "feature_choice": SubjectKind(
        feature_choice, swept=True, config=feature_choice_config
    ),
    "SAELens batchtopk": SubjectKind(sae_lens_batchtopk, swept=True),
    "SAELens topk": SubjectKind(sae_lens_topk, swept=True),
    "SAELens jumprelu": SubjectKind(sae_lens_jumprelu, swept=True),
    "sparsify topk": SubjectKind(sparsify_topk, "sparsify", swept=True),
    "sparsify topk, Adam": SubjectKind(sparsify_topk_adam, "sparsify", has_aux=False),
    "dictionary_learning batchtopk": SubjectKind(
        dictionary_learning_batchtopk, "dictionary_learning", swept=True
    ),
    "dictionary_learning topk": SubjectKind(
        dictionary_learning_topk, "dictionary_learning"
    ),
}
