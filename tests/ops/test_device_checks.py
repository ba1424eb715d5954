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
    checks.require(MET, "is met", 7)
    with pytest.raises(ValueError, match="^is not$"):
        checks.require(UNMET, "is not", 7)
    checks.report()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("wait", [True, False])
def test_the_first_unmet_requirement_is_reported_later_and_once(wait: bool):
    checks = DeviceChecks()
    for met, message in [(MET, "a"), (UNMET, "b"), (UNMET, "c"), (MET, "d")]:
        checks.require(met, message, 7)
    with pytest.raises(ValueError, match="^b$"):
        checks.report(wait)
    checks.report(wait)


@pytest.mark.usefixtures("late")
def test_what_is_required_is_the_value_at_that_time():
    checks, met = DeviceChecks(), torch.tensor(True)
    checks.require(met, "is met", 7)
    met.fill_(False)
    checks.report()


def test_a_message_names_the_step():
    with pytest.raises(ValueError, match="^NaN at step 7$"):
        DeviceChecks().require(UNMET, "NaN at step {step}", 7)


def test_recorded_requirements_are_checked_by_nobody():
    checks = DeviceChecks()
    with checks.recorded() as recorded:
        checks.require(UNMET, "is not at {step}", 7)
    assert recorded == [(UNMET, "is not at {step}")]
    checks.report(wait=True)
    with pytest.raises(ValueError, match="^is not at 8$"):
        checks.require(*recorded[0], 8)


@pytest.mark.usefixtures("late")
def test_copies_start_with_nothing_pending():
    checks = DeviceChecks()
    checks.require(UNMET, "is not", 7)
    copy.deepcopy(checks).report()
