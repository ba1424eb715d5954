"""The trainers of sparsify and dictionary_learning."""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from benchmarks.shape import Shape
from benchmarks.subject import MANY_STEPS, Machine, Subject, autocast, before_each


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
            before_each(batches, kill) if shape.aux else batches,
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
            batches = before_each(batches, kill)
        for step, batch in enumerate(batches):
            # its `trainSAE` runs the update under autocast
            with autocast(machine):
                trainer.update(step, batch)

    return Subject(train, list(trainer.ae.parameters()), [trainer.optimizer])
