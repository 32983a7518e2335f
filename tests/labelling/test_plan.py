import pytest

from coat_deploy.errors import RepositoryError
from coat_deploy.labelling.plan import part_size, plan_bytes, read_part, read_plan, read_sizes


@pytest.mark.parametrize(
    ("images", "size"), [(1, 16), (1024, 16), (6400, 100), (32768, 512), (10_000_000, 512)]
)
def test_parts_are_neither_tiny_nor_few(images, size):
    assert part_size(images) == size


def test_a_part_is_read_without_the_others(tmp_path):
    paths = [f"ü/{i}.jpg" for i in range(7)]
    (tmp_path / "plan").write_bytes(plan_bytes(paths, 3))
    assert read_sizes(tmp_path / "plan") == [3, 3, 1]
    assert read_part(tmp_path / "plan", 1) == paths[3:6]
    assert list(read_plan(tmp_path / "plan")) == paths


def test_a_torn_plan_is_told(tmp_path):
    (tmp_path / "plan").write_bytes(plan_bytes(["1.jpg"], 3)[:40])
    with pytest.raises(RepositoryError, match="not a whole plan"):
        read_plan(tmp_path / "plan").__next__()
