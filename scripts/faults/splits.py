"""Texts that are shorter than what is asked of them: no split may hold what another holds."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import sae_lens_alloc_cli as cli
from sae_lens_alloc.activations import on_text
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.training.fine_tuning_run import FineTuningRunner
from scripts.faults.forks import Action, Case
from scripts.faults.older_run import finetune, train
from scripts.faults.texts import short_texts, write

LEAK = "LEAK"


def splits() -> Iterator[Case]:
    for n in (1, 3, 5, 10, 20):
        prepare = partial(write, short_texts(n))
        settings = ("dataset_path=data", "output_path=new", "context_size=64")
        for tokens in (2048, 40_960):
            length = f"training_tokens={tokens}"
            yield Case(
                f"train on {n} texts, {tokens} tokens",
                watched(train(*settings, length)),
                prepare,
                no_leak,
            )
            yield Case(
                f"finetune on {n} texts, {tokens} tokens",
                watched(
                    finetune(*settings, "--from", "out", length, "checkpoint_path=null")
                ),
                prepare,
                no_leak,
            )
        for tokens in (256, 4_000, 400_000):
            args = ["calibrate", "out", "--output", "new", "--dataset", "data"]
            yield Case(
                f"calibrate on {n} texts, {tokens} tokens",
                watched_halves([*args, "--tokens", str(tokens)]),
                prepare,
                no_leak,
            )


def watched(command: list[str]) -> Action:
    """A training that tells whether it trains on contexts that it has set apart."""

    def act() -> None:
        apart: list[tuple[int, ...]] = []
        served: list[tuple[int, ...]] = []
        read = ResumableActivationsStore.get_batch_tokens
        hold_out = ResumableActivationsStore.hold_out
        init = FineTuningRunner.__init__

        def reading(store: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = read(store, *args, **kwargs)
            served.extend(map(tuple, tokens.tolist()))
            return tokens

        def holding_out(store: Any, n_tokens: int) -> Any:
            taken = hold_out(store, n_tokens)
            apart.extend(served)
            served.clear()
            return taken

        def starting(runner: Any, *args: Any, **kwargs: Any) -> None:
            init(runner, *args, **kwargs)
            apart.extend(map(tuple, runner.evaluation_contexts.tolist()))

        ResumableActivationsStore.get_batch_tokens = reading  # type: ignore[method-assign]
        ResumableActivationsStore.hold_out = holding_out  # type: ignore[method-assign]
        FineTuningRunner.__init__ = starting  # type: ignore[method-assign]
        try:
            cli.app(command)
        finally:
            n = len(set(apart) & set(served))
            print(f"{LEAK if n else 'clean'}: {n} of {len(set(apart))}")

    return act


def watched_halves(command: list[str]) -> Action:
    """A calibration that tells whether a token is in both of its halves."""

    def act() -> None:
        gather = on_text.gather_activations

        def gathering(cfg: Any, n_tokens: int) -> Any:
            x = gather(cfg, n_tokens)
            rows = [tuple(row) for row in x.tolist()]
            half = len(rows) // 2
            # the same few words may stand at the beginning of two contexts
            n = len(set(rows[:half]) & set(rows[half:]))
            print(f"{LEAK if n > half // 10 else 'clean'}: {n} of {half}")
            return x

        on_text.gather_activations = gathering
        cli.app(command)

    return act


def no_leak(code: int, said: str) -> str | None:
    if LEAK in said:
        return f"leaked: {said[said.find(LEAK) :].splitlines()[0]}"
    if code not in (0, 1) or (code == 1 and "error: " not in said):
        return f"traceback: {said[-500:]}"
    return None
