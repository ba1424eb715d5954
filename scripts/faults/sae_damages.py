"""What can be wrong with the folder of an SAE: damages, each done to a copy of a whole one."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
Damage = Callable[[Path], object]


def damages() -> Iterator[tuple[str, Damage]]:
    """Every damage by its name, done to a copy of a whole SAE."""
    yield from config_damages()
    yield from weight_damages()
    for name in (CFG, WEIGHTS):
        yield f"{name} missing", lambda f, name=name: (f / name).unlink()
        yield f"{name} empty", lambda f, name=name: (f / name).write_bytes(b"")
        yield f"{name} a folder", lambda f, name=name: as_folder(f / name)
        yield f"{name} unreadable", lambda f, name=name: (f / name).chmod(0)
        yield f"{name} a link to itself", lambda f, name=name: as_loop(f / name)
        yield (
            f"{name} random bytes",
            lambda f, name=name: (f / name).write_bytes(bytes(range(7, 251)) * 9),
        )
    yield "folder empty", lambda f: [path.unlink() for path in f.iterdir()]
    for text in ("[]", "{", '{"scaling_factor": "x"}', '{"scaling_factor": -1}'):
        yield (
            f"activation_scaler.json {text}",
            lambda f, text=text: (f / "activation_scaler.json").write_text(text),
        )


def config_damages() -> Iterator[tuple[str, Damage]]:
    texts = [
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        "[[" * 50_000,
        "\x00\x01",
        '{"d_in": 8}',
    ]
    for text in texts:
        yield f"cfg.json {text[:12]!r}", lambda f, t=text: (f / CFG).write_text(t)
    for share in range(1, 16):
        yield f"cfg.json cut at {share}/16", lambda f, s=share: cut(f / CFG, s / 16)
    values: dict[str, list[Any]] = {
        "architecture": [
            *("standard", "gated", "topk", "jumprelu", "batchtopk", "transcoder"),
            *("temporal", "rbf", None, 3, ["topk"], {}),
        ],
        "d_in": [0, -1, 8, 193, 1e30, 10**400, "192", None, 1.5, [192], True],
        "d_sae": [0, -1, 8, 65, 1e30, 10**15, "64", None, 1.5, [64]],
        "k": [0, -1, 65, 10**30, "4", None, [4]],
        "dtype": ["float33", None, 16, "int64", "bfloat16", ["float32"]],
        "device": [7, None, "nowhere"],
        "apply_b_dec_to_input": ["yes", None, 2],
        "normalize_activations": ["always", 3, None],
        "reshape_activations": ["hook_q", 3],
        "metadata": [None, [], "text", 7, {}, {"self": 1}],
        "decoder_init_norm": ["big", None],
    }
    for key, of_key in values.items():
        for value in of_key:
            yield (
                f"cfg.json {key} {str(value)[:20]}",
                lambda f, k=key, v=value: change_json(f / CFG, {k: v}),
            )
        yield f"cfg.json without {key}", lambda f, k=key: change_json(f / CFG, {}, k)
    metadata: dict[str, list[Any]] = {
        "context_size": ["256", 5000, 0, -4, None, 1.5, 10**30],
        "hook_name": ["nowhere", 3, ["a"], ""],
        "model_name": ["/no/such/model", 3, ""],
        "model_class_name": ["NoSuchClass", 3],
        "dataset_path": ["/no/such/text", 3, ["a"]],
        "seqpos_slice": [3, "1", [1, 2, 3, 4], [0, 8, 0], ["a"]],
        "prepend_bos": ["no", 3],
        "exclude_special_tokens": ["no", [1.5]],
        "model_from_pretrained_kwargs": [[], "x"],
        "training_architecture_details": [[], "x", {"k": "4"}, {"k": -1}],
        "l0": ["many", -3, [1]],
        "sae_lens_version": ["x", 6, ""],
    }
    for key, of_key in metadata.items():
        for value in of_key:
            yield (
                f"metadata {key} {str(value)[:20]}",
                lambda f, k=key, v=value: change_metadata(f / CFG, {k: v}),
            )


def weight_damages() -> Iterator[tuple[str, Damage]]:
    for share in range(1, 33):
        yield f"weights cut at {share}/33", lambda f, s=share: cut(f / WEIGHTS, s / 33)
    for byte in (1, 7, 8, 9, 20):
        yield f"weights cut at byte {byte}", lambda f, n=byte: cut_at(f / WEIGHTS, n)
    for byte in (*range(12), *range(16, 140, 9)):
        yield f"weights byte {byte} flipped", lambda f, n=byte: flip(f / WEIGHTS, n)
    yield (
        "weights a pickle",
        lambda f: torch.save({"W_enc": torch.ones(2)}, f / WEIGHTS),
    )
    yield "weights a text", lambda f: (f / WEIGHTS).write_text("weights\n" * 50)
    yield "weights of no tensor", lambda f: save_file({}, f / WEIGHTS)
    yield "a tensor more", lambda f: change(f, "more", lambda _: torch.ones(3))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        for what, make in TENSORS.items():
            yield (
                f"{name} {what}",
                lambda f, n=name, make=make: change(f, n, make),
            )
    yield "threshold inf", lambda f: change(f, "threshold", lambda t: t + torch.inf)


TENSORS: dict[str, Callable[[Any], Any]] = {
    "missing": lambda _: None,
    "transposed": lambda t: t.t().contiguous() if t.ndim == 2 else t[:, None],
    "of a row less": lambda t: t[1:].contiguous(),
    "of no row": lambda t: t[:0].contiguous(),
    "a scalar": lambda t: t.flatten()[0].clone(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "float16": lambda t: t.half(),
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "with one inf": lambda t: t.index_fill(0, torch.tensor([1]), torch.inf),
    "1e30": lambda t: torch.full_like(t, 1e30),
    "zero": torch.zeros_like,
    "times 1000": lambda t: t * 1000,
}


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def cut(path: Path, share: float) -> None:
    cut_at(path, int(path.stat().st_size * share))


def cut_at(path: Path, n_bytes: int) -> None:
    os.truncate(path, n_bytes)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x15
    path.write_bytes(content)


def change_json(path: Path, values: dict[str, Any], without: str | None = None) -> None:
    content = {**json.loads(path.read_text()), **values}
    content.pop(without, None)
    path.write_text(json.dumps(content))


def change_metadata(path: Path, values: dict[str, Any]) -> None:
    metadata = json.loads(path.read_text())["metadata"]
    change_json(path, {"metadata": {**metadata, **values}})


def change(folder: Path, name: str, make: Callable[[Any], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = make(tensors.get(name, torch.ones(64)))
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS)
