import json
import pickle

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from coat_deploy.classifier import Classifier, NamedImage  # noqa: E402
from coat_deploy.errors import ImageError, RunnerError, StaleArtifact  # noqa: E402
from coat_deploy.export import ExportOptions, export  # noqa: E402
from coat_deploy.images import load  # noqa: E402
from coat_deploy.labels import top_labels  # noqa: E402
from coat_deploy.measure.proof import probe_images  # noqa: E402
from coat_deploy.model import ArtifactQuery  # noqa: E402
from coat_deploy.open import find_source, open_source  # noqa: E402
from coat_deploy.repository import Repository  # noqa: E402
from coat_deploy.runner import LOGITS, LoadOptions  # noqa: E402
from coat_deploy.spec import ModelSpec, Preprocess  # noqa: E402

SPEC = ModelSpec("coat_lite_toy", 10, 40, Preprocess((64, 64)))
LABELS = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    (models / "mine").mkdir()
    (models / "mine" / "config.json").write_text(json.dumps(SPEC.to_json()))
    model = export(
        Repository.open(models), "mine", ExportOptions(weights="random:0", threads=1)
    ).model
    return find_source(model, ArtifactQuery("onnxruntime"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"{i}.png" for i in range(5)]
    for file, pixels in zip(files, probe_images((90, 120), 5), strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file)
    return files


def classifier(source, batch=2, top=3):
    return Classifier(source, LoadOptions(threads=1, batch=batch), top)


def expected(source, photos):
    pixels = np.stack([load(photo, SPEC.preprocess) for photo in photos])
    with open_source(source, LoadOptions(threads=1)) as runner:
        logits = runner.run(pixels)[LOGITS]
    return [top_labels(row, LABELS, 3) for row in logits]


def names(answers):
    return [[one["label"] for one in answer] for answer in answers]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_answers_are_those_of_the_artifact_in_any_batch(batch, source, photos):
    with classifier(source, batch) as classify:
        answers = classify([NamedImage(photo.name, photo) for photo in photos])
    wanted = expected(source, photos)
    assert names(answers) == names(wanted)
    scores = [[one["score"] for one in answer] for answer in answers]
    wanted = [[one["score"] for one in answer] for answer in wanted]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_a_pickled_one_answers_from_any_folder(source, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(source.model.folder.parent)
    model = type(source.model)(source.model.folder.relative_to(source.model.folder.parent))
    with classifier(type(source)(model, source.target, source.artifact)) as classify:
        classify.open()
        sent = pickle.dumps(classify)
    monkeypatch.chdir(tmp_path)
    with pickle.loads(sent) as classify:
        answers = classify([NamedImage(photo.name, photo.read_bytes()) for photo in photos])
    assert names(answers) == names(expected(source, photos))


def test_a_broken_image_keeps_its_place_and_holds_nobody_up(source, photos):
    asked = [NamedImage(photo.name, photo) for photo in photos]
    asked[1:3] = [NamedImage("a/bad.jpg", b""), NamedImage("gone.jpg", photos[0].parent / "gone")]
    with classifier(source) as classify:
        first, empty, gone, *rest = classify(asked)
        assert classify(asked[1:3])[0].args == empty.args
    wanted = expected(source, photos)
    assert names([first, *rest]) == names([wanted[0], *wanted[3:]])
    assert isinstance(empty, ImageError) and "a/bad.jpg: the file is empty" in str(empty)
    assert isinstance(gone, ImageError) and "gone.jpg: cannot be read" in str(gone)


def test_logits_that_mean_nothing_are_the_answer_of_their_image_alone(source, photos):
    class Runner:
        def run(self, pixels):
            return {LOGITS: np.array([[np.nan] * 10, [0.0] * 9 + [1.0]], np.float32)}

        def __exit__(self, *told):
            pass

    classify = classifier(source)
    classify._runner = Runner()
    bad, good = classify([NamedImage(photo.name, photo) for photo in photos[:2]])
    assert isinstance(bad, RunnerError)
    assert good[0]["label"] == "class 9"


def test_an_artifact_that_changed_under_way_is_refused(source):
    classify = classifier(source)
    classify.sha256 = "0" * 64
    with pytest.raises(StaleArtifact, match="changed under way"):
        classify.open()
