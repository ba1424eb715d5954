from tests.helpers import one_thread
from tests.ops.conftest import backend

__all__ = ["backend", "one_thread"]
