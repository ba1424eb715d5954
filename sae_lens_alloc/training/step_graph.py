"""A training step recorded once and then replayed as a whole: a CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_alloc.compat import has_hooks
from sae_lens_alloc.ops.backend import uses_triton
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
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
        current = torch.cuda.current_stream()
        try:
            # torch's own stream for this may be another device's; other threads of this process
            # may ask the device for something meanwhile
            with torch.cuda.graph(
                self._graph,
                stream=torch.cuda.Stream(),
                capture_error_mode="thread_local",
            ):
                yield
        finally:
            # where torch cannot end a recording, it leaves the process on its stream
            torch.cuda.set_stream(current)

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
    changes from step to step, as while the budget falls, steps run without a recording. Where
    recording fails, the log says so once, and training goes on without it.
    """

    def __init__(
        self,
        sae: AllocationTrainingSAE[Any],
        clip: Callable[[], object],
        autocast: AbstractContextManager[Any],
        make_recording: Callable[[], Recording] = CudaGraph,
        says_why_not: bool = False,
    ) -> None:
        """
        Args:
            sae: The SAE.
            clip: Clips its gradients.
            autocast: Context in which its forward pass runs.
            make_recording: Makes an empty recording.
            says_why_not: Whether the log also says why nothing is recorded where that is known
                beforehand.
        """
        self._sae = sae
        self._clip = clip
        self._autocast = autocast
        self._make_recording = make_recording
        self._says_why_not = says_why_not
        self._recorded: RecordedStep | None = None
        self._key: object = None
        self._n_seen = 0
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
        with self._autocast:
            sae.before_step(step_input)
        if not self._can_record(step_input.sae_in):
            self._recorded = None
            with self._autocast:
                output = sae.training_forward_pass(step_input)
            return self._backward(output)
        sae.checks.report()
        plan = sae.plan_step(step_input)
        key = (
            replace(plan, step=0),
            step_input.sae_in.shape,
            step_input.sae_in.dtype,
            self._addresses(),
        )
        if key != self._key:
            self._recorded, self._key, self._n_seen = None, key, 0
        self._n_seen += 1
        # of the parts of a batch, each adds to what the host remembers of those before it
        if self._n_seen > STEPS_BEFORE_RECORDING and not plan.continues:
            self._recorded = self._recorded or self._try_to_record(step_input, plan)
        if self._recorded is None:
            return self._take(step_input.sae_in, plan)
        return self._replay(self._recorded, step_input.sae_in, plan)

    def _can_record(self, sae_in: torch.Tensor) -> bool:
        reason = self._why_not(sae_in)
        is_new = reason is not None and reason != self._reason
        if is_new and (self._says_why_not or reason == self._failure):
            logger.warning(f"cuda_graph is off: {reason}.")
        self._reason = reason
        return reason is None

    def _addresses(self) -> tuple[int, ...]:
        """Where a recording reads and writes: whoever puts other tensors there is not replayed."""
        sae = self._sae
        kept = [*sae.parameters(), *sae.buffers()]
        return (sae.allocation.times_replaced, *(tensor.data_ptr() for tensor in kept))

    def _try_to_record(
        self, step_input: TrainStepInput, plan: StepPlan
    ) -> RecordedStep | None:
        try:
            return self._record(step_input.sae_in, plan)
        except (
            Exception
        ) as error:  # any operation may refuse, or find too little memory
            first_line = str(error).strip().partition("\n")[0]
            self._failure = f"the step cannot be recorded ({first_line})"
        # the error held the frames, and those the half of a recording
        with suppress(RuntimeError):  # as of a recording that could not be ended
            torch.cuda.empty_cache()
        return None

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
        try:
            with (
                torch.cuda.device_of(batch),
                sae.checks.recorded() as requirements,
                recording.recording(),
            ):
                output = self._take(batch, plan)
        finally:
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
        own = AllocationTrainingSAE.training_forward_pass
        if getattr(self._sae.training_forward_pass, "__func__", None) is not own:
            return "training_forward_pass of the SAE was replaced, as by compile_sae"
        if not uses_triton(sae_in.device):
            return "the kernels of this backend make the host wait, and only Triton's do not"
        if self._sae.gradient_memory.rows is not None:
            return "row_sparse_adam waits for the device to say which features were selected"
        return self._failure
