"""
What SAELens and torch must go on doing. If one of these fails with a new release, the host has
changed: look at what the failure names in sae_lens_alloc/compat.py, mend that, and only then
raise the bound in pyproject.toml and in sae_lens_alloc/host_release.py.
"""

import ast
import contextlib
import importlib
import inspect
import io
import pickle
import pkgutil
import subprocess
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig, llm_sae_training_runner
from sae_lens.training import sae_trainer
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

import sae_lens_alloc
from sae_lens_alloc import AllocSAETrainer, AllocSAETrainingRunner
from sae_lens_alloc.activations.mixing_buffer import MixingBuffer
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.compat import (
    ContextsStore,
    InterruptedException,
    ModuleOfKeptDtypes,
    compile_modes,
    has_hooks,
    read_checkpoint_metadata,
    require_methods,
    stored_entries,
    without_progress_bars,
)
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training import trainer as trainer_module
from tests.distributed.processes import on_ranks
from tests.saes.conftest import changed, state_of
from tests.training.conftest import (
    D_MODEL,
    HOOK,
    OTHER_HOOK,
    few_calibration_tokens,
    lm_config,
    load_demo_model,
    make_trainer,
    restore_signals,
    short_documents,
)
from tests.training.test_sae_trainer import batches, fresh_sae

__all__ = ["few_calibration_tokens", "restore_signals"]

ROOT = Path(__file__).parents[1]
TOPK = TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2)


def changed_host(seam: str) -> str:
    return f"the host has changed: see {seam} in sae_lens_alloc/compat.py"


def saved_steps(folder: Path) -> dict[str, int]:
    """Steps that the checkpoints of a folder count, by the checkpoints' names."""
    return {
        path.parent.name: torch.load(path)["n_training_steps"]
        for path in folder.glob("*/trainer_state.pt")
    }


def test_sae_lens_saves_a_checkpoint_before_it_counts_the_step(tmp_path: Path):
    # of 8 steps of 64 tokens, those that first exceed 128, 256 and 384 are the 3rd, 5th, 7th
    counted: dict[type[Any], dict[str, int]] = {}
    for trainer_class in (SAETrainer, AllocSAETrainer):
        folder = tmp_path / trainer_class.__name__
        make_trainer(
            TopKTrainingSAE(TOPK),
            batches(8),
            8,
            trainer_class,
            n_checkpoints=3,
            checkpoint_path=str(folder),
        ).fit()
        counted[trainer_class] = saved_steps(folder)
    seam = changed_host("StepwiseTrainer")
    assert counted[SAETrainer] == {"192": 2, "320": 4, "448": 6}, seam
    assert counted[AllocSAETrainer] == {"192": 3, "320": 5, "448": 7}, seam


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "mutual_choice", "feature_choice_steps": 4},
        {"architecture": "feature_choice"},
    ],
)
def test_our_step_does_what_the_step_of_sae_lens_does(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    trainers = []
    for is_ours in (True, False):
        if not is_ours:
            monkeypatch.setattr(
                trainer_module,
                "train_step",
                lambda trainer, x, *_: SAETrainer._train_step(trainer, trainer.sae, x),
            )
        sae = fresh_sae(**options)
        trainer = make_trainer(
            sae, batches(12), 12, AllocSAETrainer, dead_feature_window=3
        )
        trainer.fit()
        trainers.append(trainer)
    ours, theirs = trainers
    reason = "SAELens has changed its step: training/train_step.py must follow"
    assert changed(state_of(theirs.sae), ours.sae) == set(), reason
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, reason)
    for name in ("n_frac_active_samples", "n_training_samples", "n_training_steps"):
        assert getattr(ours, name) == getattr(theirs, name), (name, reason)
    assert ours.lr_scheduler.last_epoch == theirs.lr_scheduler.last_epoch, reason


def test_a_checkpoint_of_sae_lens_goes_on_with_a_fused_optimizer(tmp_path: Path):
    stock = make_trainer(fresh_sae("mutual_choice"), batches(4), 8)
    for _ in range(4):
        stock.step(next(stock.data_provider))
    stock.save_trainer_state(tmp_path)
    ours = make_trainer(fresh_sae("mutual_choice"), batches(4), 8, AllocSAETrainer)
    ours.load_trainer_state(tmp_path)
    (group,) = ours.optimizer.param_groups
    assert group["fused"] is True
    moments = [
        [s["exp_avg"] for s in t.optimizer.state.values()] for t in (stock, ours)
    ]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    ours.step(next(ours.data_provider))  # of which fused Adam takes the step count
    assert [int(s["step"]) for s in ours.optimizer.state.values()] == 4 * [5]


