"""timm opens the folder of a trained model of any variant, ours too, and gives its logits."""

import pytest
import torch

from coat_deploy.json_files import json_bytes
from coat_deploy.model import CONFIG, WEIGHTS
from coat_deploy.network.coat import create_network
from coat_deploy.network.variants import VARIANTS, get_variant
from coat_deploy.network.weights import load_checkpoint, to_safetensors
from coat_deploy.spec import ModelSpec, Preprocess

OURS = [name for name, variant in VARIANTS.items() if variant.published is None]
LABELS = ("cat", "dog", "tram")


@pytest.mark.parametrize("name", [*OURS, "coat_lite_tiny"])
def test_timm_gives_the_same_logits(name, tmp_path, timm):
    variant = get_variant(name)
    spec = ModelSpec(
        name, len(LABELS), variant.num_features, Preprocess((64, 64)), LABELS, timm=variant.timm
    )
    checkpoint = load_checkpoint("random:0", spec)
    (tmp_path / CONFIG).write_bytes(json_bytes(spec.to_json()))
    (tmp_path / WEIGHTS).write_bytes(to_safetensors(checkpoint))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = create_network(name, len(LABELS)).eval()
    ours.load_state_dict({k: torch.from_numpy(v) for k, v in checkpoint.tensors.items()})
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(pixels)
        assert logits.std() > 0.1  # or the weights would hide a difference
        assert (theirs(pixels) - logits).abs().max() <= 1e-5
