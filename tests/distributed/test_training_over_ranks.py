"""A training by several ranks against the same training by one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.config.run_config import AllocSAETrainerConfig
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.ops import encode_select, topk_selection
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.saes.sharding import new_shard
from sae_lens_alloc.saes.weight_names import OF_NO_FEATURE
from sae_lens_alloc.thresholds.calibration import calibrate_thresholds
from sae_lens_alloc.training.held_out import held_out_metrics
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from sae_lens_alloc.training.trainer import AllocSAETrainer
from tests.distributed.processes import on_ranks

D_IN, D_SAE, N_TOKENS, N_STEPS = 12, 71, 64, 20

SETTINGS: dict[str, dict[str, Any]] = {
    "mutual_choice": {"architecture": "mutual_choice", "feature_choice_steps": 0},
    "recipe": {
        "architecture": "mutual_choice",
        "feature_choice_steps": 8,
        "k_start": 8.0,
        "k_decay_steps": 8,
    },
    "feature_choice": {"architecture": "feature_choice", "mutual_choice_steps": 3},
    "nested": {
        "architecture": "matryoshka_mutual_choice",
        "feature_choice_steps": 4,
        "matryoshka_widths": [9, 30],
    },
    "timed": {"architecture": "mutual_choice", "feature_choice_steps": None},
    "layer_norm": {
        "architecture": "mutual_choice",
        "feature_choice_steps": 0,
        "normalize_activations": "layer_norm",
    },
    "scaled": {
        "architecture": "mutual_choice",
        "feature_choice_steps": 5,
        "normalize_activations": "expected_average_only_in",
    },
    "raw": {
        "architecture": "mutual_choice",
        "feature_choice_steps": 5,
        "rescale_acts_by_decoder_norm": False,
        "apply_b_dec_to_input": False,
        "aux_loss": "aux_k",
        "k_aux": 3,
    },
    # of the same batches: seven numbers of input and five of output
    "transcoder": {
        "architecture": "mutual_choice_transcoder",
        **{"d_in": 7, "d_out": 5, "skip_connection": True},
        "feature_choice_steps": 5,
        "normalize_activations": "expected_average_only_in",
    },
    "feature_choice_transcoder": {
        "architecture": "feature_choice_transcoder",
        **{"d_in": 7, "d_out": 5},
        "normalize_activations": "layer_norm",
    },
    "triton": {"architecture": "mutual_choice", "feature_choice_steps": 1},
    "triton_nested": {
        "architecture": "matryoshka_mutual_choice",
        "feature_choice_steps": 0,
        "matryoshka_widths": [9, 30],
    },
    "plain": {
        "architecture": "mutual_choice",
        "feature_choice_steps": 5,
        "selection_margin": 0.0,
        "aux_loss": "none",
    },
}


def sae_config(name: str) -> Any:
    settings = {
        "k": 4.0,
        "aux_loss": "aux_zipf",
        "density_window_tokens": 500,
        **SETTINGS[name],
    }
    torch.manual_seed(0)
    return TrainingSAE.from_dict(
        {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", **settings}
    ).cfg


def batches() -> Iterator[torch.Tensor]:
    """Activations in bfloat16's numbers, of which equal affinities come."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(30, D_IN, generator=generator)
    while True:
        sparse = torch.rand(N_TOKENS, 30, generator=generator) < 0.1
        x = (sparse * torch.rand(N_TOKENS, 30, generator=generator)) @ directions
        x[-4:] = x[:4]  # tokens that are the same
        yield x.bfloat16().float()


def trainer_config(run: "Run") -> AllocSAETrainerConfig:
    return AllocSAETrainerConfig(
        optimizer=run.optimizer,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=run.n_steps * N_TOKENS,
        device="cpu",
        autocast=run.autocast,
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=run.n_steps // 4,
        n_restart_cycles=1,
        train_batch_size_samples=N_TOKENS,
        dead_feature_window=4,
        feature_sampling_window=7,
        logger=LoggingConfig(log_to_wandb=False),
    )


