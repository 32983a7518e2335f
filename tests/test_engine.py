import dataclasses
import json

import pytest

from coat_deploy.engine import BuildOptions, EngineOptions, EngineRecord, Profile
from coat_deploy.errors import RepositoryError, UsageError

PROFILE = Profile((1, 8, 64), (64, 96, 128), (32, 48, 64))
RECORD = EngineRecord(
    flavour="tensorrt",
    version="11.4.0",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    graph_sha256="0" * 64,
    profiles=(PROFILE, Profile.of((1, 1, 1), (64, 48))),
    options={"effort": 3},
    census={"layers": 2},
)


def test_a_profile_knows_its_shapes() -> None:
    assert PROFILE.shapes() == ((1, 3, 64, 32), (8, 3, 96, 48), (64, 3, 128, 64))
    assert Profile.of((2, 2, 2), (64, 48)).shapes() == ((2, 3, 64, 48),) * 3


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((1, 3, 64, 32), True),
        ((64, 3, 128, 64), True),
        ((65, 3, 128, 64), False),
        ((8, 3, 63, 64), False),
        ((8, 3, 64, 65), False),
    ],
)
def test_a_profile_takes_what_lies_within_it(shape, taken) -> None:
    assert PROFILE.takes(shape) == taken


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 3), (1, 3, 2), (1, 2, 65537)])
def test_a_range_that_does_not_ascend_is_refused(batch) -> None:
    with pytest.raises(UsageError, match="profile: the batch cannot be"):
        Profile.of(batch, (64, 64))


def test_a_profile_reads_well() -> None:
    assert str(Profile.of((1, 8, 64), (64, 48))) == "batch 1 to 64 (best 8), 64 high, 48 wide"


def test_options_become_profiles_of_the_models_size() -> None:
    how = EngineOptions(((1, 1, 1), (2, 8, 16))).settle((64, 48), None, tf32=True)
    assert how.tf32
    assert how.profiles == tuple(Profile.of(b, (64, 48)) for b in ((1, 1, 1), (2, 8, 16)))


def test_an_open_size_goes_from_the_smallest_to_twice_the_models() -> None:
    (profile,) = EngineOptions().settle((64, 48), 32, tf32=False).profiles
    assert profile == Profile((1, 8, 64), (32, 64, 128), (32, 48, 96))
    (profile,) = EngineOptions(sides=(64, 96, 256)).settle((64, 48), 32, tf32=False).profiles
    assert profile == Profile((1, 8, 64), (64, 96, 256), (64, 96, 256))


def test_a_range_of_sizes_needs_an_open_size() -> None:
    with pytest.raises(UsageError, match="Ask for --size dynamic"):
        EngineOptions(sides=(64, 96, 256)).settle((64, 48), None, tf32=False)


@pytest.mark.parametrize("wrong", [{"effort": 6}, {"effort": -1}, {"workspace_mib": 0}])
def test_options_that_cannot_be_are_refused(wrong) -> None:
    with pytest.raises(UsageError, match=r"got -?\d"):
        BuildOptions(**wrong)


def test_only_what_was_asked_for_is_recorded() -> None:
    assert BuildOptions((PROFILE,)).to_json() == {}
    asked = BuildOptions((PROFILE,), refit=True, compute_capabilities=("8.9",))
    assert asked.to_json() == {"refit": True, "compute_capabilities": ["8.9"]}


def test_a_record_is_read_as_it_was_written() -> None:
    entry = json.loads(json.dumps(RECORD.to_json()))
    assert EngineRecord.from_json(entry, "manifest.json") == RECORD


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineRecord)])
@pytest.mark.parametrize("value", ["absent", 7, [], [[]], {"batch": 1}, [{"batch": [1, 2]}]])
def test_a_record_that_is_damaged_is_refused(field, value) -> None:
    if field in ("options", "census") and isinstance(value, dict):
        pytest.skip("any mapping will do")
    entry = json.loads(json.dumps(RECORD.to_json()))
    if value == "absent":
        del entry[field]
    else:
        entry[field] = value
    with pytest.raises(RepositoryError, match="manifest.json: an artifact's 'engine' is damaged"):
        EngineRecord.from_json(entry, "manifest.json")
