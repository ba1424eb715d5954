"""What is compared: each library's own training loop, from batch to updated weights."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
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

from benchmarks.other_libraries import (
    dictionary_learning_batchtopk,
    dictionary_learning_topk,
    sparsify_topk,
    sparsify_topk_adam,
)
from benchmarks.shape import Shape
from benchmarks.subject import (
    MANY_STEPS,
    NO_GRAPH,
    Machine,
    Subject,
    SubjectKind,
    autocast,
    before_each,
)
from sae_lens_alloc import (
    AllocSAETrainer,
    AllocSAETrainerConfig,
    FeatureChoiceTrainingSAE,
    FeatureChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.training.trainer import DataEndedError

# In the first phase of the recipe the budget falls from 2 k to k. It is measured half-way, where
# it falls by a few pairs a step.
HALF_WAY = 1.5
DECAY_STEPS = 10**4


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


def mutual_choice_muon(shape: Shape, machine: Machine) -> Subject:
    return mutual_choice(shape, machine, "muon")


def mutual_choice_row_sparse(shape: Shape, machine: Machine) -> Subject:
    subject = mutual_choice(shape, machine, "row_sparse_adam")
    return replace(subject, keeps_gradients=False)


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
    cfg = our_trainer_config(shape, machine, optimizer)
    return _with_trainer(AllocSAETrainer(cfg, sae, iter(())), shape)


def our_trainer_config(
    shape: Shape, machine: Machine, optimizer: str = "adam"
) -> AllocSAETrainerConfig:
    """What our trainer is measured with."""
    return AllocSAETrainerConfig(
        **_training(shape, machine),
        optimizer=optimizer,
        cuda_graph=machine.cuda_graph,
    )


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
        trainer.data_provider = before_each(batches, kill) if shape.aux else batches
        # how SAELens' loop, and ours, report that the data is exhausted
        with suppress(StopIteration, DataEndedError):
            trainer.fit()

    def why_no_graph() -> str | None:
        graph = getattr(trainer, "_graph", None)
        return NO_GRAPH if graph is None else graph.why_not_recorded

    return Subject(
        train, list(trainer.sae.parameters()), [trainer.optimizer], why_no_graph
    )


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
            with autocast(machine):
                _ = batch @ W_enc
        else:
            torch.mm(batch, W_enc, out=out)
        optimizer.step()

    return step


SUBJECTS = {
    "mutual_choice": SubjectKind(
        mutual_choice, swept=True, config=mutual_choice_config
    ),
    "mutual_choice, first quarter": SubjectKind(
        mutual_choice_first_phase, swept=True, config=first_phase_config
    ),
    "mutual_choice, Muon": SubjectKind(mutual_choice_muon),
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
