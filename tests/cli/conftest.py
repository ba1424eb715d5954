"""What tests of several commands share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_lens_alloc.training import runner as runner_module
from tests.cli.commands import train


@pytest.fixture(scope="module")
def few_calibration_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "CALIBRATION_TOKENS", 1024)
        yield


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, few_calibration_tokens: None
) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sae"
    assert train(folder).exit_code == 0
    return folder