class NotingStore(ContextsStore):
    """Notes all that passes it."""

    rows: list[str]
    contexts: list[list[int]]

    @override
    def rows_of(self, dataset: Iterator[Any]) -> Iterator[Any]:
        for row in dataset:
            self.rows.append(row)
            yield row

    @override
    def contexts_of(self, epoch: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for context in epoch:
            self.contexts.append(context.tolist())
            yield context


def test_the_store_of_sae_lens_reads_all_its_epochs_through_our_places():
    cfg = lm_config(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4))
    model, text = load_demo_model(), short_documents(3)
    stock = ActivationsStore.from_config(model, cfg, text)
    epoch = [context.tolist() for context in stock.iterable_sequences]
    store = NotingStore.from_config(model, cfg, text)
    assert isinstance(store, NotingStore)
    store.rows, store.contexts = [], []
    # two epochs and one context, in batches that do not end with the epochs
    served = [store.get_batch_tokens(1)[0].tolist() for _ in range(2 * len(epoch) + 1)]
    seam = changed_host("ContextsStore")
    assert served == store.contexts == [*epoch, *epoch, epoch[0]], seam
    assert store.rows[:6] == 2 * list(text["text"]), seam
    store.begin_epoch()
    assert store.get_batch_tokens(1)[0].tolist() == epoch[0], seam


def test_the_store_of_sae_lens_reads_the_hooks_that_it_is_told():
    cfg = lm_config(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4))
    model, text = load_demo_model(), short_documents(3)
    widths = {HOOK: D_MODEL, OTHER_HOOK: D_MODEL}
    stock = ActivationsStore.from_config_multi_hook(
        model,
        dataset=text,
        hook_names=list(widths),
        hook_d_ins=widths,
        context_size=cfg.context_size,
        streaming=False,
    )
    ours = NotingStore.from_config(model, cfg, text)
    assert isinstance(ours, NotingStore)
    ours.read_hooks(widths)
    seam = changed_host("ContextsStore.read_hooks")
    for name in ("_hook_names", "_hook_d_ins", "_hook_head_indices"):
        assert getattr(ours, name) == getattr(stock, name), seam
    tokens = torch.arange(2 * cfg.context_size).view(2, -1)
    found = ours.get_multi_hook_activations(tokens)
    assert list(found) == list(widths), seam
    for hook, activations in stock.get_multi_hook_activations(tokens).items():
        assert torch.equal(found[hook], activations), seam


def numbered(sizes: list[int]) -> Iterator[torch.Tensor]:
    """Tokens 0, 1, 2, ... in chunks of these sizes, over and over."""
    first = 0
    for i in count():
        size = sizes[i % len(sizes)]
        yield torch.arange(first, first + size).unsqueeze(1)
        first += size


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch_size=st.integers(1, 20),
    extra=st.integers(0, 40),
    mix_fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_mixing_buffer_serves_what_sae_lens_serves(
    sizes: list[int], batch_size: int, extra: int, mix_fraction: float
):
    served: list[list[torch.Tensor]] = []
    for buffer in (mixing_buffer, MixingBuffer):
        torch.manual_seed(0)
        serving = buffer(batch_size + extra, batch_size, numbered(sizes), mix_fraction)
        served.append(list(islice(serving, 12)))
    assert all(torch.equal(*pair) for pair in zip(*served, strict=True)), (
        "SAELens has changed its mixing buffer: activations/mixing_buffer.py must follow"
    )


@pytest.mark.parametrize(("buffer_size", "mix_fraction"), [(3, 0.5), (4, 1.5)])
def test_mixing_buffer_refuses_what_sae_lens_refuses(
    buffer_size: int, mix_fraction: float
):
    with pytest.raises(ValueError):
        next(mixing_buffer(buffer_size, 4, numbered([4]), mix_fraction))
    with pytest.raises(ValueError, match="n_batches_in_buffer|mix_fraction"):
        MixingBuffer(buffer_size, 4, numbered([4]), mix_fraction)


@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
def test_the_runner_of_sae_lens_works_with_our_store_and_our_trainer(tmp_path: Path):
    cfg = lm_config(
        TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4), output_path=str(tmp_path)
    )
    runner = AllocSAETrainingRunner(cfg, short_documents(20), load_demo_model())
    store = runner.activations_store
    assert isinstance(store, ResumableActivationsStore)
    assert runner.evaluator.activations_store is store
    runner.run()
    # 4 features of 64 are active on each token, by the statistics of the trainer that trained
    density = 10 ** load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert density.sum().item() == pytest.approx(4, rel=1e-5)


def test_interrupted_exception_is_what_sae_lens_raises():
    with pytest.raises(InterruptedException):
        llm_sae_training_runner.interrupt_callback(15, None)


def test_hooks_of_torch_and_of_transformer_lens_are_seen():
    point, seam = HookPoint(), changed_host("has_hooks")
    assert not has_hooks(point), seam
    for register in (point.register_forward_hook, point.register_full_backward_hook):
        handle = register(lambda *_: None)
        assert has_hooks(point), seam
        handle.remove()
        assert not has_hooks(point), seam
    for direction in ("fwd", "bwd"):
        point.add_hook(lambda *_, **__: None, dir=direction)
        assert has_hooks(point), seam
        point.remove_hooks(direction)
        assert not has_hooks(point), seam


