"""
Puts this package's classes where SAELens' own tests look for SAELens' (docs/host-tests.md).

A pytest plugin, loaded before the tests are (`-p plugin`). HOST_TESTS_GROUP says which classes take
part, HOST_TESTS_RESULTS where the outcome of each test is written. Nothing of SAELens is changed on disk.
"""

import json
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import fields, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets
import pandas as pd
import pytest
import sae_lens
import torch
import yaml
from sae_lens import llm_sae_training_runner as llm_runner
from sae_lens import saes
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training import activations_store, sae_trainer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

import sae_lens_alloc
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training import runner as alloc_runner

HERE = Path(__file__).parent
DEMO = Path(sae_lens_alloc.__file__).parent / "demo"
GROUP = os.environ["HOST_TESTS_GROUP"]
RESULTS = Path(os.environ["HOST_TESTS_RESULTS"])
LISTS: dict[str, Any] = yaml.safe_load((HERE / "differences.yaml").read_text())

# SAELens' class: its module in sae_lens.saes and our class in its place.
REPLACED: dict[str, dict[str, tuple[str, type[TrainingSAE[Any]]]]] = {
    "mutual_choice": {
        "BatchTopKTrainingSAE": (
            "batchtopk_sae",
            sae_lens_alloc.MutualChoiceTrainingSAE,
        ),
        "TopKTrainingSAE": ("topk_sae", sae_lens_alloc.MutualChoiceTrainingSAE),
        "StandardTrainingSAE": ("standard_sae", sae_lens_alloc.MutualChoiceTrainingSAE),
        "MatryoshkaBatchTopKTrainingSAE": (
            "matryoshka_batchtopk_sae",
            sae_lens_alloc.MatryoshkaMutualChoiceTrainingSAE,
        ),
    },
    "feature_choice": {
        "BatchTopKTrainingSAE": (
            "batchtopk_sae",
            sae_lens_alloc.FeatureChoiceTrainingSAE,
        ),
        "TopKTrainingSAE": ("topk_sae", sae_lens_alloc.FeatureChoiceTrainingSAE),
        "StandardTrainingSAE": (
            "standard_sae",
            sae_lens_alloc.FeatureChoiceTrainingSAE,
        ),
    },
    "aux_zipf": {
        name: (module, sae_lens_alloc.with_aux_zipf(getattr(sae_lens, name)))
        for name, module in (
            ("BatchTopKTrainingSAE", "batchtopk_sae"),
            ("TopKTrainingSAE", "topk_sae"),
            ("StandardTrainingSAE", "standard_sae"),
            ("MatryoshkaBatchTopKTrainingSAE", "matryoshka_batchtopk_sae"),
            ("JumpReLUTrainingSAE", "jumprelu_sae"),
            ("GatedTrainingSAE", "gated_sae"),
        )
    },
}


