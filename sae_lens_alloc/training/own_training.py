"""Training on activations of one's own, in one call."""

from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.training.runner import AllocSAETrainingRunner


def train_on_activations(
    source: Any,
    cfg: LanguageModelSAERunnerConfig[Any],
    overwrite: bool = False,
) -> TrainingSAE[Any]:
    """
    Trains an SAE on activations that one has, without a language model. The rest is as in any run
    of `AllocSAETrainingRunner`: some activations are held out, thresholds are calibrated, and
    `cfg.output_path` gets the SAE and its metrics.

    Args:
        source: One of

            - a tensor or a NumPy array of shape (n, d_in), one row a token;
            - the path of a `.npy` or safetensors file of that shape, or of a folder of such files;
            - a Hugging Face dataset, or the path of one, with an array in each row: a vector of
              shape (d_in,), or, as SAELens caches activations, those of a context, of shape
              (context_size, d_in);
            - an iterable of batches of shape (n, d_in), or a callable that returns one for each
              epoch.

            They are shuffled. Where `cfg.training_tokens` are more than there are, another epoch
            follows in another order. The rows of a transcoder hold its input and its output, d_in +
            d_out numbers.
        cfg: The run, such as `AllocSAERunnerConfig`. Its language model, hook and text are left at
            their defaults. `n_batches_in_buffer` training batches are shuffled together.
        overwrite: Whether an SAE in the output folder may be replaced.

    Returns:
        The trained SAE, in evaluation mode.

    Raises:
        ValueError: if the activations cannot be read, do not fit the SAE, are too few or hold a
            number that is not finite, if the config names a language model or its text, and as
            `AllocSAETrainingRunner`.
        OSError: if the folders of the run cannot be written to.
    """
    return AllocSAETrainingRunner(
        cfg, overwrite=overwrite, override_activations=source
    ).run()
