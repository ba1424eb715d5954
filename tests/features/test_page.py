"""What is in the page's file: that it stands alone, and that its numbers are those measured."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.features.lens import LogitLens
from sae_lens_alloc.features.measure import measure_features
from sae_lens_alloc.features.packing import pack
from sae_lens_alloc.features.page import N_SHADES, FeaturePage
from tests.features.conftest import (
    DEAD,
    LENGTH,
    N_FEATURES,
    N_TOKENS,
    make_readable_sae,
)
from tests.features.reading import unpacked


@pytest.fixture(scope="module")
def data(page: FeaturePage) -> dict[str, Any]:
    return unpacked(page.packed())


def test_what_is_packed_is_unpacked():
    arrays = {
        "bytes": np.array([1, 2, 255], dtype=np.uint8),
        "numbers": np.array([[0.5, -1e9]], dtype=np.float32),
        "none": np.zeros(0, dtype=np.int32),
    }
    found = unpacked(pack({"name": "ä </script>", "n": 3}, arrays))
    assert found["name"] == "ä </script>" and found["n"] == 3
    for name, array in arrays.items():
        assert found[name].tolist() == array.flatten().tolist()


def test_figures_are_those_measured(page: FeaturePage, data: dict[str, Any]):
    dense = page.activity.pairs.to_dense()
    assert data["features"].tolist() == list(range(N_FEATURES))
    assert data["firings"].tolist() == (dense > 0).sum(0).tolist()
    assert all(data["firings"][feature] == 0 for feature in DEAD)
    largest = data["quantiles"].reshape(N_FEATURES, -1)[:, -1]
    assert largest.tolist() == dense.max(0).values.tolist()
    assert data["histograms"].sum() == (dense > 0).sum()
    assert data["n_tokens"] == int(page.activity.ordinary.sum())
    assert page.activity.tokens.numel() == N_TOKENS
    assert data["norms"] == pytest.approx(page.norms.tolist())


def test_examples_lead_to_their_text(page: FeaturePage, data: dict[str, Any]):
    dense = page.activity.pairs.to_dense()
    tokenizer: Any = page.tokenizer
    text = data["text"].reshape(-1, LENGTH)
    examples = list(
        zip(page.examples.features.tolist(), page.examples.tokens.tolist(), strict=True)
    )
    assert len(examples) > N_FEATURES
    for i, (feature, token) in enumerate(examples):
        assert data["examples_from"][feature] <= i < data["examples_from"][feature + 1]
        row, position = data["example_rows"][i], data["example_positions"][i]
        context = page.activity.tokens[token // LENGTH]
        assert position == token % LENGTH
        assert data["example_values"][i] == dense[token, feature]
        words = [data["words"][word] for word in text[row]]
        if i % 20 == 0:
            assert "".join(words) == tokenizer.decode(context)
        run = slice(data["active_from"][i], data["active_from"][i + 1])
        values = dense[token // LENGTH * LENGTH :, feature][:LENGTH]
        assert data["active_positions"][run].tolist() == (
            values.nonzero().squeeze(1).tolist()
        )
        shades = values[values > 0] / dense[:, feature].max() * N_SHADES
        assert data["active_shades"][run] == pytest.approx(shades.tolist(), abs=0.51)


def test_special_tokens_are_known(page: FeaturePage, data: dict[str, Any]):
    tokenizer: Any = page.tokenizer
    assert [data["words"][word] for word in data["special_words"]] == [
        tokenizer.bos_token
    ]


def test_lens_tokens_are_in_words(page: FeaturePage, data: dict[str, Any]):
    assert isinstance(page.lens, LogitLens)
    tokenizer: Any = page.tokenizer
    for feature in (0, 100):
        promoted = data["promoted"].reshape(N_FEATURES, -1)[feature]
        for word, token in zip(
            promoted, page.lens.largest[feature].tolist(), strict=True
        ):
            assert data["words"][word] in (
                tokenizer.decode([token]),
                tokenizer.convert_ids_to_tokens(token),
            )


def test_each_token_of_a_snippet_has_its_features(
    page: FeaturePage, data: dict[str, Any]
):
    dense = page.activity.pairs.to_dense()
    n = 0
    assert len(data["snippet_rows"]) == len(page.snippets) > 1
    for s, snippet in enumerate(page.snippets):
        assert data["snippet_lengths"][s] == len(snippet.tokens)
        for i, text in enumerate(snippet.tokens):
            place = data["snippet_rows"][s] * LENGTH + data["snippet_starts"][s] + i
            assert data["words"][data["text"][place]] == text
            values = dense[snippet.context * LENGTH + snippet.start + i]
            run = slice(*data["token_features_from"][n : n + 2])
            features = data["token_features"][run].tolist()
            assert sorted(features) == values.nonzero().squeeze(1).tolist()
            found = data["token_values"][run].tolist()
            assert found == sorted(found, reverse=True) == values[features].tolist()
            n += 1
    assert n + 1 == len(data["token_features_from"])


def test_some_of_the_features(page: FeaturePage):
    """Rows are of the chosen features alone; neighbours are still of all."""
    some = torch.tensor([30, 90])
    assert page.by_activity.features[some].max() > 90
    sae = make_readable_sae()
    part = measure_features(sae, text_of_sae(sae), N_TOKENS, some, "part")
    assert torch.equal(part.figures.firings, page.figures.firings[some])
    assert torch.equal(part.by_decoder.features, page.by_decoder.features[some])
    assert torch.equal(part.by_activity.features, page.by_activity.features[some])
    found = unpacked(part.packed())
    assert found["features"].tolist() == [30, 90]
    of_90 = page.examples.tokens[page.examples.features == 90]
    assert torch.equal(part.examples.tokens[part.examples.features == 1], of_90)


def test_the_page_stands_alone(page: FeaturePage, tmp_path: Path):
    path = tmp_path / "page.html"
    page.write(path)
    text = path.read_text()
    loaded: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(
            self, tag: str, attrs: list[tuple[str, str | None]]
        ) -> None:
            loaded.extend(
                value or ""
                for name, value in attrs
                if name in ("src", "srcset") or (name == "href" and tag == "link")
            )

    Sources().feed(text)
    assert loaded == []
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text and "url(" not in text
    assert "<h1>an &lt;SAE&gt;</h1>" in text
    assert len(text) < 2_000_000
    # the same again
    page.write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_a_page_without_a_lens_says_why(page: FeaturePage):
    found = unpacked(dataclasses.replace(page, lens="There is none.").packed())
    assert found["no_lens"] == "There is none."
    assert "promoted" not in found