def _accepting(config_class: type[Any], stock: type[Any]) -> None:
    """
    Lets our config take the keys that only SAELens' has, without effect, and gives it a k where
    the test gives none, and Mutual Choice from the first step.
    """
    foreign = {f.name for f in fields(stock)} - {f.name for f in fields(config_class)}
    has_k = "k" in {f.name for f in fields(config_class)} - {
        f.name for f in fields(stock)
    }
    first_step = "feature_choice_steps" in {f.name for f in fields(config_class)}
    init = config_class.__init__

    @wraps(init)
    def adapted(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: kwargs[name] for name in kwargs if name not in foreign}
        if has_k and "d_sae" in kwargs:
            kwargs.setdefault("k", min(10, kwargs["d_sae"] // 2))
        if first_step:
            kwargs.setdefault("feature_choice_steps", 0)
        init(self, *args, **kwargs)

    config_class.__init__ = adapted


class _Name(str):
    """The name of our architecture, equal to those of SAELens' that it stands in for, too."""

    stands_for: frozenset[str]

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other in self.stands_for

    __hash__ = str.__hash__


def _also_named(config_class: type[Any], names: frozenset[str]) -> None:
    name = _Name(config_class.architecture())
    name.stands_for = names
    config_class.architecture = classmethod(lambda _: name)


def _replace_classes() -> None:
    registry = sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY
    configs = {sae: config for sae, config in registry.values()}
    stock_names: dict[type[Any], set[str]] = {}
    for name, (module, ours) in REPLACED[GROUP].items():
        config = configs[ours]
        stock_config = getattr(sae_lens, f"{name}Config")
        stock_names.setdefault(config, set()).add(stock_config.architecture())
        _accepting(config, stock_config)
        registry[stock_config.architecture()] = (ours, config)
        for place in (sae_lens, saes, getattr(saes, module)):
            setattr(place, name, ours)
            setattr(place, f"{name}Config", config)
    for config, names in stock_names.items():
        _also_named(config, frozenset(names))


def _dense_outputs() -> None:
    """SAELens' tests index what a training step returns; ours returns sparse tensors."""
    step = AllocationTrainingSAE.training_forward_pass

    @wraps(step)
    def dense(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        output = step(self, step_input)
        acts, hidden_pre = (
            t.to_dense() if t.is_sparse else t
            for t in (output.feature_acts, output.hidden_pre)
        )
        return replace(output, feature_acts=acts, hidden_pre=hidden_pre)

    AllocationTrainingSAE.training_forward_pass = dense


def _replace_runner() -> None:
    alloc_runner.CALIBRATION_TOKENS = 1024  # the tests train on a few hundred tokens
    runner, trainer = (
        alloc_runner.AllocSAETrainingRunner,
        sae_lens_alloc.AllocSAETrainer,
    )
    for place in (sae_lens, llm_runner):
        setattr(place, "LanguageModelSAETrainingRunner", runner)
    for place in (sae_lens, sae_trainer, llm_runner):
        setattr(place, "SAETrainer", trainer)


@cache
def _documents() -> dict[str, list[str]]:
    texts = pd.read_parquet(DEMO / "corpus" / "train.parquet")["text"].tolist()
    return {"text": [text for text in texts if len(text) < 3000]}


def _load_dataset(path: str, *_: Any, streaming: bool = False, **__: Any) -> Any:
    if path not in LISTS["text_datasets"]:
        raise ConnectionError(f"{path} is not among the stand-ins of {HERE}")
    dataset = datasets.Dataset.from_dict(_documents())
    return dataset.to_iterable_dataset() if streaming else dataset


@cache
def _language_model() -> HookedTransformer:
    """In place of roneneldan's TinyStories-1M: its widths, random weights, the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO / "model"))
    torch.manual_seed(0)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=4,
            d_model=64,
            n_ctx=2048,
            d_head=4,
            n_heads=16,
            act_fn="gelu_new",
            model_name="tiny-stories-1M",
            default_prepend_bos=True,
            device="cpu",
            seed=0,
        ),
        tokenizer,
    )


def _stand_in(original: Callable[..., HookedTransformer]) -> Any:
    @wraps(original)
    def load(model_name: str, *args: Any, **kwargs: Any) -> HookedTransformer:
        if model_name in LISTS["language_models"]:
            return _language_model()
        return original(model_name, *args, **kwargs)

    return staticmethod(load)


def _offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    loading = datasets.load_dataset

    @wraps(loading)
    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        on_disk = Path(path).exists() or path in ("json", "parquet", "text")
        return (loading if on_disk else _load_dataset)(path, *args, **kwargs)

    datasets.load_dataset = activations_store.load_dataset = load
    for name in ("from_pretrained", "from_pretrained_no_processing"):
        setattr(HookedTransformer, name, _stand_in(getattr(HookedTransformer, name)))


def _without_other_libraries() -> None:
    """Modules that two test files import for comparisons with other libraries, which are skipped."""
    for name in LISTS["other_libraries"]:
        sys.modules.setdefault(name, MagicMock())


_offline()
_without_other_libraries()
if GROUP in REPLACED:
    _replace_classes()
    _dense_outputs()
if GROUP == "runner":
    _replace_runner()

# of each test: how it ended and, where it failed, the first line of why
outcomes: dict[str, tuple[str, str]] = {}


def pytest_collection() -> None:
    """SAELens' `random_params` draws all buffers, but torch draws no flags."""
    from tests import helpers  # SAELens', known once its conftest has been read

    def random_params(model: torch.nn.Module) -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.data = torch.rand_like(tensor)

    setattr(helpers, "random_params", random_params)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in LISTS["skipped"].items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    failed_before = outcomes.get(item.nodeid, ("", ""))[0] == "failed"
    if not failed_before and (report.when == "call" or not report.passed):
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message.splitlines()[0] if crash and crash.message else ""
        outcomes[item.nodeid] = (report.outcome, reason)
    return report


def pytest_sessionfinish() -> None:
    RESULTS.write_text(json.dumps(outcomes, indent=1))
