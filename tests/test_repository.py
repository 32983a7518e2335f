import json
import os
from pathlib import Path

import pytest

from coat_deploy import repository as repository_module
from coat_deploy.errors import RepositoryError, SpecError, UsageError
from coat_deploy.model import ArtifactQuery
from coat_deploy.repository import Repository, published_configs, read_labels
from coat_deploy.spec import ModelSpec, Preprocess

SPEC = ModelSpec("coat_lite_toy", 3, 40, Preprocess((64, 64)))
FIRST, SECOND, THIRD = "given", "variable", "models"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working folder, and no variable set."""
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(*folders):
    for folder in folders:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text(json.dumps(SPEC.to_json()))


@pytest.fixture
def repository(here, monkeypatch):
    """The repository of --models given, with $COAT_MODELS set to a folder, too."""
    monkeypatch.setenv("COAT_MODELS", str(here / SECOND))
    return Repository.open(here / FIRST)


def test_models_given_come_before_all(repository, here):
    put(f"{FIRST}/coat_tiny", f"{SECOND}/coat_tiny", f"{THIRD}/coat_tiny")
    assert repository.find("coat_tiny").folder == here / FIRST / "coat_tiny"


def test_the_variable_comes_before_the_working_folder(repository, here):
    put(f"{SECOND}/coat_tiny", f"{THIRD}/coat_tiny")
    assert repository.find("coat_tiny").folder == here / SECOND / "coat_tiny"


def test_the_working_folders_models_come_before_the_published(repository):
    put(f"{THIRD}/coat_tiny")
    assert repository.find("coat_tiny").folder == Path(THIRD) / "coat_tiny"


def test_the_published_configs_come_last(repository):
    assert repository.find("coat_tiny").folder == published_configs() / "coat_tiny"


def test_an_empty_variable_counts_as_none(monkeypatch):
    monkeypatch.setenv("COAT_MODELS", "")
    assert Repository.open().roots == (Path("models"), published_configs())


def test_a_relative_folder_of_models_is_one_of_the_working_folder():
    put("some where/mine")
    assert Repository.open(Path("some where")).find("mine").spec == SPEC


@pytest.mark.parametrize("path", ["elsewhere/mine", "./elsewhere/mine", "elsewhere/mine/"])
def test_a_name_with_a_slash_is_a_path(repository, path):
    put("elsewhere/mine")
    model = repository.find(path)
    assert (model.name, model.spec) == ("mine", SPEC)


def test_an_absolute_path_is_a_path(repository, here):
    put("elsewhere/mine")
    assert repository.find(str(here / "elsewhere" / "mine")).name == "mine"


def test_a_path_is_not_sought_in_the_folders_of_models(repository):
    put(f"{FIRST}/sub/mine")
    with pytest.raises(UsageError, match=r"sub/mine: no model folder \(it holds no config.json\)"):
        repository.find("sub/mine")


def test_the_working_folder_itself_can_be_the_model(repository, here, monkeypatch):
    put("mine")
    monkeypatch.chdir(here / "mine")
    assert repository.find("./").name == "mine"


def test_the_parent_can_be_the_model(repository, here, monkeypatch):
    put("mine")
    (here / "mine" / "1").mkdir()
    monkeypatch.chdir(here / "mine" / "1")
    assert repository.find("../").name == "mine"


def test_a_linked_folder_keeps_its_own_name(repository, here):
    put("elsewhere/mine")
    (here / FIRST).mkdir()
    (here / FIRST / "current").symlink_to(here / "elsewhere" / "mine")
    assert repository.find("current").name == "current"
    assert repository.find(f"{FIRST}/current").name == "current"


@pytest.mark.parametrize("name", ["mine mit Leerzeichen", "mödel", "模型", "a;b"])
def test_a_name_may_hold_any_letters(repository, name):
    put(f"{FIRST}/{name}")
    assert repository.find(name).spec == SPEC


def test_an_unknown_name_is_told_with_the_nearest_and_the_places(repository):
    put(f"{FIRST}/mine")
    with pytest.raises(UsageError) as caught:
        repository.find("coat_tini")
    message = str(caught.value)
    assert message.startswith("unknown model 'coat_tini' (known: coat_lite_medium, ")
    assert "mine" in message and "Did you mean 'coat_tiny'?" in message
    assert f"{FIRST}, " in message and "models, the published configs" in message


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a\0b", "x" * 300])
def test_a_name_that_is_no_name_of_a_folder_is_unknown(repository, name):
    put(f"{FIRST}/.hidden")
    (Path(FIRST) / "config.json").write_text(json.dumps(SPEC.to_json()))
    with pytest.raises(UsageError, match="unknown model"):
        repository.find(name)


def test_a_folder_called_config_is_no_config(repository):
    Path(f"{FIRST}/mine/config.json").mkdir(parents=True)
    with pytest.raises(UsageError, match="unknown model 'mine'"):
        repository.find("mine")


def test_every_model_is_listed_once_by_name(repository):
    put(f"{FIRST}/zebra", f"{SECOND}/zebra", f"{SECOND}/ant", f"{FIRST}/.hidden")
    models = repository.models()
    assert [model.name for model in models[:1] + models[-1:]] == ["ant", "zebra"]
    assert len(models) == 10
    assert models[-1].folder.parent.name == FIRST


def test_a_model_is_written_where_it_was_found_first(repository, here):
    put(f"{FIRST}/mine")
    model = repository.find("mine")
    assert repository.home(model) == model


@pytest.mark.parametrize("root", [SECOND, THIRD])
def test_a_model_found_behind_is_written_to_the_first_root(repository, here, root):
    put(f"{root}/mine")
    assert repository.home(repository.find("mine")).folder == here / FIRST / "mine"


def test_a_published_model_is_written_to_the_first_root(repository, here):
    assert repository.home(repository.find("coat_tiny")).folder == here / FIRST / "coat_tiny"


def test_a_published_model_is_written_to_the_working_folders_models_by_default():
    repository = Repository.open()
    assert repository.home(repository.find("coat_tiny")).folder == Path("models/coat_tiny")


def test_a_model_given_by_its_path_is_written_there(repository):
    put("elsewhere/mine")
    model = repository.find("elsewhere/mine")
    assert repository.home(model) == model


def test_the_first_root_is_known_by_any_path_to_it(here):
    put("models/mine")
    repository = Repository.open()
    model = repository.find(str(here / "models" / "mine"))
    assert repository.home(model) == model


def test_what_a_published_model_lacks_is_exported_to_the_first_root(repository, here):
    with pytest.raises(RepositoryError, match=f"--models {here / FIRST}$"):
        repository.find("coat_tiny").find(ArtifactQuery("onnxruntime"))


def test_a_root_that_cannot_be_listed_holds_no_models(repository, here, monkeypatch):
    put(f"{FIRST}/mine", f"{SECOND}/theirs")
    listed = os.listdir

    def refuse(path):
        if path == here / SECOND:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    names = [model.name for model in repository.models()]
    assert "mine" in names and "theirs" not in names


def test_a_new_name_is_written_to_the_first_root(repository, here):
    assert repository.new("mine").folder == here / FIRST / "mine"


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "", ".", "..", ".x", "x/", "a\0b"])
def test_a_new_name_that_leads_elsewhere_is_refused(repository, name):
    with pytest.raises(UsageError, match="model name"):
        repository.new(name)


def test_published_configs_are_those_of_the_checkout_when_not_installed():
    assert published_configs() == Path(__file__).resolve().parents[1] / "models"


def test_installed_published_configs_are_preferred(here, monkeypatch):
    monkeypatch.setattr(repository_module, "__file__", str(here / "coat_deploy" / "repository.py"))
    (here / "coat_deploy" / "published").mkdir(parents=True)
    assert published_configs() == here / "coat_deploy" / "published"


def spec_of(num_classes, **fields):
    return ModelSpec("coat_lite_toy", num_classes, 40, Preprocess((64, 64)), **fields)


def test_labels_are_the_configs_own():
    assert read_labels(spec_of(2, label_names=("cat", "dog"))) == ("cat", "dog")


def test_labels_of_a_set_are_those_shipped():
    labels = read_labels(spec_of(1000, label_set="imagenet-1k"))
    assert (len(labels), labels[0], labels[-1]) == (1000, "tench", "toilet tissue")


def test_labels_without_names_are_numbers():
    assert read_labels(spec_of(2)) == ("class 0", "class 1")


def test_a_network_without_classifier_has_no_labels():
    assert read_labels(spec_of(0, label_set="imagenet-1k")) == ()


@pytest.mark.parametrize("name", ["imagenet", "../imagenet-1k", "/etc/passwd", ".x", "a\0b"])
def test_an_unknown_label_set_is_refused(name):
    with pytest.raises(SpecError, match="not known"):
        read_labels(spec_of(1000, label_set=name))


def test_a_label_set_of_other_classes_is_refused():
    with pytest.raises(SpecError, match=r"got 1000, expected 10"):
        read_labels(spec_of(10, label_set="imagenet-1k"))
