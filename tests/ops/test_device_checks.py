import copy

import pytest
import torch

from sae_lens_alloc.ops import device_checks
from sae_lens_alloc.ops.device_checks import DeviceChecks

MET, UNMET = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whatever the device."""
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005


def test_an_unmet_requirement_on_the_cpu_is_reported_at_once():
    checks = DeviceChecks()
    checks.require(MET, "is met")
    with pytest.raises(ValueError, match="^is not$"):
        checks.require(UNMET, "is not")
    checks.report()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("wait", [True, False])
def test_the_first_unmet_requirement_is_reported_later_and_once(wait: bool):
    checks = DeviceChecks()
    for met, message in [(MET, "a"), (UNMET, "b"), (UNMET, "c"), (MET, "d")]:
        checks.require(met, message)
    with pytest.raises(ValueError, match="^b$"):
        checks.report(wait)
    checks.report(wait)


@pytest.mark.usefixtures("late")
def test_what_is_required_is_the_value_at_that_time():
    checks, met = DeviceChecks(), torch.tensor(True)
    checks.require(met, "is met")
    met.fill_(False)
    checks.report()


@pytest.mark.usefixtures("late")
def test_copies_start_with_nothing_pending():
    checks = DeviceChecks()
    checks.require(UNMET, "is not")
    copy.deepcopy(checks).report()
