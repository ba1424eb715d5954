"""Counts per group, and every test that passes with SAELens' classes but not with ours, with its reason."""

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

LISTS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "differences.yaml").read_text()
)
Outcomes = dict[str, tuple[str, str]]


def version_of(checkout: Path) -> str:
    lines = (checkout / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version"))


def reason_for(test: str, group: str) -> str | None:
    """The name of the deliberate difference that a test meets, None if there is none."""
    for name, difference in LISTS["differences"].items():
        if group in difference["groups"] and any(
            part in test for part in difference["tests"]
        ):
            return name
    return None


def compared(group: str, ours: Outcomes, passing: set[str]) -> dict[str, Any]:
    """Counts of a group, and the failures that nothing explains with their first line."""
    failed = sorted(t for t in passing if ours.get(t, ("missing", ""))[0] != "passed")
    reasons = {test: reason_for(test, group) for test in failed}
    return {
        "passed": len(passing) - len(failed),
        "of": len(passing),
        "differences": dict(Counter(r for r in reasons.values() if r is not None)),
        "unexplained": {
            test: ours.get(test, ("missing", "not collected"))[1]
            for test, reason in reasons.items()
            if reason is None
        },
    }


def counts(report: dict[str, Any]) -> str:
    """Markdown: what was run, and the counts of each group."""
    stock = report["stock"]
    lines = [
        f"The tests of SAELens {report['tests_of_sae_lens']}, run with SAELens "
        f"{report['sae_lens']}. With SAELens' own classes, {stock['passed']} of "
        f"{sum(stock.values())} tests pass, {stock['failed']} fail and {stock['skipped']} are skipped.",
        "",
        "| group | pass | of | deliberate differences | unexplained |",
        "|---|---|---|---|---|",
    ]
    for name, group in report["groups"].items():
        deliberate = sum(group["differences"].values())
        lines.append(
            f"| `{name}` | {group['passed']} | {group['of']} | {deliberate} "
            f"| {len(group['unexplained'])} |"
        )
    return "\n".join(lines)


def differences(report: dict[str, Any]) -> str:
    """Markdown: each deliberate difference with its reason, and how many tests meet it."""
    lines = ["| difference | tests | reason |", "|---|---|---|"]
    for name, difference in LISTS["differences"].items():
        met = [
            f"{group} {report['groups'][group]['differences'].get(name, 0)}"
            for group in difference["groups"]
        ]
        reason = " ".join(difference["reason"].split())
        title = name.replace("_", " ")
        lines.append(f"| {title} | {', '.join(met)} | {reason} |")
    return "\n".join(lines)


def main(work: Path, results: Path, checkout: Path) -> int:
    outcomes: dict[str, Outcomes] = {
        file.stem: json.loads(file.read_text()) for file in work.glob("*.json")
    }
    stock = outcomes.pop("stock")
    counts = Counter(outcome for outcome, _ in stock.values())
    passing = {test for test, (outcome, _) in stock.items() if outcome == "passed"}
    report: dict[str, Any] = {
        "tests_of_sae_lens": version_of(checkout),
        "sae_lens": version("sae-lens"),
        "stock": dict(counts),
        "groups": {
            group: compared(group, ours, passing)
            for group, ours in sorted(outcomes.items())
        },
    }
    print(json.dumps(report, indent=2))
    if results != Path("/dev/null"):
        results.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(group["unexplained"] for group in report["groups"].values()))


if __name__ == "__main__":
    if sys.argv[1] == "--files":
        print("\n".join(LISTS["files"]))
    else:
        sys.exit(main(*(Path(argument) for argument in sys.argv[1:4])))
