"""`sae-lens-alloc run`: runs a Python module with our architectures registered."""

import importlib.util
import os
import runpy
import sys
import warnings
from typing import Annotated

import typer


def run(
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="For example sae_lens.evals.")
    ],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="ARG", help="Its arguments.")
    ] = None,
) -> None:
    """
    Run a Python module, as `python -m` does, with our architectures registered in SAELens.

    \b
    Example:
      sae-lens-alloc run -- sae_lens.llm_sae_training_runner --architecture mutual_choice --k 32
    """
    from sae_lens_alloc_cli.endings import one_sentence_errors

    importlib.import_module("sae_lens_alloc")  # registers the architectures
    sys.path.insert(0, os.getcwd())
    with one_sentence_errors():
        _require_runnable(module)
    sys.argv = [module, *(args or [])]
    # runpy warns that sae_lens imported the module already; `python -m` would, too
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _require_runnable(module: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(f"there is no module {module!r} that can be run.")
