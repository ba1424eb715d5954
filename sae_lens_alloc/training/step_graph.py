"""A training step recorded once and then replayed as a whole: a CUDA graph."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_alloc.compat import has_hooks
from sae_lens_alloc.ops.backend import uses_triton
from sae_lens_alloc.ops.pair_autoencoder import GradientMemory
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.backend_trial import settle_backend
from sae_lens_alloc.saes.step_plan import StepPlan

# Steps with the same launches before one is recorded. In these, kernels are compiled and the guesses of
# the selection become good.
STEPS_BEFORE_RECORDING = 3


class Recording(Protocol):
    """What a step needs of `torch.cuda.CUDAGraph`, so that tests can record on a CPU."""

    def recording(self) -> AbstractContextManager[None]:
        """Within it, operations on the device are recorded and not run."""
        ...

    def replay(self) -> None:
        """Runs the recorded operations on the same tensors."""
        ...


class CudaGraph:
    """A CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def recording(self) -> Iterator[None]:
        torch.cuda.synchronize()
        # other threads of this process may ask the device for something meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True)
class RecordedStep:
    """
    A training step that can be replayed.

    Args:
        recording: The forward pass, the backward pass and the clipping of the gradients.
        sae_in: The batch that the step reads, shape (B, d_in), to be filled before each replay.
        output: Output of the step, which each replay overwrites.
        gradients: Gradient of each parameter, which each replay overwrites.
        requirements: Conditions on tensors of the step, each with the message if it fails.
    """

    recording: Recording
    sae_in: torch.Tensor
    output: TrainStepOutput
    gradients: Sequence[torch.Tensor | None]
    requirements: Sequence[tuple[torch.Tensor, str]]


def without_graph(output: TrainStepOutput) -> TrainStepOutput:
    """
    The same output, which no gradient goes through. Whoever keeps an output of autograd keeps the nodes that
    add up the gradients of the parameters, and those belong to the stream on which they were made: a later
    step cannot be recorded on another one.
    """
    return replace(
        output,
        sae_out=output.sae_out.detach(),
        feature_acts=output.feature_acts.detach(),
        hidden_pre=output.hidden_pre.detach(),
        loss=output.loss.detach(),
        losses={name: loss.detach() for name, loss in output.losses.items()},
    )


class StepGraph:
    """
    Runs the forward and backward passes of an SAE's training steps. If steps have the same
    plan, one is recorded, and later ones are replayed with the same numbers. Where the plan
    changes from step to step, as while the budget falls, steps run without a recording. If
    nothing can be recorded at all, the log says why.
    """

    def __init__(
        self,
        sae: AllocationTrainingSAE[Any],
        clip: Callable[[], object],
        autocast: AbstractContextManager[Any],
        make_recording: Callable[[], Recording] = CudaGraph,
    ) -> None:
        """
        Args:
            sae: The SAE.
            clip: Clips its gradients.
            autocast: Context in which its forward pass runs.
            make_recording: Makes an empty recording.
        """
        self._sae = sae
        self._clip = clip
        self._autocast = autocast
        self._make_recording = make_recording
        self._recorded: RecordedStep | None = None
        self._key: object = None
        self._seen: Counter[object] = Counter()
        self._failure: str | None = None
        self._reason: str | None = None

    @property
    def why_not_recorded(self) -> str | None:
        """Why the last step was neither recorded nor replayed, None if it was."""
        if self._reason is not None or self._recorded is not None:
            return self._reason
        return self._failure or (
            f"no {STEPS_BEFORE_RECORDING + 1} steps in a row had the same rule and budget"
        )

    def forward_and_backward(self, step_input: TrainStepInput) -> TrainStepOutput:
        """
        Runs a step up to the clipped gradients of the parameters. The next step may overwrite
        the output.
        """
        sae = self._sae
        settle_backend(sae, sae._training_step, step_input)
        reason = self._why_not(step_input.sae_in)
        if reason is not None and reason != self._reason:
            logger.warning(f"cuda_graph is off: {reason}.")
        self._reason = reason
        if reason is not None:
            with self._autocast:
                output = sae.training_forward_pass(step_input)
            return self._backward(output)
        sae.checks.report()
        plan = sae.plan_step(step_input)
        key = (replace(plan, step=0), step_input.sae_in.shape, step_input.sae_in.dtype)
        if key != self._key:
            self._recorded, self._key = None, key
            self._seen.clear()
        self._seen[key] += 1
        if self._recorded is None and self._seen[key] > STEPS_BEFORE_RECORDING:
            try:
                self._recorded = self._record(step_input.sae_in, plan)
            except Exception as error:  # any operation may refuse to be recorded
                first_line = str(error).strip().partition("\n")[0]
                self._failure = f"the step cannot be recorded ({first_line})"
        if self._recorded is None:
            return self._take(step_input.sae_in, plan)
        return self._replay(self._recorded, step_input.sae_in, plan)

    def _take(self, sae_in: torch.Tensor, plan: StepPlan) -> TrainStepOutput:
        with self._autocast:
            output = self._sae.take_step(sae_in, plan.step, lambda: plan)
        return self._backward(output)

    def _backward(self, output: TrainStepOutput) -> TrainStepOutput:
        output.loss.backward()
        self._clip()
        return without_graph(output)

    def _record(self, sae_in: torch.Tensor, plan: StepPlan) -> RecordedStep:
        sae, recording = self._sae, self._make_recording()
        batch = sae_in.clone()
        # the recorded gradients have memory of their own
        memory, sae.gradient_memory = sae.gradient_memory, GradientMemory()
        try:
            with sae.checks.recorded() as requirements, recording.recording():
                output = self._take(batch, plan)
        finally:
            sae.gradient_memory = memory
            gradients = [parameter.grad for parameter in sae.parameters()]
            sae.zero_grad()
        return RecordedStep(recording, batch, output, gradients, requirements)

    def _replay(
        self, recorded: RecordedStep, sae_in: torch.Tensor, plan: StepPlan
    ) -> TrainStepOutput:
        recorded.sae_in.copy_(sae_in)
        recorded.recording.replay()
        for parameter, gradient in zip(
            self._sae.parameters(), recorded.gradients, strict=True
        ):
            parameter.grad = gradient
        for met, message in recorded.requirements:
            self._sae.checks.require(met, message, plan.step)
        return recorded.output

    def _why_not(self, sae_in: torch.Tensor) -> str | None:
        """Why nothing can be recorded, None if a step can be recorded."""
        hooked = [name for name, hook in self._sae.hook_dict.items() if has_hooks(hook)]
        if hooked:
            return f"{hooked[0]} has hooks, which run on the host"
        if not uses_triton(sae_in.device):
            return "the kernels of this backend make the host wait, and only Triton's do not"
        if self._sae.gradient_memory.rows is not None:
            return "row_sparse_adam waits for the device to say which features were selected"
        return self._failure
