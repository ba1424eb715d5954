"""What SAELens loads in a process in which this package cannot be imported."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.saes.conftest import changed, state_of

REPOSITORY = Path(__file__).parents[2]
LOAD_WITHOUT_PLUGIN = """
import json, sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sae_lens_alloc":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
try:
    import sae_lens_alloc
except ImportError as error:
    assert str(error).startswith("blocked")
else:
    raise AssertionError("the plugin could be imported")

import torch
from safetensors.torch import load_file
from sae_lens import SAE

found = {}
for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(expected["x"])
    found[folder] = {
        "class": f"{type(sae).__module__}.{type(sae).__name__}",
        "training": sae.cfg.metadata.training_architecture,
        "l0": (acts > 0).sum(-1).float().mean().item(),
        "flipped": ((acts > 0) != (expected["acts"] > 0)).sum().item(),
        "acts": (acts - expected["acts"]).abs().max().item(),
        "sae_out": (sae(expected["x"]) - expected["sae_out"]).abs().max().item(),
    }
print(json.dumps(found))
"""


def save_with_outputs(sae: Any, x: torch.Tensor, folder: Path) -> None:
    """Saves an SAE for inference, which does not change it, and what it makes of x."""
    before = state_of(sae)
    sae.save_inference_model(folder)
    assert changed(before, sae) == set()
    sae.eval()
    with torch.no_grad():
        expected = {"x": x, "acts": sae.encode(x), "sae_out": sae(x)}
    save_file(expected, folder / "expected.safetensors")


def loaded_without_plugin(folders: Mapping[str, Any], cwd: Path) -> dict[str, str]:
    """
    The class that SAELens loads from each folder. It must give what the SAE of the folder has
    given, which `save_with_outputs` has saved.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PLUGIN, *folders],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == folders.keys()
    for folder, result in found.items():
        assert result["training"] == folders[folder].cfg.architecture()
        assert 1 < result["l0"] < 10
        # folding the norms rounds once more: a relative error of some 1e-7
        assert result["flipped"] == 0, folder
        assert result["acts"] < 1e-5, folder
        assert result["sae_out"] < 1e-5, folder
    return {folder: result["class"] for folder, result in found.items()}
