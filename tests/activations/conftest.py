from tests.helpers import one_thread
from tests.training.conftest import (
    demo_model,
    demo_text,
    few_calibration_tokens,
    restore_signals,
)

__all__ = [
    "demo_model",
    "demo_text",
    "few_calibration_tokens",
    "one_thread",
    "restore_signals",
]
