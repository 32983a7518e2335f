import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    code = {path.parent for path in (ROOT / "coat_deploy").rglob("*.py")}
    configs = {path.parent for path in (ROOT / "models").glob("*/config.json")}
    published = {"coat_deploy.published", *(f"coat_deploy.published.{p.name}" for p in configs)}
    assert listed == {".".join(path.relative_to(ROOT).parts) for path in code} | published
