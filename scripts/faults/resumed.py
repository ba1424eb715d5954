"""Resuming with settings that the run did not have: they take effect, or are refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path

from scripts.faults.forks import Case, Check
from scripts.faults.older_run import OLD_CHECKPOINT, train

# Of the older run, which is resumed at step 21 of 40.
REFUSED = {
    "seed": "7",
    "hook_name": "transformer.h.1",
    "dataset_path": "data",
    "context_size": "64",
    "train_batch_size_tokens": "128",
    "store_batch_size_prompts": "8",
    "n_batches_in_buffer": "8",
    "activations_mixing_fraction": "0",
    "adam_beta1": "0.5",
    "adam_beta2": "0.9",
    "autocast": "true",
    "feature_sampling_window": "7",
    "exclude_special_tokens": "false",
    "prepend_bos": "false",
    "seqpos_slice": "[3, 200]",
    "disable_concat_sequences": "true",
    "n_batches_for_norm_estimate": "7",
    "sae.k": "5",
    "sae.d_sae": "128",
    "sae.selection_margin": "0.5",
    "sae.aux_loss": "none",
    "sae.aux_loss_coefficient": "0.5",
    "sae.rescale_acts_by_decoder_norm": "false",
    "sae.apply_b_dec_to_input": "false",
    "sae.normalize_activations": "layer_norm",
    "sae.feature_choice_steps": "3",
    "sae.density_window_tokens": "1000",
    "sae.dtype": "float64",
}
TAKES_EFFECT = {
    "training_tokens": 20_480,
    "lr": 0.0005,
    "lr_warm_up_steps": 3,
    "lr_decay_steps": 0,
    "lr_scheduler_name": "cosineannealing",
    "dead_feature_window": 7,
    "n_checkpoints": 3,
    "prefetch_llm_batches": 2,
    "streaming": False,
    "verbose": False,
}


def resumed() -> Iterator[Case]:
    def command(*settings: str) -> list[str]:
        # 40 steps as before, unless a setting says otherwise
        length = ("training_tokens=10240", "output_path=new")
        return train(*length, f"resume_from_checkpoint={OLD_CHECKPOINT}", *settings)

    for key, value in REFUSED.items():
        yield Case(
            f"resumed with {key}",
            command(f"{key}={value}"),
            lambda: Path("data").symlink_to("out"),
            refused_by_name(key),
        )
    for key, value in TAKES_EFFECT.items():
        yield Case(
            f"resumed with {key}",
            command(f"{key}={json.dumps(value)}"),
            check=recorded(key, value),
        )
    other = '{"step": 0, "metrics/l0": 1}\n'

    def metrics() -> None:
        Path("new").mkdir()
        Path("new/metrics.jsonl").write_text(other)

    def kept(code: int, said: str) -> str | None:
        mixed = Path("new/metrics.jsonl").read_text() != other
        return "ignored: metrics of two runs" if mixed or code == 0 else None

    yield Case("resumed beside another run's metrics", command(), metrics, kept)


def refused_by_name(key: str) -> Check:
    def check(code: int, said: str) -> str | None:
        if code == 0:
            return f"ignored: {key}"
        name = key.removeprefix("sae.")
        return None if f"{name} " in said else f"traceback: {said[-500:]}"

    return check


def recorded(key: str, value: object) -> Check:
    def check(code: int, said: str) -> str | None:
        if code != 0:
            return f"traceback: {said[-500:]}"
        found = json.loads(Path("new/runner_cfg.json").read_text())
        if found[key] != value:
            return f"ignored: {key} is recorded as {found[key]}"
        rows = [
            json.loads(x) for x in Path("new/metrics.jsonl").read_text().splitlines()
        ]
        rates = [row["details/current_learning_rate"] for row in rows]
        steps = found["training_tokens"] // found["train_batch_size_tokens"]
        if len(rates) != steps - 21:
            return f"ignored: {len(rates)} steps"
        # a row tells the rate of the next step, and after the last one there is none
        return None if min(rates[:-1]) > 0 else "ignored: a learning rate of 0"

    return check
