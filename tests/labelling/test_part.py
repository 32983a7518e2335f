import json
import shutil
from dataclasses import replace

import pytest

from coat_deploy.errors import LabellingError
from coat_deploy.labelling.folder import open_job, plan_images
from coat_deploy.labelling.part import label_part


@pytest.fixture
def job(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier) as opened:
        yield opened


def test_a_machine_that_sees_all_is_taken(job):
    job.check()


def test_a_machine_without_the_model_is_told(job):
    job.classifier.source.model.folder.rmdir()
    with pytest.raises(LabellingError, match="no such model folder on .*mount it there"):
        job.check()


@pytest.mark.parametrize("empty", [False, True])
def test_a_machine_without_the_images_is_told(empty, job):
    shutil.rmtree(job.images)
    if empty:
        job.images.mkdir()
    with pytest.raises(LabellingError, match="no such folder of images, or an empty one"):
        job.check()


@pytest.mark.parametrize("content", [None, "{}", json.dumps({"id": "another's"})])
def test_a_machine_with_another_folder_of_that_name_is_told(content, job):
    (job.out / "_manifest.json").unlink()
    if content:
        (job.out / "_manifest.json").write_text(content)
    with pytest.raises(LabellingError, match="not the folder of these labels"):
        job.check()


def test_a_machine_with_another_version_is_told(job):
    with pytest.raises(LabellingError, match=r"another version \(got .*, expected 0.0.0\)"):
        replace(job, version="0.0.0").check()


def test_images_that_vanished_with_their_folder_are_no_rows(job):
    parts = plan_images(job, 4)
    shutil.rmtree(job.images)
    with pytest.raises(LabellingError, match="no such folder of images"):
        label_part(job, parts[0])
    assert not list(job.out.glob("part-*"))
