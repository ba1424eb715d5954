"""The last steps of a training also learn from what reconstructions change in the language model."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.config import LoggingConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationWhitening
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedTransformer import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainer,
    AllocSAETrainingRunner,
    FeatureChoiceTrainingSAEConfig,
    MatryoshkaMutualChoiceTrainingSAEConfig,
    MutualChoiceTrainingSAEConfig,
    MutualChoiceTrainingTranscoderConfig,
    RefinedMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.training.kl_finish import with_divergence
from tests.training.conftest import (
    D_MODEL,
    HOOK,
    MODEL,
    alloc_config,
)

pytestmark = pytest.mark.usefixtures("restore_signals", "few_calibration_tokens")

MLP_IN, MLP_OUT = "transformer.h.2.ln_2", "transformer.h.2.mlp"
BOS = 0
N_STEPS = 10


def mutual_choice(**settings: Any) -> MutualChoiceTrainingSAEConfig:
    defaults: dict[str, Any] = {"d_in": D_MODEL, "d_sae": 256, "k": 8}
    return MutualChoiceTrainingSAEConfig(**{**defaults, **settings})


def config(sae: Any = None, **overrides: Any) -> AllocSAERunnerConfig[Any]:
    """A run of 10 steps of 256 tokens, in contexts of 64, the last 4 with the divergence."""
    logger = LoggingConfig(log_to_wandb=False, wandb_id="run", wandb_log_frequency=1)
    settings: dict[str, Any] = {"training_tokens": N_STEPS * 256, "kl_finish": "40%"}
    sae = sae or mutual_choice()
    return alloc_config(sae, **{**settings, "logger": logger, **overrides})


def first_kl_step(
    cfg: AllocSAERunnerConfig[Any], text: Dataset, model: HookedRootModule
) -> tuple[AllocSAETrainingRunner, TrainStepOutput, dict[str, torch.Tensor]]:
    """The runner, and output and clipped gradients of the first step of its finish."""
    runner = AllocSAETrainingRunner(cfg, text, model)
    trainer = AllocSAETrainer(
        cfg.to_sae_trainer_config(), runner.sae, runner.activations_store
    )
    trainer.kl_finish = runner.kl_finish
    trainer.n_training_steps = cfg.total_training_steps - cfg.kl_finish
    factors = (0.4, 1.7) if cfg.hook_name_out else 0.4
    if cfg.sae.normalize_activations == "expected_average_only_in":
        trainer.activation_scaler.scaling_factor = factors  # pyright: ignore
    if cfg.sae.normalize_activations == "covariance_whitening":
        matrix = torch.eye(D_MODEL)
        trainer.activation_scaler.whitening = ActivationWhitening(
            torch.full((D_MODEL,), 3.0), 2 * matrix, matrix / 2
        )
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, weight in runner.sae.named_parameters():
            gradients[name] = torch.zeros_like(weight)
            if weight.grad is not None:
                gradients[name] += weight.grad

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.optimizer.register_step_post_hook(lambda *_: restore(runner, weights))
    weights = {name: w.detach().clone() for name, w in runner.sae.named_parameters()}
    output = trainer.step(next(runner.activations_store))
    return runner, output, gradients


@torch.no_grad()
def restore(runner: AllocSAETrainingRunner, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in runner.sae.named_parameters():
        weight.copy_(weights[name])


def language_model(hooks: dict[str, str]) -> HookedRootModule:
    """The shipped language model, one that no other test has."""
    return load_model(
        "AutoModelForCausalLM", MODEL, "cpu", hook_names=list(hooks.values())
    )


def brute_force_divergence(
    model: HookedRootModule,
    tokens: torch.Tensor,
    hook: str,
    recons: torch.Tensor,
    is_replaced: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(untouched || spliced), one prediction after the other."""
    is_ordinary = tokens != BOS
    replaced = (is_ordinary if is_replaced is None else is_replaced).nonzero().tolist()

    def splice(activations: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        spliced = activations.clone()
        for (c, i), recon in zip(replaced, recons, strict=True):
            spliced[c, i] = recon
        return spliced

    with torch.no_grad():
        untouched = model.run_with_hooks(tokens, return_type="logits")
    spliced = model.run_with_hooks(
        tokens, return_type="logits", fwd_hooks=[(hook, splice)]
    )
    of_each: list[torch.Tensor] = []
    for c, i in replaced:
        if i + 1 < tokens.shape[1] and is_ordinary[c, i + 1]:
            p, q = untouched[c, i].softmax(-1), spliced[c, i].softmax(-1)
            of_each.append((p * (p.log() - q.log())).sum())
    return torch.stack(of_each).mean()


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("is_transcoder", [False, True])
def test_gradient_is_that_of_the_dense_formula_in_float64(
    normalize: Any, is_transcoder: bool, demo_text: Dataset
):
    settings: dict[str, Any] = {
        **{"d_in": D_MODEL, "d_sae": 256, "k": 8, "feature_choice_steps": 0},
        **{"selection_margin": 0.0, "aux_loss": "none"},
        "normalize_activations": normalize,
    }
    hooks, sae = {"hook_name": HOOK}, MutualChoiceTrainingSAEConfig(**settings)
    if is_transcoder:
        hooks = {"hook_name": MLP_IN, "hook_name_out": MLP_OUT}
        sae = MutualChoiceTrainingTranscoderConfig(**settings, d_out=D_MODEL)
    cfg, model = config(sae, kl_weight=0.7, **hooks), language_model(hooks)
    runner, output, gradients = first_kl_step(cfg, demo_text, model)

    # the first contexts that are not held out: as many as fit in half of the batch
    store: Any = runner.activations_store
    text = ResumableActivationsStore.from_config(model, cfg, demo_text)
    assert store.n_held_out_contexts > 0
    tokens = text.get_batch_tokens(store.n_held_out_contexts + 2)[-2:]
    n_rows = int((tokens != BOS).sum())
    exact = language_model(hooks).double()
    _, cache = exact.run_with_cache(tokens, names_filter=list(hooks.values()))
    x, *_, y = ([cache[hook][tokens != BOS] for hook in hooks.values()] * 2)[:2]
    of_input, of_output = 1.0, 1.0
    if normalize != "none":
        of_input, of_output = (0.4, 1.7) if is_transcoder else (0.4, 0.4)
    # their rows are the last ones of the batch
    target = output.sae_in.double()
    torch.testing.assert_close(target[-n_rows:], y * of_output, rtol=1e-4, atol=1e-4)
    encoded = target
    if is_transcoder:
        rows = next(AllocSAETrainingRunner(cfg, demo_text, model).activations_store)
        rows = torch.cat([rows[:-n_rows, :D_MODEL].double(), x])
        encoded = rows * of_input

    selected = output.feature_acts.to_dense() != 0
    assert selected.sum() == 8 * 256
    learning = {
        name: w.detach().double().requires_grad_()
        for name, w in runner.sae.named_parameters()
    }
    centred = encoded if is_transcoder else encoded - learning["b_dec"]
    acts = (centred @ learning["W_enc"] + learning["b_enc"]) * selected
    recons = acts @ learning["W_dec"] + learning["b_dec"]
    mse = (recons - target).square().sum(-1).mean()
    kl = brute_force_divergence(
        exact, tokens, list(hooks.values())[-1], recons[-n_rows:] / of_output
    )
    loss = mse + 0.7 * kl * (mse / kl).detach()
    assert float(output.losses["kl_loss"]) == pytest.approx(kl.item(), rel=1e-3)  # pyright: ignore
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
    assert learning.keys() == gradients.keys()
    for name, weight in learning.items():
        assert weight.grad is not None
        largest = weight.grad.abs().max().item()
        torch.testing.assert_close(
            gradients[name].double(), weight.grad, rtol=1e-3, atol=1e-3 * largest
        )


def test_the_divergence_counts_in_units_of_the_reconstruction_loss():
    mse, other = torch.tensor(30.0), torch.tensor(2.0)
    for value in (0.01, 5.0):
        kl = torch.tensor(value, requires_grad=True)
        loss = with_divergence(mse + other, mse, kl, weight=0.1)
        assert loss.item() == pytest.approx(32 + 0.1 * 30)
        loss.backward()
        assert kl.grad is not None and kl.grad.item() == pytest.approx(3 / value)
    # a reconstruction that changes nothing has nothing to learn
    loss = with_divergence(mse, mse, torch.tensor(0.0), weight=0.1)
    assert loss.item() == 30


def hooked_transformer(model: Any) -> HookedRootModule:
    """The shipped model as a HookedTransformer."""
    plain = model.model.config
    cfg = HookedTransformerConfig(
        n_layers=plain.n_layer,
        d_model=plain.n_embd,
        n_ctx=plain.n_positions,
        n_heads=plain.n_head,
        d_head=plain.n_embd // plain.n_head,
        act_fn="gelu_new",
        d_vocab=plain.vocab_size,
        normalization_type="LN",
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    hooked.load_state_dict(convert_gpt2_weights(model.model, cfg), strict=False)
    hooked.set_tokenizer(model.tokenizer)
    return hooked


def test_models_of_all_classes_give_the_same_and_are_left_as_they_were(
    demo_text: Dataset,
):
    proxy = language_model({"hook_name": HOOK})
    bridge: Any = TransformerBridge.boot_transformers(MODEL, device="cpu")
    found: dict[str, tuple[TrainStepOutput, dict[str, torch.Tensor]]] = {}
    for name, model, hook in (
        ("proxy", proxy, HOOK),
        ("HookedTransformer", hooked_transformer(proxy), "blocks.2.hook_resid_post"),
        ("bridge", bridge, "blocks.2.hook_out"),
        ("alias of the bridge", bridge, "blocks.2.hook_resid_post"),
    ):
        first, *others = model.parameters()
        first.requires_grad_(False)
        cfg = config(hook_name=hook)
        _, *found[name] = first_kl_step(cfg, demo_text, model)  # pyright: ignore
        assert not first.requires_grad
        assert all(parameter.requires_grad for parameter in others)
        assert all(parameter.grad is None for parameter in model.parameters())
    output, gradients = found.pop("proxy")
    for name, (other, others_gradients) in found.items():
        kl = float(other.losses["kl_loss"])  # pyright: ignore
        assert kl == pytest.approx(float(output.losses["kl_loss"]), rel=1e-3), name  # pyright: ignore
        for key, gradient in gradients.items():
            distance = (others_gradients[key] - gradient).norm()
            assert distance < 0.01 * gradient.norm(), (name, key)


@pytest.mark.parametrize(
    "sae",
    [
        MatryoshkaMutualChoiceTrainingSAEConfig(
            d_in=D_MODEL, d_sae=256, k=8, matryoshka_widths=[64]
        ),
        RefinedMutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=256, k=8),
        FeatureChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=256, k=8),
        mutual_choice(normalize_activations="layer_norm"),
        mutual_choice(normalize_activations="covariance_whitening"),
    ],
    ids=lambda sae: f"{sae.architecture()}, {sae.normalize_activations}",
)
def test_what_is_put_in_is_the_reconstruction(sae: Any, demo_text: Dataset):
    model = language_model({"hook_name": HOOK})
    cfg = config(sae, context_size=32)
    runner, output, _ = first_kl_step(cfg, demo_text, model)
    store: Any = runner.activations_store
    text = ResumableActivationsStore.from_config(model, cfg, demo_text)
    tokens = text.get_batch_tokens(store.n_held_out_contexts + 4)[-4:]
    recons = output.sae_out[-int((tokens != BOS).sum()) :].detach()
    if sae.normalize_activations == "covariance_whitening":
        recons = recons / 2 + 3
    kl = brute_force_divergence(model, tokens, HOOK, recons)
    assert float(output.losses["kl_loss"]) == pytest.approx(kl.item(), rel=1e-3)  # pyright: ignore