def new_sae(name: str, ranks: Ranks) -> Any:
    cfg = sae_config(name)
    torch.manual_seed(2)
    if ranks.is_alone:
        return TrainingSAE.from_dict(cfg.to_dict())
    return new_shard(cfg, FeatureShard(D_SAE, ranks))


def state_of(sae: Any, shard: FeatureShard) -> dict[str, torch.Tensor]:
    """Weights and statistics of all features."""
    state = {
        "W_enc": shard.gather(sae.W_enc.data.T.contiguous()).T.contiguous(),
        "W_dec": shard.gather(sae.W_dec.data),
        "b_enc": shard.gather(sae.b_enc.data),
        **{
            name: getattr(sae, name).data
            for name in OF_NO_FEATURE
            if hasattr(sae, name)
        },
    }
    for key, buffer in sae.allocation.named_buffers():
        own = buffer.float()
        state[key] = shard.gather(own) if key in sae.allocation.by_feature else own
    return {key: value.clone() for key, value in state.items()}


def pairs_of(output: TrainStepOutput, shard: FeatureShard) -> list[tuple[int, int]]:
    acts = output.feature_acts.coalesce()
    tokens, features = acts.indices()[:, acts.values() != 0]  # without padding
    return list(zip(tokens.tolist(), shard.ids()[features].tolist(), strict=True))


@dataclass(frozen=True)
class Run:
    """
    A training to compare.

    Args:
        name: Key of SETTINGS.
        optimizer: Name of the optimizer.
        backend: Name of the backend.
        asks_once: Whether the torch backend does what it does on a GPU.
        autocast: Whether the step is in bfloat16 where torch allows it.
        n_steps: Training steps.
    """

    name: str
    optimizer: str = "adam"
    backend: str = "torch"
    asks_once: bool = False
    autocast: bool = False
    n_steps: int = N_STEPS

    def __str__(self) -> str:
        once = "once" if self.asks_once else ""
        autocast = "autocast" if self.autocast else ""
        parts = (self.name, self.optimizer, self.backend, once, autocast)
        return "-".join(filter(None, parts))


RUNS = [
    *(Run(name) for name in SETTINGS if not name.startswith("triton")),
    Run("recipe", optimizer="row_sparse_adam"),
    Run("recipe", optimizer="muon"),
    Run("transcoder", optimizer="muon"),
    Run("transcoder", optimizer="row_sparse_adam"),
    Run("recipe", asks_once=True),
    Run("nested", asks_once=True),
    Run("recipe", autocast=True),
    Run("nested", backend="reference"),
]
AGAIN = RUNS[0]
TRITON_RUNS = [
    Run("triton", backend="triton", n_steps=3),
    Run("triton_nested", backend="triton", n_steps=1),
    Run("triton", backend="triton_prefilter", n_steps=3),
]


@contextmanager
def as_the_run_says(run: Run) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, run.backend)
        for module in (encode_select, topk_selection):
            patch.setattr(module, "asking_costs_a_wait", lambda _device: run.asks_once)
        if run.asks_once:
            patch.setattr(Pairs, "only", Pairs.masked)
        yield


