"""The SAE that ranks share, saved as one process saves it."""

import json
import random
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE, TrainingSAE

from sae_lens_alloc import (
    MutualChoiceTrainingSAEConfig,
    MutualChoiceTrainingTranscoderConfig,
)
from sae_lens_alloc.distributed import stored_tensors
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.saes.sharding import keep_own_features, new_shard
from sae_lens_alloc.saes.split_weights import INDEX_FILENAME, part_filename
from sae_lens_alloc.training import gathered_weights
from sae_lens_alloc.training.final_sae import write_sae, write_sae_somewhere
from tests.distributed.processes import on_ranks
from tests.training.conftest import lm_config

FILES = (SAE_WEIGHTS_FILENAME, "cfg.json", "sparsity.safetensors", "runner_cfg.json")


def random_sae(number: int) -> Any:
    """A whole SAE or transcoder of any sizes and dtype, with weights and thresholds."""
    draw = random.Random(number)
    torch.manual_seed(number)
    settings: dict[str, Any] = {
        "d_in": draw.randint(1, 5),
        "d_sae": draw.randint(300, 2500),
        "k": 2,
        "feature_choice_steps": 0,
        "aux_loss": "none",
        "rescale_acts_by_decoder_norm": draw.choice([True, False]),
        "dtype": draw.choice(["float32", "bfloat16", "float16", "float64"]),
    }
    cfg = MutualChoiceTrainingSAEConfig(**settings)
    if number % 2:
        d_out, skip = draw.randint(1, 5), draw.choice([True, False])
        cfg = MutualChoiceTrainingTranscoderConfig(
            **settings, d_out=d_out, skip_connection=skip
        )
    sae: Any = TrainingSAE.from_dict(cfg.to_dict())
    for weight in sae.parameters():
        weight.data.copy_(torch.randn(weight.shape))
    sae.allocation.threshold.copy_(torch.randn(cfg.d_sae))
    sae.allocation.threshold[3] = torch.inf
    return sae


def sparsity_of(sae: Any) -> torch.Tensor:
    return torch.arange(sae.cfg.d_sae, dtype=torch.float32)


def write(sae: Any, folder: Path) -> None:
    write_sae(sae, lm_config(sae.cfg), folder, sparsity_of(sae))


def own_part(number: int, ranks: Ranks) -> Any:
    sae = random_sae(number)
    keep_own_features(sae, FeatureShard(sae.cfg.d_sae, ranks))
    return sae


