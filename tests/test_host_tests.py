"""What scripts/host_tests.sh makes of the outcomes of SAELens' tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.host_tests import compare

DIFFERENCES = {"names": {"groups": ["ours"], "tests": ["test_name"], "reason": "why"}}


def test_failures_are_deliberate_or_unexplained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(compare.LISTS, "differences", DIFFERENCES)
    outcomes: dict[str, dict[str, Any]] = {
        "stock": {
            "a::test_1": ("passed", ""),
            "a::test_name[x]": ("passed", ""),
            "a::test_2": ("passed", ""),
            "a::test_3": ("failed", "older than the installed SAELens"),
            "a::test_4": ("skipped", ""),
        },
        "ours": {
            "a::test_1": ("passed", ""),
            "a::test_name[x]": ("failed", "another name"),
            "a::test_2": ("failed", "wrong"),
            "a::test_3": ("failed", ""),
        },
        # not the group of the difference, and one test was not collected
        "others": {"a::test_1": ("passed", ""), "a::test_name[x]": ("failed", "name")},
    }
    for group, found in outcomes.items():
        (tmp_path / f"{group}.json").write_text(json.dumps(found))
    (tmp_path / "pyproject.toml").write_text('[tool]\nversion = "6.0.1"\n')
    code = compare.main(tmp_path, tmp_path / "results", tmp_path)
    report = json.loads((tmp_path / "results").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["tests_of_sae_lens"] == "6.0.1"
    assert report["stock"] == {"passed": 3, "failed": 1, "skipped": 1}
    assert report["groups"] == {
        "ours": {
            "passed": 1,
            "of": 3,
            "differences": {"names": 1},
            "unexplained": {"a::test_2": "wrong"},
        },
        "others": {
            "passed": 1,
            "of": 3,
            "differences": {},
            "unexplained": {"a::test_2": "not collected", "a::test_name[x]": "name"},
        },
    }
    assert code == 1


def test_every_difference_has_groups_tests_and_a_reason():
    for name, difference in compare.LISTS["differences"].items():
        assert set(difference) == {"groups", "tests", "reason"}, name
        assert set(difference["groups"]) <= {
            "mutual_choice",
            "feature_choice",
            "aux_zipf",
            "runner",
        }
