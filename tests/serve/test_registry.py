import asyncio
import json
import shutil

import numpy as np
import pytest

from coat_deploy.errors import CorruptArtifact, RepositoryError, RequestError, UsageError
from coat_deploy.serve.requests import InferRequest, Tensor

PIXELS = np.linspace(-1, 1, 3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)


def request(name="coat_lite_toy"):
    return InferRequest(name, (Tensor("pixels", "FP32", PIXELS.shape, PIXELS),))


async def logits(service, name="coat_lite_toy"):
    return (await service.infer(request(name))).outputs[0].data


def states(service):
    return {entry.name: entry.state for entry in asyncio.run(service.index())}


def test_every_model_with_an_artifact_is_served(serving):
    service = serving()
    assert service.ready
    assert [card["name"] for card in service.cards()] == ["coat_lite_toy", "coat_toy"]
    assert states(service) == {"coat_lite_toy": "READY", "coat_toy": "READY"}


def test_only_named_models_are_served(serving):
    service = serving(names=("coat_toy",))
    assert states(service) == {"coat_lite_toy": "UNAVAILABLE", "coat_toy": "READY"}
    with pytest.raises(RequestError, match="not served") as unknown:
        asyncio.run(service.infer(request()))
    assert unknown.value.kind == "not_found"


def test_a_model_named_twice_is_refused(serving, models):
    with pytest.raises(UsageError, match="named twice"):
        serving(names=("coat_toy", f"{models}/coat_toy"))


def test_nothing_to_serve_names_the_command_that_exports(serving, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RepositoryError, match="coat-deploy export"):
        serving(models=tmp_path / "empty")


def test_an_artifact_that_is_damaged_is_not_served(serving, models):
    path = models / "coat_toy" / "1" / "onnxruntime-fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact):
        serving()


def test_a_precision_that_was_not_exported_is_told(serving):
    with pytest.raises(RepositoryError, match="--precision int8"):
        serving(names=("coat_toy",), precision="int8")


def test_a_target_that_has_the_precision_is_told(serving):
    with pytest.raises(RepositoryError, match="--target openvino --precision bf16"):
        serving(names=("coat_toy",), precision="bf16")


def test_eager_is_not_served(serving):
    with pytest.raises(UsageError, match="eager"):
        serving(names=("coat_toy",), target="eager")


def test_a_changed_folder_is_served_anew_and_no_request_is_lost(serving, models, export_toy):
    service = serving()

    async def main():
        before = await logits(service)
        under_way = [asyncio.create_task(logits(service)) for _ in range(20)]
        await asyncio.sleep(0)
        await asyncio.to_thread(export_toy, models, "coat_lite_toy", 1)
        refreshing = asyncio.create_task(service.registry.refresh())
        while not refreshing.done():
            under_way.append(asyncio.create_task(logits(service)))
            await asyncio.sleep(0.002)
        answers = await asyncio.gather(*under_way)
        return before, answers, await logits(service)

    before, answers, after = asyncio.run(main())
    assert np.abs(after - before).max() > 1e-3
    assert all(np.array_equal(a, before) or np.array_equal(a, after) for a in answers)


def test_an_unchanged_folder_is_left_alone(serving, models):
    service = serving()
    config = models / "coat_toy" / "config.json"
    config.write_text(config.read_text())  # another file, of the same content
    served = service.registry.get("coat_toy")
    asyncio.run(service.registry.refresh())
    assert service.registry.get("coat_toy") is served


def test_new_labels_are_served(serving, models, export_toy):
    service = serving()
    path = models / "coat_toy" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"label_names": ["a", "b", "c", "d", "e"]}))
    export_toy(models, "coat_toy")
    asyncio.run(service.registry.refresh())
    assert service.registry.get("coat_toy").labels == ("a", "b", "c", "d", "e")


def test_a_broken_new_version_leaves_the_old_one_serving_and_says_so(serving, models, caplog):
    service = serving()
    manifest = models / "coat_toy" / "manifest.json"
    manifest.write_text(manifest.read_text() + "rubbish")

    async def main():
        before = await logits(service, "coat_toy")
        for _ in range(5):
            await service.registry.refresh()
        return before, await logits(service, "coat_toy")

    before, after = asyncio.run(main())
    assert np.array_equal(before, after) and service.ready
    assert caplog.text.count("is served as it was before") == 1


def test_a_folder_that_is_gone_is_served_on(serving, models):
    service = serving()
    shutil.rmtree(models / "coat_toy")

    async def main():
        await service.registry.refresh()
        return await logits(service, "coat_toy")

    assert asyncio.run(main()).shape == (1, 5)


def test_clients_may_not_load_or_unload_unless_allowed(serving):
    service = serving()
    for call in (service.load, service.unload):
        with pytest.raises(RequestError) as refused:
            asyncio.run(call("coat_toy"))
        assert refused.value.kind == "forbidden"


def test_models_are_unloaded_and_loaded_again(serving):
    service = serving(allow_load=True)

    async def main():
        before = await logits(service, "coat_toy")
        await service.unload("coat_toy")
        assert service.model_ready("coat_toy") is False
        with pytest.raises(RequestError, match="unloaded") as gone:
            await logits(service, "coat_toy")
        assert gone.value.kind == "unavailable"
        await service.load("coat_toy")
        return before, await logits(service, "coat_toy")

    before, after = asyncio.run(main())
    assert np.array_equal(before, after)
    assert states(service) == {"coat_lite_toy": "READY", "coat_toy": "READY"}


def test_a_model_that_was_not_served_can_be_loaded_by_name_but_not_by_path(serving, models):
    service = serving(allow_load=True, names=("coat_toy",))
    for name in ("../models/coat_lite_toy", str(models / "coat_lite_toy"), "", "no_such"):
        with pytest.raises(RequestError, match="not in the repository"):
            asyncio.run(service.load(name))
    asyncio.run(service.load("coat_lite_toy"))
    assert states(service) == {"coat_lite_toy": "READY", "coat_toy": "READY"}


def test_a_load_that_fails_leaves_what_was_served(serving, models):
    service = serving(allow_load=True)
    path = models / "coat_toy" / "1" / "onnxruntime-fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1])

    async def main():
        with pytest.raises(RequestError, match="not the one that was exported"):
            await service.load("coat_toy")
        return await logits(service, "coat_toy")

    assert asyncio.run(main()).shape == (1, 5)
