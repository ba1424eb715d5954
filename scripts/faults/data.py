"""
Trains on odd texts, with too little of them, resumed with other settings, and interrupted, and
counts what comes of it.

    python -m scripts.faults.data --output faults_data.json

Every case is a fork of this process in a folder of its own, with an alarm. A good outcome is one
sentence, or a run in which every split is kept apart and every setting has its effect.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # read where they are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"

import torch  # noqa: E402

from scripts.faults.forks import Case, outcome  # noqa: E402
from scripts.faults.interrupted import interrupted  # noqa: E402
from scripts.faults.older_run import make_template  # noqa: E402
from scripts.faults.resumed import resumed  # noqa: E402
from scripts.faults.splits import splits  # noqa: E402
from scripts.faults.texts import texts  # noqa: E402

BAD = ("traceback", "endless", "leak", "ignored")


def cases() -> Iterator[Case]:
    yield from texts()
    yield from splits()
    yield from resumed()
    yield from interrupted()


def kind(what: str, details: str) -> str:
    """`forks.outcome`'s answer as one of what is counted: a check names its own kind."""
    if what == "loss":
        return details.split(":")[0]
    return "refused" if what == "ok" and details.startswith("error: ") else what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("faults_data.json"))
    parser.add_argument(
        "--only", nargs="*", default=[""], help="cases whose name holds one of these"
    )
    args = parser.parse_args()
    output = args.output.absolute()
    torch.set_num_threads(1)
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        make_template(base / "template")
        for number, case in enumerate(cases()):
            if not any(part in case.name for part in args.only):
                continue
            folder = base / str(number)
            shutil.copytree(base / "template", folder)
            what, details = outcome(case, folder)
            found = kind(what, details)
            results[case.name] = {"outcome": found, "details": details}
            print(f"{found:<10} {case.name}: {details[-300:]}", flush=True)
            os.chdir(base)
            shutil.rmtree(folder, ignore_errors=True)
    counted = Counter(result["outcome"] for result in results.values())
    counts = {key: counted[key] for key in ("refused", "ok", *BAD)}
    print(counts)
    output.write_text(json.dumps({"counts": counts, "cases": results}, indent=1) + "\n")
    sys.exit(counts["refused"] + counts["ok"] != len(results))


if __name__ == "__main__":
    main()