def test_the_positions_that_are_trained_on_are_replaced(demo_text: Dataset):
    model = language_model({"hook_name": HOOK})
    cfg = config(seqpos_slice=(8, 32))
    runner, output, _ = first_kl_step(cfg, demo_text, model)
    store: Any = runner.activations_store
    text = ResumableActivationsStore.from_config(model, cfg, demo_text)
    n = runner.kl_finish.n_contexts  # pyright: ignore
    assert n == round(256 / 2 / 24)
    tokens = text.get_batch_tokens(store.n_held_out_contexts + n)[-n:]
    is_replaced = torch.zeros_like(tokens, dtype=torch.bool)
    is_replaced[:, 8:32] = tokens[:, 8:32] != BOS
    kl = brute_force_divergence(
        model, tokens, HOOK, output.sae_out[-int(is_replaced.sum()) :], is_replaced
    )
    assert float(output.losses["kl_loss"]) == pytest.approx(kl.item(), rel=1e-3)  # pyright: ignore


def test_a_step_whose_contexts_have_no_prediction_is_one_as_any_other(
    demo_model: HookedRootModule, demo_text: Dataset
):
    ids = torch.arange(BOS + 1, BOS + 65)
    text = Dataset.from_dict({"tokens": [ids.tolist()] * 40})
    cfg = config(is_dataset_tokenized=True, exclude_special_tokens=[1])
    runner = AllocSAETrainingRunner(cfg, text, demo_model)
    assert runner.kl_finish is not None
    step, batch = cfg.total_training_steps - 1, next(runner.activations_store)
    kl_step = runner.kl_finish.begin(step, batch, runner.activations_store)
    # of two contexts, from token 2 of token 3 and so on
    assert kl_step is not None and len(kl_step.untouched) == 2 * 62
    assert runner.kl_finish.begin(5, batch, runner.activations_store) is None
    special = config(
        is_dataset_tokenized=True, exclude_special_tokens=ids.tolist()[::2]
    )
    runner = AllocSAETrainingRunner(special, text, demo_model)
    assert runner.kl_finish is not None
    assert runner.kl_finish.begin(step, batch, runner.activations_store) is None
