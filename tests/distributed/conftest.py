from tests.training.conftest import demo_model

__all__ = ["demo_model"]