def test_stored_entries_are_not_summed():
    indices = torch.tensor([[0, 1, 1], [2, 0, 0]])
    values = torch.tensor([3.0, 4.0, 0.0])
    found = stored_entries(
        torch.sparse_coo_tensor(indices, values, (2, 3), check_invariants=False)
    )
    seam = changed_host("stored_entries")
    assert torch.equal(found[0], indices), seam
    assert torch.equal(found[1], values), seam


def test_torch_takes_the_modes_that_it_lists():
    modes = compile_modes()
    seam = changed_host("compile_modes")
    assert {"default", "max-autotune"} <= set(modes), seam
    for mode in modes:
        torch.compile(
            nn.Linear(1, 1), mode=mode
        )  # compiles nothing before it is called
    with pytest.raises(RuntimeError, match="nonsense"):
        torch.compile(nn.Linear(1, 1), mode="nonsense")


def test_casting_an_sae_casts_no_buffer_of_a_module_that_keeps_its_dtypes():
    class Thresholds(ModuleOfKeptDtypes):
        threshold: torch.Tensor
        n_moved = 0

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("threshold", torch.tensor([0.1]))

        @override
        def after_moving(self) -> None:
            self.n_moved += 1

    thresholds = Thresholds()
    sae = nn.Sequential(nn.Linear(1, 1), thresholds).to(torch.bfloat16)
    seam = changed_host("ModuleOfKeptDtypes")
    assert next(sae.parameters()).dtype == torch.bfloat16
    assert thresholds.threshold.dtype == torch.float32, seam
    assert thresholds.threshold.item() == torch.tensor(0.1).item(), seam
    assert thresholds.n_moved == 1, seam
    sae.to("meta")
    assert thresholds.threshold.is_meta, seam


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_nothing_private_of_others_is_used_elsewhere():
    """A private name that no file of ours defines is the host's, and belongs in compat.py."""
    defined: set[str] = set()
    used: list[tuple[str, str]] = []
    for file in (ROOT / "sae_lens_alloc").rglob("*.py"):
        if file.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
                used += [(file.name, "__class__")] * (node.attr == "__class__")
            elif isinstance(node, ast.Attribute):
                used += [(file.name, node.attr)] * private(node.attr)
            elif isinstance(node, ast.ImportFrom):
                names = [*str(node.module).split("."), *(n.name for n in node.names)]
                used += [(file.name, name) for name in names if private(name)]
    assert [(file, name) for file, name in used if name not in defined] == []
    assert "__class__" not in defined


def test_nothing_private_of_the_host_is_overridden_elsewhere():
    hosts = ("sae_lens.", "transformer_lens.", "torch.nn.", "torch.optim.")
    overridden: list[tuple[str, str, str]] = []
    for info in pkgutil.walk_packages(sae_lens_alloc.__path__, "sae_lens_alloc."):
        if info.name.endswith(("compat", "__main__")) or "triton" in info.name:
            continue
        for cls in vars(importlib.import_module(info.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name:
                continue
            overridden += [
                (info.name, cls.__name__, name)
                for base in cls.__mro__
                if base.__module__.startswith(hosts)
                for name in vars(cls).keys() & vars(base).keys()
                if private(name) and callable(vars(cls)[name])
            ]
    assert overridden == []


def bars(_: Ranks) -> tuple[str, str]:
    """What the bar of SAELens' trainer writes before and after it is switched off."""
    written = io.StringIO(), io.StringIO()
    for text in written:
        with contextlib.redirect_stderr(text):
            list(sae_trainer.tqdm(range(3), desc="Training SAE"))
        without_progress_bars()
    return written[0].getvalue(), written[1].getvalue()


def test_the_bar_of_saelens_can_be_switched_off():
    ((before, after),) = on_ranks(1, bars)
    assert "Training SAE" in before
    assert after == ""


def test_a_method_that_the_host_lacks_is_reported_when_we_are_imported():
    require_methods(SAETrainer, ["fit"])
    with pytest.raises(ImportError, match="SAETrainer has no nonsense"):
        require_methods(SAETrainer, ["fit", "nonsense"])


def test_metadata_of_a_distributed_checkpoint_are_read_without_executing_anything(
    tmp_path: Path,
):
    tensors = {"weights": torch.ones(3, 2).bfloat16(), "flags": torch.ones(4).bool()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(tensors, checkpoint_id=tmp_path)
    with (tmp_path / ".metadata").open("rb") as file:
        found = read_checkpoint_metadata(file).state_dict_metadata
    assert {name: tuple(tensor.size) for name, tensor in found.items()} == {
        "weights": (3, 2),
        "flags": (4,),
    }
    forbidden = pickle.dumps(subprocess.Popen)
    with pytest.raises(ValueError, match="it refers to subprocess.Popen"):
        read_checkpoint_metadata(io.BytesIO(forbidden))
