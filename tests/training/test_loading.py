"""What SAELens makes of the files and SAEs of a run, as the page on inference says."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, BatchTopKTrainingSAE, JumpReLUSAE, TopKSAE, TrainingSAE
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.registry import get_sae_training_class
from sae_lens.training import upload_saes_to_huggingface as uploading
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import AllocSAETrainingRunner
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import changed, state_of, tokens
from tests.saes.test_aux_zipf import BASES, settings
from tests.training.conftest import D_MODEL, lm_config

OURS = ("mutual_choice", "feature_choice", "matryoshka_mutual_choice")
ARCHITECTURES = (*OURS, *(f"{base}_aux_zipf" for base in BASES))


def training_config(architecture: str, **overrides: Any) -> Any:
    sizes = settings(architecture.removesuffix("_aux_zipf"), d_in=D_MODEL)
    if architecture in OURS:
        sizes["k"] = 3
    if architecture.startswith("matryoshka"):
        sizes["matryoshka_widths"] = [8, 32]
    sizes.update({"dtype": "float32", **overrides})
    return get_sae_training_class(architecture)[1](**sizes)


@pytest.fixture(params=ARCHITECTURES)
def run(
    request: pytest.FixtureRequest,
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
    few_calibration_tokens: None,  # noqa: ARG001
    restore_signals: None,  # noqa: ARG001
) -> tuple[TrainingSAE[Any], Path, Path]:
    """The SAE that `run` returned, the output folder, and the last checkpoint."""
    cfg = lm_config(
        training_config(request.param),
        training_tokens=2 * 256,
        output_path=str(tmp_path / "sae"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
    )
    sae = AllocSAETrainingRunner(cfg, demo_text, demo_model).run()
    (checkpoint,) = (tmp_path / "checkpoints").rglob("final_512")
    return sae, tmp_path / "sae", checkpoint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The saved SAE, loaded with SAELens")
def test_a_run_is_uploaded_and_loaded_by_saelens(
    run: tuple[TrainingSAE[Any], Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    sae, output, checkpoint = run
    hub = _local_hub(tmp_path / "hub", monkeypatch)
    uploading.upload_saes_to_huggingface(
        {"folder": output, "returned": sae, "checkpoint": checkpoint},
        hf_repo_id="me/it",
    )
    expected = SAE.load_from_disk(output)
    x = tokens(50, D_MODEL)
    for name in ("folder", "returned"):
        loaded = SAE.from_pretrained("me/it", name)
        assert type(loaded) is type(expected)
        torch.testing.assert_close(loaded.encode(x), expected.encode(x))
        torch.testing.assert_close(loaded(x), expected(x))
    # with the thresholds of training
    loaded = SAE.from_pretrained("me/it", "checkpoint")
    assert type(loaded) is type(expected)
    torch.testing.assert_close(loaded.W_enc, expected.W_enc)
    # what needs this package, and what does not
    architectures = {
        name: pretrained_sae_loaders.get_sae_lens_config_from_disk(hub / name)[
            "architecture"
        ]
        for name in ("folder", "returned", "checkpoint")
    }
    assert architectures == {
        "folder": expected.cfg.architecture(),
        "returned": sae.cfg.architecture(),
        "checkpoint": sae.cfg.architecture(),
    }


def _local_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of a repository on the hub."""

    class Api:
        def repo_info(self, repo_id: str) -> None:
            pass

        def upload_folder(
            self, folder_path: Path, path_in_repo: str, **other: Any
        ) -> None:
            to = folder / path_in_repo
            to.mkdir(parents=True)
            for name in other["allow_patterns"]:
                if (folder_path / name).exists():
                    (to / name).write_bytes((folder_path / name).read_bytes())

    def download(repo_id: str, filename: str, **_: Any) -> str:
        if not (folder / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(uploading, "HfApi", Api)
    monkeypatch.setattr(uploading, "_repo_file_exists", lambda *_: True)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    return folder


def checkpoint_of(
    architecture: str, folder: Path, **overrides: Any
) -> TrainingSAE[Any]:
    """A checkpoint, with decoder norms that differ and thresholds."""
    cfg = training_config(architecture, **overrides)
    sae = get_sae_training_class(architecture)[0](cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            weights = sae.get_parameter(name)
            weights.copy_(torch.randn(weights.shape, generator=generator) * 0.4)
        if isinstance(sae, AllocationTrainingSAE):
            sae.allocation.threshold.uniform_(0.1, 2.0, generator=generator)
        if isinstance(sae, BatchTopKTrainingSAE):
            sae.topk_threshold.fill_(0.75)
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_is_loaded_as_the_sae_that_it_would_be_saved_as(
    architecture: str, dtype: str, tmp_path: Path
):
    sae = checkpoint_of(architecture, tmp_path / "checkpoint", dtype=dtype)
    sae.save_inference_model(tmp_path / "inference")
    expected = SAE.load_from_disk(tmp_path / "inference")
    loaded = SAE.load_from_disk(tmp_path / "checkpoint")
    assert type(loaded) is type(expected)
    assert loaded.cfg.to_dict() == expected.cfg.to_dict()
    found, wanted = loaded.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
    x = tokens(20, D_MODEL, dtype=expected.dtype)
    assert torch.equal(loaded.encode(x), expected.encode(x))
    assert (loaded.encode(x) > 0).any()

    # it is a stock SAE from here on
    loaded.save_model(tmp_path / "again")
    again = SAE.load_from_disk(tmp_path / "again")
    assert again.cfg.architecture() == expected.cfg.architecture()
    assert torch.equal(again.encode(x), expected.encode(x))
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied.encode(x), expected.encode(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_is_still_a_training_sae_to_trainingsae(
    architecture: str, tmp_path: Path
):
    sae = checkpoint_of(architecture, tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    # SAELens casts that threshold to the dtype of the weights
    assert changed(state_of(sae), loaded) <= {"topk_threshold"}


def test_a_checkpoint_is_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path):
    sae = checkpoint_of("mutual_choice", tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert isinstance(sae, AllocationTrainingSAE)
    assert isinstance(loaded, JumpReLUSAE)
    assert loaded.W_enc.dtype == loaded.threshold.dtype == torch.bfloat16
    assert loaded.cfg.dtype == "bfloat16"
    torch.testing.assert_close(
        loaded.threshold.float(), sae.allocation.threshold, rtol=1e-2, atol=0
    )


def test_a_class_of_saelens_takes_only_its_own(tmp_path: Path):
    checkpoint_of("topk_aux_zipf", tmp_path)
    assert isinstance(SAE.load_from_disk(tmp_path), TopKSAE)
    with pytest.raises(ValueError, match="not of type TopKSAE"):
        TopKSAE.load_from_disk(tmp_path)


@pytest.mark.slow
def test_without_this_package_only_the_output_folder_opens(tmp_path: Path):
    sae = checkpoint_of("mutual_choice", tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "folder")
    script = f"""
import sys
from sae_lens import SAE
assert type(SAE.load_from_disk({str(tmp_path / "folder")!r})).__name__ == "JumpReLUSAE"
try:
    SAE.load_from_disk({str(tmp_path / "checkpoint")!r})
except KeyError as error:
    assert error.args == ("mutual_choice",)
else:
    raise AssertionError
assert "sae_lens_alloc" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
