"""The model card, rendered from the measured figures."""

from typing import Any

TEMPLATE = """\
---
language: en
license: other
license_name: psf-2.0
library_name: transformers
tags: [sparse-autoencoders, demo, test-model]
---

# Demo language model

A very small GPT-2 trained on the source text of Python's standard library. It exists so that
demos and tests of sparse autoencoders run offline, on a CPU, within minutes. It is not a useful
language model: do not generate code or text with it.

## Data and licence

Source text of the standard library of Python {versions[python]}, without tests and `encodings`:
{corpus[train_files]:,} files for training ({corpus[train_bytes]:,} bytes,
{corpus[train_tokens]:,} tokens) and {corpus[held_out_files]:,} held out
({corpus[held_out_bytes]:,} bytes, {held_out_tokens:,} tokens). A hash of a file's path decides which. The files are cut at line ends
into rows of at most 8,000 characters, in shuffled order.

Copyright of the text: Python Software Foundation. Licence: PSF-2.0, in `corpus/LICENSE`.

## Model and recipe

{parameters:,} parameters: width {recipe[width]}, {recipe[layers]} blocks, {recipe[heads]} heads,
context {recipe[context]}, byte-level BPE of {recipe[vocab_size]:,} tokens, untied embeddings, no
dropout. Weights are stored in float16 and load as float32; weights, tokenizer and
configuration take {model_bytes:,} bytes.

Trained on {trained_tokens:,} tokens ({epochs:.1f} epochs) in {minutes:.0f} minutes of wall clock on
a CPU ({threads} threads), in float32, seed {recipe[seed]}: random crops with `<|endoftext|>` first
and between rows, {recipe[batch]} crops a step; Muon (learning rate {recipe[muon_lr]:g}, weight
decay {recipe[muon_weight_decay]:g}) for the blocks' matrices, AdamW ({recipe[adam_lr]:g},
{recipe[adam_weight_decay]:g}) for the rest; {recipe[warm_up_steps]} steps of warm-up, a constant
learning rate, and linear decay to zero over the last {recipe[decay]:.0%} of training; gradient
norm clipped at {recipe[clip]:g}.

```
{command}
```

Versions: {version_list}.
Another version of Python has another standard library, hence another corpus and other figures.

## Held-out figures

`<|endoftext|>` is excluded throughout, as a target and as a position.

| | |
|---|---|
| loss, nats a token | {held_out_loss:.3f} |
| bits a byte | {bits_per_byte:.3f} |
| bigram loss | {bigram_loss:.3f} |
| unigram loss | {unigram_loss:.3f} |
| loss, `{hook}` replaced by its mean | {mean_ablation_loss:.3f} |
| loss, `{hook}` replaced by zero | {zero_ablation_loss:.3f} |

The residual stream after the embedding and after each block. Effective rank is the participation
ratio of the covariance's eigenvalues; the share is that of the largest one.

| | effective rank | largest share | norm: median | 99% | max |
|---|---|---|---|---|---|
{stream_rows}

The demo's activations are those of `{hook}`.

## Gates

| | value | limit | |
|---|---|---|---|
{gate_rows}
"""


def figure(value: float) -> str:
    """A count in full, anything else with three significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def render(metrics: dict[str, Any]) -> str:
    """The card as Markdown."""
    stream_rows = "\n".join(
        f"| {name} | {row['effective_rank']:.1f} | {row['top_component_share']:.3f} "
        f"| {row['norm_median']:.1f} | {row['norm_p99']:.1f} | {row['norm_max']:.1f} |"
        for name, row in metrics["residual_stream"].items()
    )
    gate_rows = "\n".join(
        f"| {row['gate']} | {figure(row['value'])} | {row['limit']} "
        f"| {'passed' if row['passed'] else 'FAILED'} |"
        for row in metrics["gates"]
    )
    version_list = ", ".join(
        f"{name} {version}" for name, version in metrics["versions"].items()
    )
    return TEMPLATE.format(
        **metrics,
        stream_rows=stream_rows,
        gate_rows=gate_rows,
        version_list=version_list,
    )
