"""Features named on the command line."""

import pytest

from sae_lens_alloc.features.choice import chosen_features


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, list(range(10))),
        ("7", [7]),
        ("0-2,9", [0, 1, 2, 9]),
        (" 4 - 5 , 5,4", [4, 5]),
        ("9,0", [0, 9]),
    ],
)
def test_numbers_and_ranges(text: str | None, expected: list[int]):
    assert chosen_features(text, 10).tolist() == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must be numbers and ranges with commas between, such as 0-99,512."),
        ("1,,2", "must be numbers and ranges"),
        ("-3", "must be numbers and ranges"),
        ("1.5", "must be numbers and ranges"),
        ("5-3", "the range 5-3, whose end comes before its start."),
        ("0-10", "names feature 10, but the features of this SAE are 0 to 9."),
    ],
)
def test_anything_else_is_one_sentence(text: str, sentence: str):
    with pytest.raises(ValueError, match="--features") as caught:
        chosen_features(text, 10)
    assert sentence in str(caught.value)
