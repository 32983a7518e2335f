import copy
import subprocess
import sys

import pytest
import torch

from coat_deploy.network import package
from coat_deploy.network.coat import create_network
from coat_deploy.network.fused.fuse import fuse
from coat_deploy.network.package import Float32Ends, compile_package


@pytest.mark.slow
def test_a_fused_network_is_packed_and_runs_without_its_code(
    randomise, tmp_path, monkeypatch
) -> None:
    quick = {**package.CONFIG, "aot_inductor.compile_wrapper_opt_level": "O0"}  # to compile
    monkeypatch.setattr(package, "CONFIG", quick)
    network = create_network("coat_lite_toy", num_classes=10)
    randomise(network)
    fused = fuse(copy.deepcopy(network), feed_forward=False)
    compile_package(fused, (64, 64), tmp_path / "toy.pt2")
    pixels = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, tmp_path / "pixels.pt")
    script = (
        "import sys, torch\n"
        "network = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "pixels = torch.load(sys.argv[2])\n"
        "logits = [network(pixels), network(pixels[:1])]\n"
        "assert not any(name.startswith('coat_deploy') for name in sys.modules)\n"
        "torch.save(logits, sys.argv[3])\n"
    )
    names = ("toy.pt2", "pixels.pt", "logits.pt")
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in names)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    many, one = torch.load(tmp_path / "logits.pt")
    with torch.inference_mode():
        expected = network.eval()(pixels)
    assert torch.allclose(many, expected, atol=1e-5)
    assert torch.allclose(one, expected[:1], atol=1e-5)


@pytest.mark.parametrize("features", [False, True])
def test_a_network_of_a_low_type_takes_and_returns_float32(features) -> None:
    network = create_network("coat_lite_toy", num_classes=10, features=features).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = Float32Ends(network.to(torch.bfloat16))(pixels)
    outputs = outputs if features else (outputs,)
    assert len(outputs) == (4 if features else 1)
    assert all(output.dtype == torch.float32 for output in outputs)
