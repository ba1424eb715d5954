"""What tests of files of runs share."""

from pathlib import Path

import pytest

from tests.config.run_files import MINIMAL


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path
