"""What ranks send in a step, counted where it is sent, against the formula of the documents."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from sae_lens_alloc.distributed import ranks as ranks_module
from sae_lens_alloc.distributed.cost import Message, Step, bytes_per_step, messages
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from tests.distributed.processes import on_ranks
from tests.distributed.test_training_over_ranks import (
    D_IN,
    D_SAE,
    N_TOKENS,
    SETTINGS,
    Run,
    as_the_run_says,
    batches,
    new_sae,
    trainer_config,
)

# When each rule has begun where it will. Flags are renewed at the first of the two.
STEPS_COUNTED = (10, 15)
STEPS: dict[str, Step] = {
    "mutual_choice": Step(N_TOKENS, D_IN, D_SAE, k_aux=4),
    "feature_choice": Step(N_TOKENS, D_IN, D_SAE, rule="feature", k_aux=4),
    "nested": Step(N_TOKENS, D_IN, D_SAE, k_aux=4, n_inner_levels=2),
    "plain": Step(N_TOKENS, D_IN, D_SAE, has_margin=False),
    "transcoder": Step(N_TOKENS, 7, D_SAE, k_aux=4, subtracts_b_dec=False, d_out=5),
    "raw": Step(N_TOKENS, D_IN, D_SAE, k_aux=3, subtracts_b_dec=False),
}


def sent_in_two_steps(ranks: Ranks, name: str) -> list[dict[str, float]]:
    """Bytes of tensors given to torch.distributed in each step, by operation."""
    counted = [Counter[str]() for _ in range(STEPS_COUNTED[-1] + 1)]
    running = 0

    def counting(kind: str, send: Any, place: int) -> Any:
        def sends(*args: Any, **kwargs: Any) -> Any:
            counted[running][kind] += args[place].nbytes
            return send(*args, **kwargs)

        return sends

    with pytest.MonkeyPatch.context() as patch, as_the_run_says(Run(name)):
        patch.setattr(dist, "all_reduce", counting("sum", dist.all_reduce, 0))
        gather = counting("gather", ranks_module._all_gather, 1)
        patch.setattr(ranks_module, "_all_gather", gather)
        trainer = ShardedSAETrainer(
            trainer_config(Run(name)), new_sae(name, ranks), batches()
        )
        for running in range(len(counted)):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
    return [dict(counted[step]) for step in STEPS_COUNTED]


def sent_in_steps(ranks: Ranks) -> dict[str, list[dict[str, float]]]:
    return {name: sent_in_two_steps(ranks, name) for name in STEPS}


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_send_what_the_formula_says(n_ranks: int):
    for found in on_ranks(n_ranks, sent_in_steps):
        for name, step in STEPS.items():
            aux_loss = SETTINGS[name].get("aux_loss", "aux_zipf")
            step = replace(step, fits_law=aux_loss == "aux_zipf")
            renewal = replace(step, renews_flags=aux_loss != "none")
            for counted, of_step in zip(found[name], (renewal, step), strict=True):
                expected = Counter[str]()
                for message in messages(of_step, n_ranks):
                    if message.what != "activations":  # which the data provider sends
                        expected[message.kind] += message.n_bytes
                assert counted == dict(expected), name


def test_a_ring_by_hand():
    # a sum goes around twice, in n parts; of a gather each passes on what all others gave
    assert Message("", "sum", 800).sent(4) == 2 * 3 * 200
    assert Message("", "gather", 100).sent(4) == 3 * 100
    assert Message("", "sum", 800).sent(1) == Message("", "gather", 800).sent(1) == 0


def test_nothing_of_the_size_of_the_weights_is_sent():
    narrow, wide = (Step(2048, 768, f, k_aux=32) for f in (2**16, 2**24))
    weights = 2 * 768 * 2**24 * 4
    for n_ranks in (2, 8, 64):
        assert bytes_per_step(wide, n_ranks) < weights / 1000
        # eight more bits of a position
        assert bytes_per_step(wide, n_ranks) - bytes_per_step(narrow, n_ranks) < 1e5
