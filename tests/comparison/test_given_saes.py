"""SAEs that one has: their names, and whether they belong together."""

from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

from sae_lens_alloc.comparison.given_figures import common_l0
from sae_lens_alloc.comparison.given_saes import (
    load_given_saes,
    require_same_activations,
    short_names,
)
from sae_lens_alloc.training.source_sae import load_source_sae


def standard(d_in: int = 4, **metadata: Any) -> SAE[Any]:
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8))
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def test_names_are_as_short_as_they_can_be(tmp_path: Path):
    for name in ("a/sae", "b/sae", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    folders = [str(tmp_path / name) for name in ("a/sae", "b/sae", "b/other")]
    found = short_names([*folders, "release:blocks.0.hook_resid_pre"])
    assert [*found.values()] == [
        *("a/sae", "b/sae", "other"),
        "release:blocks.0.hook_resid_pre",
    ]


def test_saes_of_other_activations_are_refused(tmp_path: Path):
    first = standard(hook_name="h.1")
    require_same_activations({"a": first, "b": standard(), "c": standard()})
    with pytest.raises(
        ValueError,
        match="a and b are not SAEs of the same activations: hook_name is 'h.1' of one and 'h.2'",
    ):
        require_same_activations({"a": first, "b": standard(hook_name="h.2")})
    require_same_activations({"a": first, "b": standard(hook_name="h.2")}, same=[])
    with pytest.raises(ValueError, match=r"d_in and d_out is \(4, None\) of one and"):
        require_same_activations({"a": first, "b": standard(d_in=5)}, same=[])
    standard().save_model(tmp_path)
    with pytest.raises(ValueError, match="the same SAE is given twice"):
        load_given_saes([str(tmp_path), str(tmp_path)], "cpu")


def test_a_temporal_sae_is_refused(tmp_path: Path):
    TemporalSAE(TemporalSAEConfig(d_in=8, d_sae=512)).save_model(tmp_path)
    with pytest.raises(ValueError, match="encodes a whole context at a time"):
        load_given_saes([str(tmp_path)], "cpu")


@pytest.mark.parametrize("separator", [":", "/"])
def test_a_release_may_be_written_with_a_slash(separator: str):
    with pytest.raises(ValueError, match="there is no SAE of gpt2-small-res-jb 'none'"):
        load_source_sae(f"gpt2-small-res-jb{separator}none", "cpu")
    with pytest.raises(ValueError, match="is neither a folder nor RELEASE:ID"):
        load_source_sae("no/release", "cpu")


def test_the_common_l0_is_one_that_all_can_have():
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    from tests.evaluation.test_report import make_run

    runs = [make_run("a"), make_run("b", 1), make_run("topk", 2)]
    saes: dict[str, SAE[Any]] = {"a": standard(), "b": standard(), "topk": standard()}
    smallest = min(run.evaluation.l0 for run in runs)
    assert common_l0(saes, runs) == smallest
    saes["topk"] = TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2))
    assert common_l0(saes, runs) == runs[2].evaluation.l0
