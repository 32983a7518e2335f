"""What of the cluster's engine needs no cluster."""

import pytest

from coat_deploy.errors import LabellingError
from coat_deploy.labelling.cluster import TRIES, trying
from coat_deploy.labelling.folder import open_job, plan_images


class Died(BaseException):
    """A worker's end, which leaves everything as it is."""


def die(job, part):
    with trying(job, part):
        raise Died


def test_a_part_that_workers_die_of_is_given_up_by_name(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier) as job:
        first, second = plan_images(job, 3)
        for _ in range(TRIES):
            with pytest.raises(Died):
                die(job, first)
        words = r"000000.parquet: 4 workers died .*\(a/1.jpg to b/1.jpg\)"
        with pytest.raises(LabellingError, match=words):
            die(job, first)
        with pytest.raises(Died):
            die(job, second)
    with open_job(images, tmp_path / "out", classifier) as job, pytest.raises(Died):
        die(job, first)  # who runs it again has changed something


def test_a_part_that_is_done_leaves_no_trace(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier) as job:
        (part,) = plan_images(job, 5)
        for _ in range(TRIES + 1):
            with trying(job, part):
                pass
        assert not list(job.out.glob(".*"))
