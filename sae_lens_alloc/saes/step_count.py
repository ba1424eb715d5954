"""
The number of a training step.

Steps count from 0, and step n is the one that a trainer takes after n others: its
`n_training_steps` while it runs. Rules, budgets, flags and log rows go by that number. A checkpoint
that is saved between two steps should therefore count the steps that it holds.

SAELens saves the checkpoints on the way before it counts the step that is done. So a trainer that
resumes from one counts one behind. That is put right in two places, for two kinds of trainer:
`AllocSAETrainer` counts the step before it saves, which puts its logs and its learning rate right
as well; and the SAE keeps a count of its own, `n_steps`, with which it corrects SAELens' own
trainers, here.
"""

from dataclasses import dataclass

from sae_lens_alloc.saes.running_statistics import Derived, RunningStatistics


@dataclass
class _Counted:
    """
    Args:
        offset: By how much the trainer is behind, None before it has said where it is.
        running: The number of the running step or the last one, None before the first.
    """

    offset: int | None = None
    running: int | None = None


class StepCount:
    """
    Numbers the training steps of an SAE, whose count the statistics carry over a checkpoint.

    Args:
        statistics: The statistics; `n_steps` is the count.

    Attributes:
        continues: Whether the last call was another part of the step of the call before it.
    """

    def __init__(self, statistics: RunningStatistics) -> None:
        self._statistics = statistics
        self._counted = Derived(statistics, _Counted)
        self.continues = False

    def begin(self, n_training_steps: int) -> int:
        """
        The number of this training step.

        A trainer that says a number above 0 and below the SAE's own count is behind by the
        difference, and from there on the SAE's count holds. A trainer that starts at 0 starts
        the schedules anew.

        A step is all the calls in a row with the same `n_training_steps`: more than one where
        gradients are accumulated over parts of a batch. `continues` is true from the second of
        them on. What happens once a step, such as a change of rule, happens at the first;
        running statistics are, after each call, what one call with all the tokens of the step
        so far would have made of them.

        Args:
            n_training_steps: The number of steps done, by the trainer's count.
        """
        counted, n_steps = self._counted.get(), self._statistics.n_steps
        if counted.offset is None:
            behind = int(n_steps) - n_training_steps
            counted.offset = behind if n_training_steps > 0 and behind > 0 else 0
        step = n_training_steps + counted.offset
        self.continues = step == counted.running
        counted.running = step
        n_steps.fill_(step + 1)
        return step

    @property
    def running(self) -> int | None:
        """The number of the last step that began here, None before the first one."""
        return self._counted.get().running

    @property
    def last(self) -> int:
        """The number of the last training step, also of one before a checkpoint; 0 before any."""
        return max(int(self._statistics.n_steps) - 1, 0)
