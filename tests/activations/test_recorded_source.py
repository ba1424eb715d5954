from types import SimpleNamespace
from typing import Any, cast

from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import SAEMetadata

from sae_lens_alloc import load_runner_config
from sae_lens_alloc.activations.recorded_source import record_language_model
from sae_lens_alloc.demo.methods import CONFIG


def test_a_language_model_is_recorded_as_saelens_records_it():
    """A key that SAELens adds or drops fails here."""
    cfg = load_runner_config(CONFIG, ["seqpos_slice=[1, 200]", "hook_head_index=3"])
    ours, theirs = SAEMetadata(), SAEMetadata()
    record_language_model(ours, cfg)
    runner = SimpleNamespace(
        sae=SimpleNamespace(cfg=SimpleNamespace(metadata=theirs)), cfg=cfg
    )
    LanguageModelSAETrainingRunner._set_sae_metadata(cast(Any, runner))
    assert ours.to_dict() == theirs.to_dict()
    assert ours.hook_name == "transformer.h.2"