def save_cases(ranks: Ranks, folder: Path, numbers: range) -> None:
    for number in numbers:
        sae = own_part(number, ranks)
        gathered_weights.BLOCK_BYTES = random.Random(number).choice([3000, 2**26])
        write(sae, folder / f"{number}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gathered_weights, "LARGEST_FILE", 0)
            patch.setattr(gathered_weights, "PART_BYTES", 5000)
            write(sae, folder / f"{number} in parts")


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_ranks_save_what_one_process_saves(n_ranks: int, tmp_path: Path):
    numbers = range(10 * n_ranks, 10 * n_ranks + 4)
    on_ranks(n_ranks, save_cases, tmp_path, numbers)
    for number in numbers:
        sae = random_sae(number)
        write(sae, tmp_path / "whole")
        found = tmp_path / str(number)
        assert sorted(path.name for path in found.iterdir()) == sorted(FILES)
        for name in FILES:
            expected, actual = (
                (f / name).read_bytes() for f in (tmp_path / "whole", found)
            )
            if name.endswith(".json"):  # names come in any order
                assert json.loads(actual) == json.loads(expected)
            else:
                assert actual == expected, (number, name)
        SAE.load_from_disk(found)
        parts = load_sae(tmp_path / f"{number} in parts").state_dict()
        for name, wanted in load_sae(found).state_dict().items():
            assert torch.equal(parts[name], wanted), (number, name)


def save_in_parts(ranks: Ranks, folder: Path) -> None:
    # of machines of different memory
    gathered_weights.LARGEST_FILE = 0 if ranks.rank == 0 else 2**40
    gathered_weights.PART_BYTES = 3000
    write(own_part(1, ranks), folder)


def test_an_sae_in_several_files(tmp_path: Path):
    folder = tmp_path / "sae"
    write(random_sae(1), folder)
    on_ranks(2, save_in_parts, folder)
    # the single file would be loaded with the new config
    assert not (folder / SAE_WEIGHTS_FILENAME).exists()
    index = json.loads((folder / INDEX_FILENAME).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names == [part_filename(i + 1, len(names)) for i in range(len(names))]
    sae = random_sae(1)
    n_weights = sum(weight.nbytes for weight in sae.parameters())
    n_thresholds = sae.allocation.threshold.nbytes
    assert index["metadata"]["total_size"] == n_weights + n_thresholds

    content = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"index\.json' is damaged"):
        load_sae(folder)
    (folder / names[1]).unlink()
    with pytest.raises(ValueError, match=r"index\.json' is damaged"):
        load_sae(folder)
    (folder / INDEX_FILENAME).write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json' is damaged"):
        load_sae(folder)

    write(random_sae(1), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def fail_to_save(ranks: Ranks, folder: Path) -> list[str]:
    """What is said where the first rank cannot write, the only one that writes."""
    sae = own_part(1, ranks)
    tempfile.tempdir = str(folder)
    said: list[str] = []
    for output in (folder / "sae", folder / "file"):
        is_limited = ranks.rank == 0 and output.name == "sae"
        limit = 4096 if is_limited else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as caught:
            write_sae_somewhere(sae, lm_config(sae.cfg), output, sparsity_of(sae))
        said.append(str(caught.value))
    return said


def test_what_one_rank_cannot_write_is_an_error_of_all(tmp_path: Path):
    write(random_sae(2), tmp_path / "sae")
    (tmp_path / "file").write_text("no folder")
    before = {f.name: f.read_bytes() for f in (tmp_path / "sae").iterdir()}
    first, *others = on_ranks(3, fail_to_save, tmp_path)
    assert others == [first, first]
    assert (
        f"the SAE cannot be written to '{tmp_path / 'sae'}': File too large." in first
    )
    assert {f.name: f.read_bytes() for f in (tmp_path / "sae").iterdir()} == before
    (elsewhere,) = tmp_path.glob("sae-lens-alloc-*")
    assert f"it is saved in '{elsewhere}' instead" in first[1]
    write(random_sae(1), tmp_path / "whole")
    saved = (f / SAE_WEIGHTS_FILENAME for f in (elsewhere, tmp_path / "whole"))
    assert len({path.read_bytes() for path in saved}) == 1


class Peak:
    """The most memory that is no file's, in bytes beyond what there was before."""

    def __enter__(self) -> "Peak":
        self._before = self.bytes = _anonymous_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._ends = threading.Event()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.is_set():
            self.bytes = max(self.bytes, _anonymous_bytes())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.bytes -= self._before


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


D_IN, D_SAE, BLOCK = 128, 2**17 + 1, 2**21


def peaks_of(ranks: Ranks, folder: Path) -> dict[str, int]:
    """Memory beyond its features that a rank takes to save 128 MiB and to read them."""
    gathered_weights.BLOCK_BYTES = stored_tensors.BLOCK_BYTES = BLOCK
    cfg = MutualChoiceTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=2, feature_choice_steps=0, aux_loss="none"
    )
    sae: Any = new_shard(cfg, FeatureShard(cfg.d_sae, ranks))
    found: dict[str, int] = {}
    write(own_part(1, ranks), folder / "small")  # what comes with a first time
    with Peak() as peak:
        write_sae(sae, lm_config(cfg), folder / "sae", None)
    found["final"] = peak.bytes
    tensors: Any = {
        "W": stored_tensors.FeatureRows(sae.W_enc.data.T, sae.shard),
        "b": stored_tensors.FeatureRows(sae.b_enc.data, sae.shard),
    }
    with Peak() as peak:
        stored_tensors.write_stored_tensors(folder / "stored", tensors, ranks)
    found["write"] = peak.bytes
    with Peak() as peak:
        stored_tensors.read_stored_tensors(folder / "stored", tensors)
    found["read"] = peak.bytes
    return found


def test_saving_takes_no_more_than_a_few_blocks_beyond_the_own_features(tmp_path: Path):
    for found in on_ranks(2, peaks_of, tmp_path):
        # a second copy of the own weights would be 64 MiB, and all of them 128
        assert max(found.values()) < 12 * BLOCK, found
    size = (tmp_path / "sae" / SAE_WEIGHTS_FILENAME).stat().st_size
    assert size > 2 * D_IN * D_SAE * 4
    assert SAE.load_from_disk(tmp_path / "sae").cfg.d_sae == D_SAE


def test_one_process_alone_gathers_nothing(tmp_path: Path):
    sae = random_sae(4)
    assert sae.shard.ranks is ALONE
    write(sae, tmp_path / "sae")
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == sorted(FILES)