def train(ranks: Ranks, run: Run) -> dict[str, Any]:
    """What comes of a training: pairs of the first step, states, and metrics at the end."""
    torch.set_num_threads(1)
    sae = new_sae(run.name, ranks)
    shard = sae.shard
    kind = AllocSAETrainer if ranks.is_alone else ShardedSAETrainer
    trainer = kind(trainer_config(run), sae, batches())
    found: dict[str, Any] = {"states": {0: state_of(sae, shard)}}
    if sae.cfg.normalize_activations == "expected_average_only_in":
        scaler = trainer.activation_scaler
        scaler.estimate_scaling_factor(sae.cfg.d_in, trainer.data_provider, 5)
    for step in range(run.n_steps):
        trainer.maybe_reset_sparsity()
        output = trainer.step(next(trainer.data_provider))
        if step == 0:
            found["pairs"] = pairs_of(output, shard)
        found["row"] = trainer.build_train_step_log_dict(output, 0)
        trainer.n_training_steps += 1
        if step in (0, run.n_steps - 1):
            found["states"][step + 1] = state_of(sae, shard)
    found["sparsity"] = trainer.log_feature_sparsity
    trainer.set_final_sae_metadata()
    found["metadata"] = (sae.cfg.metadata.l0, sae.cfg.metadata.num_dead_features)
    found.update(measured(sae))
    return found


def measured(sae: Any) -> dict[str, Any]:
    """Thresholds calibrated, and the metrics by them, on the same activations."""
    activations = next(batches())
    before = held_out_metrics(sae, activations, batch_size=50)
    report = calibrate_thresholds(sae, activations, batch_size=40)
    sae.eval()
    return {
        "before": before,
        "calibration": asdict(report),
        "after": held_out_metrics(sae, activations, batch_size=50),
        "threshold": sae.shard.gather(sae.allocation.threshold),
    }


def train_all(ranks: Ranks, runs: list[Run]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        with as_the_run_says(run):
            found.append(train(ranks, run))
    return found


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return train_all(Ranks(), RUNS)


@pytest.fixture(scope="module", params=[2, 3, 4])
def together(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    return on_ranks(request.param, train_all, [*RUNS, AGAIN])


@pytest.mark.parametrize("number", range(len(RUNS)), ids=list(map(str, RUNS)))
def test_ranks_train_what_one_process_trains(
    number: int, alone: list[dict[str, Any]], together: list[list[dict[str, Any]]]
):
    assert_same_training(alone[number], [runs[number] for runs in together])


def test_as_many_ranks_train_the_same_bit_for_bit_twice(
    together: list[list[dict[str, Any]]],
):
    for runs in together:
        first, again = runs[RUNS.index(AGAIN)]["states"], runs[-1]["states"]
        for step, state in first.items():
            assert all(torch.equal(again[step][key], state[key]) for key in state)


def test_ranks_train_with_kernels_what_one_process_trains(
    triton_device: torch.device,
):
    if triton_device.type == "cuda":
        pytest.skip("the ranks here are on the CPU")
    together = on_ranks(2, train_all, TRITON_RUNS)
    for number, expected in enumerate(train_all(Ranks(), TRITON_RUNS)):
        assert_same_training(expected, [runs[number] for runs in together])


def assert_same_training(expected: dict[str, Any], by_rank: list[dict[str, Any]]):
    pairs = sorted(sum((found["pairs"] for found in by_rank), []))
    assert pairs == sorted(expected["pairs"])
    last = max(expected["states"])
    for found in by_rank:
        assert found["states"][0].keys() == expected["states"][0].keys()
        for step, state in expected["states"].items():
            for key, wanted in state.items():
                actual = found["states"][step][key]
                tolerance = {0: 0, 1: 1e-5}.get(step, 1e-3)
                torch.testing.assert_close(
                    actual,
                    wanted,
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda text, at=(step, key): f"{at}: {text}",
                )
        for name in ("row", "before", "calibration", "after"):
            assert found[name].keys() == expected[name].keys()
            for key, wanted in expected[name].items():
                close = pytest.approx(wanted, rel=1e-3, abs=1e-3, nan_ok=True)
                assert found[name][key] == close, (name, key)
        torch.testing.assert_close(found["sparsity"], expected["sparsity"])
        torch.testing.assert_close(
            found["threshold"], expected["threshold"], rtol=1e-3, atol=1e-3
        )
        assert found["metadata"] == pytest.approx(expected["metadata"], rel=1e-3)
    first, *others = (found["states"][last] for found in by_rank)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
