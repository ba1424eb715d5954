"""docs/config.md: all config fields, from the dataclasses and their docstrings."""

import dataclasses
from typing import Any

from docstring_parser import parse
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_alloc.config.run_config import (
    AllocSAERunnerConfig,
    AllocSAETrainerConfig,
)
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.auxiliary_loss import AuxiliaryLossTrainingSAEConfig
from sae_lens_alloc.saes.feature_choice_sae import FeatureChoiceTrainingSAEConfig
from sae_lens_alloc.saes.matryoshka_mutual_choice_sae import (
    MatryoshkaMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.transcoder_config import TranscoderTrainingConfig


def config_reference() -> str:
    """The page of all config fields, from the dataclasses and their docstrings."""
    own = {
        field.name
        for config_class in (
            MutualChoiceTrainingSAEConfig,
            FeatureChoiceTrainingSAEConfig,
        )
        for field in dataclasses.fields(config_class)
    }
    aux = AuxiliaryLossTrainingSAEConfig
    aux_fields = set(aux.__dataclass_fields__) - set(
        TrainingSAEConfig.__dataclass_fields__
    )
    shared = {field.name for field in dataclasses.fields(AllocationTrainingSAEConfig)}
    sections = [
        "# Config reference\n",
        "These are the fields under `sae:` of a YAML config. In Python they are the fields of the "
        "config classes. The other keys of a YAML config are those of SAELens' "
        "`LanguageModelSAERunnerConfig`, "
        "[with a few differences](checks.md#where-the-keys-differ-from-saelens), and "
        "[five of ours](#the-run). `python docs/render.py` writes this page from the docstrings.\n",
        "## Common to all architectures that allocate\n",
        "`mutual_choice`, `refined_mutual_choice`, `matryoshka_mutual_choice` and `feature_choice` "
        "have these fields:\n",
        _field_table(AllocationTrainingSAEConfig, shared),
        "## `mutual_choice`\n",
        _field_table(MutualChoiceTrainingSAEConfig, own - shared),
        "## `refined_mutual_choice`\n",
        "The fields of `mutual_choice`, with this addition ([encoding twice](refined.md)):\n",
        _field_table(RefinedMutualChoiceTrainingSAEConfig, {"refinement"}),
        "## `matryoshka_mutual_choice`\n",
        "The fields of `mutual_choice`, with this difference and this addition:\n",
        _field_table(
            MatryoshkaMutualChoiceTrainingSAEConfig,
            {"matryoshka_widths", "feature_choice_steps"},
        ),
        "## `feature_choice`\n",
        _field_table(FeatureChoiceTrainingSAEConfig, own - shared),
        "## `mutual_choice_transcoder`, `feature_choice_transcoder`\n",
        "The fields of `mutual_choice` or `feature_choice`, with these differences and additions "
        "([transcoders](transcoders.md)):\n",
        _field_table(
            TranscoderTrainingConfig,
            {"d_out", "skip_connection", "apply_b_dec_to_input"},
        ),
        "## `batchtopk_aux_zipf`, `gated_aux_zipf`, `jumprelu_aux_zipf`, "
        "`matryoshka_batchtopk_aux_zipf`, `standard_aux_zipf`, `topk_aux_zipf`\n",
        "The fields of SAELens' own architecture and:\n",
        _field_table(aux, aux_fields),
        "## The run\n",
        "These fields are at top level, next to SAELens' own. In Python they belong to "
        "`AllocSAERunnerConfig`, for `AllocSAETrainingRunner`, and to `AllocSAETrainerConfig`, for "
        "`AllocSAETrainer`. Runner and trainer accept SAELens' own configs, too.\n",
        _field_table(AllocSAETrainerConfig, {"optimizer", "cuda_graph"}),
        "And of `AllocSAERunnerConfig` alone:\n",
        _field_table(
            AllocSAERunnerConfig,
            {
                *("hook_name_out", "activations", "activations_column"),
                *("kl_finish", "kl_weight"),
            },
        ),
    ]
    return "\n".join(sections)


def _field_table(config_class: type[Any], names: set[str]) -> str:
    described = {
        param.arg_name: " ".join((param.description or "").split())
        for param in parse(config_class.__doc__ or "").params
    }
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(config_class):
        if field.name in names:
            rows.append(
                f"| `{field.name}` | {_type_name(field)} | {_default(field)} "
                f"| {described[field.name]} |"
            )
    return "\n".join(rows) + "\n"


def _type_name(field: dataclasses.Field[Any]) -> str:
    name = field.type if isinstance(field.type, str) else str(field.type)
    name = name.replace("typing.", "").replace("<class '", "").replace("'>", "")
    return name.split(".")[-1].replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "" if field.default_factory is not dataclasses.MISSING else "required"
