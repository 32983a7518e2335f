"""Label a folder in this process."""

from collections.abc import Generator, Sequence

from coat_deploy.labelling.part import Job, Labelled, Part, label_part


def label_here(job: Job, parts: Sequence[Part]) -> Generator[Labelled]:
    """Label the parts one by one. Raises: as `label_part`."""
    with job.classifier:
        job.classifier.open()
        for part in parts:
            yield label_part(job, part)
