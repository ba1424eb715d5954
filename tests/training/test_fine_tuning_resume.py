"""A fine-tuning leaves its evaluation contexts alone in every epoch, and resumes bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.training import fine_tuning
from sae_lens_alloc.training.fine_tuning import FineTuningRunner
from sae_lens_alloc.training.source_sae import SourceSAE
from tests.training.conftest import D_MODEL, lm_config, short_documents

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")

EVALUATION_TOKENS = 10 * 64
N_STEPS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 59 contexts of 64 tokens: 8 held out, 10 to evaluate on, and an epoch of 41."""
    folder = tmp_path_factory.mktemp("text")
    short_documents(5).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> SourceSAE:
    monkeypatch.setattr(fine_tuning, "CALIBRATION_TOKENS", 1024)
    # random weights explain nothing
    monkeypatch.setattr(fine_tuning, "require_plausible", lambda *_: None)
    torch.manual_seed(1)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4))
    return SourceSAE("random", sae, None, None, None)


def config(
    folder: Path, text: Path, **overrides: Any
) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "dataset_path": str(text),
        "training_tokens": N_STEPS * 256,
        "output_path": str(folder / "sae"),
        "checkpoint_path": str(folder / "checkpoints"),
        "logger": LoggingConfig(
            log_to_wandb=False, wandb_id="run", wandb_log_frequency=1
        ),
        **overrides,
    }
    sae = MutualChoiceTrainingSAEConfig(
        d_in=D_MODEL, d_sae=64, k=4, feature_choice_steps=0
    )
    return lm_config(sae, **settings)


@pytest.mark.slow
def test_a_fine_tuning_resumed_at_any_step_ends_bit_for_bit(
    source: SourceSAE,
    text: Path,
    demo_model: HookedRootModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        "sae_lens_alloc.training.sourced_runner.load_language_model",
        lambda _: demo_model,
    )
    cfg = config(tmp_path / "whole", text, n_checkpoints=N_STEPS - 1)
    FineTuningRunner(cfg, source, {}, evaluation_tokens=EVALUATION_TOKENS).run()
    expected = {
        name: (tmp_path / "whole" / "sae" / name).read_bytes()
        for name in ("sae_weights.safetensors", "cfg.json")
    }
    checkpoints = tmp_path / "whole" / "checkpoints" / "run"
    places = sorted(int(path.name) // 256 for path in checkpoints.iterdir())
    assert len(places) > N_STEPS - 3
    # two epochs and more; all places of the second, and the last one
    for step in [*places[8:20], places[-1]]:
        folder = tmp_path / str(step)
        resumed = config(
            folder,
            text,
            checkpoint_path=None,
            resume_from_checkpoint=str(checkpoints / str(256 * step)),
        )
        FineTuningRunner(resumed, source, {}, evaluation_tokens=EVALUATION_TOKENS).run()
        found = {name: (folder / "sae" / name).read_bytes() for name in expected}
        assert found == expected, step


def test_the_evaluation_contexts_are_served_in_no_epoch(
    source: SourceSAE, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = config(tmp_path, text, checkpoint_path=None)
    served: list[list[int]] = []
    read = ResumableActivationsStore.get_batch_tokens

    def recorded(store: ResumableActivationsStore, *args: Any, **kwargs: Any) -> Any:
        tokens = read(store, *args, **kwargs)
        served.extend(tokens.tolist())
        return tokens

    monkeypatch.setattr(ResumableActivationsStore, "get_batch_tokens", recorded)
    runner = FineTuningRunner(cfg, source, {}, evaluation_tokens=EVALUATION_TOKENS)
    runner.run()
    held_out, trained_on = served[:8], served[8:]
    assert len(trained_on) > 2 * 41  # more than two epochs
    set_apart = [*held_out, *runner.evaluation_contexts.tolist()]
    assert len(set_apart) == 8 + 10
    assert [row for row in set_apart if row in trained_on] == []


def test_text_that_is_too_short_is_refused_with_what_is_missing(
    source: SourceSAE, text: Path, tmp_path: Path
):
    cfg = config(tmp_path, text, checkpoint_path=None)
    with pytest.raises(
        ValueError, match=r"has 3,\d+ tokens .* 4,800 are needed: 4,544 to be held out"
    ):
        FineTuningRunner(cfg, source, {}, evaluation_tokens=4_000)
