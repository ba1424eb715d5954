"""What a built demo model must satisfy before it may ship."""

from typing import Any

MAX_LOSS = 2.9
MIN_EFFECTIVE_RANK = 30.0
MAX_NORM_OVER_MEDIAN = 10.0
MAX_FIRST_BLOCK_GROWTH = 20.0
MAX_MODEL_BYTES = 6_000_000
MAX_CORPUS_BYTES = 4_000_000


def check(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a gate: name, value, limit and whether it passed."""
    stream = metrics["residual_stream"]
    hook = stream[metrics["hook"].removeprefix("transformer.")]
    growth = stream["h.0"]["norm_median"] / stream["embedding"]["norm_median"]
    ceilings = [
        ("held-out loss", metrics["held_out_loss"], MAX_LOSS),
        (
            "max / median norm at the hook",
            hook["norm_max"] / hook["norm_median"],
            MAX_NORM_OVER_MEDIAN,
        ),
        ("median norm after block 0 / embedding", growth, MAX_FIRST_BLOCK_GROWTH),
        ("model folder, bytes", metrics["model_bytes"], MAX_MODEL_BYTES),
        ("corpus folder, bytes", metrics["corpus_bytes"], MAX_CORPUS_BYTES),
    ]
    rank = hook["effective_rank"]
    return [
        {
            "gate": "effective rank at the hook",
            "value": rank,
            "limit": f">= {MIN_EFFECTIVE_RANK}",
            "passed": rank >= MIN_EFFECTIVE_RANK,
        },
        *(
            {
                "gate": name,
                "value": value,
                "limit": f"<= {limit:,}",
                "passed": value <= limit,
            }
            for name, value, limit in ceilings
        ),
    ]
