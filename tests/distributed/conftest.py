from pathlib import Path

import pytest

from tests.training.conftest import demo_model

__all__ = ["demo_model"]

# Of one process each; the others start several.
FAST = ("test_feature_shard",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.stem not in FAST:
            item.add_marker(pytest.mark.slow)
