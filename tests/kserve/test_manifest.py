"""Manifests, held against the schema of KServe's resource and against what no schema says."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from coat_deploy.cli.app import app

SCHEMA = json.loads(Path(__file__).with_name("inference_service.json").read_text())
OURS = ("--image", "registry.example/coat:1")
PVC = ("--storage", "pvc://claim/some/models")
S3 = ("--storage", "s3://bucket/models")
TRITON = ("--server", "triton")
KINDS = [
    (*OURS, *PVC),
    (*OURS, *S3, "--namespace", "shop", "--grpc"),
    (*OURS, *S3, "--scale-on", "concurrency", "--replicas", "0,9", "--grpc"),
    (*OURS, *PVC, "--scale-on", "nothing", "--gpus", 1, "--cpu", "500m"),
    (*TRITON, *PVC),
    (*TRITON, *S3, "--gpus", 2, "--grpc", *OURS),
    (*TRITON, *S3, "--scale-on", "concurrency"),
]


@pytest.fixture(scope="session")
def validator():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture
def made(kserve):
    """Return the manifest of a command line, which succeeds."""

    def run(*words):
        ran = kserve(*words)
        assert (ran.status, ran.err) == (0, "")
        return yaml.safe_load(ran.out)

    return run


def predictor(manifest):
    return manifest["spec"]["predictor"]


def container(manifest):
    (only,) = predictor(manifest)["containers"]
    return only


@pytest.mark.parametrize("words", KINDS)
def test_a_manifest_is_what_kserve_takes(made, validator, words):
    manifest = made(*words)
    validator.validate(manifest)
    assert manifest["apiVersion"] == "serving.kserve.io/v1beta1"
    assert manifest["kind"] == "InferenceService"
    assert all(isinstance(v, str) for v in manifest["metadata"]["annotations"].values())


def mappings(value):
    """Every object within a manifest whose keys are fields, not data."""
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key not in ("annotations", "labels", "requests", "limits"):
                yield from mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from mappings(inner)


@pytest.mark.parametrize("words", KINDS)
def test_an_unknown_field_anywhere_would_be_found(made, validator, words):
    manifest = made(*words)
    for i in range(len(list(mappings(manifest)))):
        changed = copy.deepcopy(manifest)
        list(mappings(changed))[i]["mistyped"] = "x"
        assert not validator.is_valid(changed), list(mappings(manifest))[i]


def test_a_value_of_another_type_would_be_found(made, validator):
    manifest = made(*OURS, *PVC)
    predictor(manifest)["minReplicas"] = "1"
    assert not validator.is_valid(manifest)


@pytest.mark.parametrize("words", KINDS)
def test_json_is_the_same_document(made, kserve, words):
    assert kserve(*words, "--json").json == made(*words)


@pytest.mark.parametrize("words", [words for words in KINDS if "triton" not in words])
def test_our_container_is_safe_and_complete(made, words):
    manifest = made(*words)
    server = container(manifest)
    assert server["name"] == "kserve-container"
    security = server["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    volumes = {volume["name"] for volume in predictor(manifest)["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} == volumes
    assert server["resources"]["limits"]["memory"] == "2Gi"
    drain = float(server["args"][server["args"].index("--drain") + 1])
    assert predictor(manifest)["terminationGracePeriodSeconds"] > drain


def test_models_are_mounted_from_a_claim(made):
    manifest = made(*OURS, *PVC)
    (mount,) = (m for m in container(manifest)["volumeMounts"] if m["name"] == "models")
    assert mount == {
        "name": "models", "mountPath": "/models", "subPath": "some/models", "readOnly": True
    }  # fmt: skip
    (volume,) = (v for v in predictor(manifest)["volumes"] if v["name"] == "models")
    assert volume["persistentVolumeClaim"] == {"claimName": "claim", "readOnly": True}
    arguments = container(manifest)["args"]
    assert arguments[arguments.index("--models") + 1] == "/models"
    assert "subPath" not in str(made(*OURS, "--storage", "pvc://claim"))


def test_models_elsewhere_are_fetched_by_kserve(made):
    server = container(made(*OURS, *S3))
    assert {"name": "STORAGE_URI", "value": "s3://bucket/models"} in server["env"]
    assert server["args"][server["args"].index("--models") + 1] == "/mnt/models"


def test_the_first_port_is_that_of_the_protocol_and_knative_gets_no_other(made):
    def ports(*words):
        return [
            (p["name"], p["containerPort"]) for p in container(made(*OURS, *S3, *words))["ports"]
        ]

    assert ports() == [("http1", 8000), ("h2c", 8001)]
    assert ports("--grpc") == [("h2c", 8001), ("http1", 8000)]
    assert ports("--scale-on", "concurrency") == [("http1", 8000)]
    assert ports("--scale-on", "concurrency", "--grpc") == [("h2c", 8001)]


def test_probes_ask_the_port_of_the_service(made):
    server = container(made(*OURS, *S3))
    assert server["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": 8000}
    assert server["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": 8000}
    server = container(made(*OURS, *S3, "--grpc"))
    assert {server[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "readiness")} == {8001}


def test_copies_follow_the_time_in_the_queue(made):
    manifest = made(*OURS, *S3, "--queue-ms", 35, "--prometheus", "http://p:9090")
    (metric,) = predictor(manifest)["autoScaling"]["metrics"]
    assert metric["external"]["target"] == {"type": "Value", "value": "35"}
    assert metric["external"]["metric"]["serverAddress"] == "http://p:9090"
    query = metric["external"]["metric"]["query"]
    assert 'rate(coat_queue_seconds_sum{model="toy"}[1m])' in query
    assert query.startswith("(1000 * ")
    annotations = manifest["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "keda"
    assert annotations["prometheus.kserve.io/port"] == "8000"


def test_tritons_queue_is_counted_in_microseconds(made):
    manifest = made(*TRITON, *S3)
    (metric,) = predictor(manifest)["autoScaling"]["metrics"]
    query = metric["external"]["metric"]["query"]
    assert query.startswith("(0.001 * sum(rate(nv_inference_queue_duration_us")
    assert manifest["metadata"]["annotations"]["prometheus.kserve.io/port"] == "8002"


def test_copies_follow_concurrency_on_knative(made):
    manifest = made(*OURS, *S3, "--scale-on", "concurrency", "--concurrency", 5)
    assert predictor(manifest)["scaleMetric"] == "concurrency"
    assert predictor(manifest)["scaleTarget"] == 5
    annotations = manifest["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Serverless"
    assert "serving.kserve.io/autoscalerClass" not in annotations


def test_triton_gets_the_repository(made):
    model = predictor(made(*TRITON, *S3))["model"]
    assert model["modelFormat"] == {"name": "triton"}
    assert (model["storageUri"], model["protocolVersion"]) == ("s3://bucket/models", "v2")
    assert "image" not in model and "env" not in model
    on_gpu = predictor(made(*TRITON, *S3, "--gpus", 1, "--grpc"))["model"]
    assert on_gpu["protocolVersion"] == "grpc-v2"
    assert on_gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert on_gpu["env"] == [{"name": "NVIDIA_TF32_OVERRIDE", "value": "0"}]


def test_a_copy_computes_on_the_cores_or_the_gpu_that_it_gets(made):
    arguments = container(made(*OURS, *S3, "--cpu", "3"))["args"]
    assert arguments[arguments.index("--threads") + 1] == "3"
    arguments = container(made(*OURS, *S3, "--cpu", "500m"))["args"]
    assert arguments[arguments.index("--threads") + 1] == "1"
    arguments = container(made(*OURS, *S3, "--gpus", 1))["args"]
    assert arguments[arguments.index("--device") + 1] == "cuda"
    assert "--threads" not in arguments


@pytest.mark.parametrize("words", [words for words in KINDS if "triton" not in words])
def test_the_command_in_the_container_is_one_the_program_takes(made, words):
    import typer

    commands = typer.main.get_command(app).commands
    name, *arguments = container(made(*words))["args"]
    commands[name].make_context(name, arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*OURS, "--storage", "/models"), "--storage: cannot be (got '/models', expected pvc://"),
        ((*PVC,), "--image: is needed"),
        (("--image", "my image", *PVC), "--image: cannot be (got 'my image'"),
        ((*OURS, *PVC, "--server", "trito"), "unknown server 'trito'"),
        ((*OURS, *PVC, "--scale-on", "queu"), "Did you mean 'queue'?"),
        ((*OURS, *PVC, "--as", "Shop_1"), "--as: cannot be (got 'Shop_1', expected small letters"),
        ((*OURS, *PVC, "--as", "a" * 54), "--as: must have 1 to 53 characters"),
        ((*OURS, *PVC, "--as", ""), "--as: must have 1 to 53 characters (got '')"),
        ((*OURS, *PVC, "--namespace", "-a"), "--namespace: cannot be"),
        ((*OURS, *PVC, "--memory", "2 GB"), "--memory: cannot be (got '2 GB', expected bytes as"),
        ((*OURS, *PVC, "--cpu", "two"), "--cpu: cannot be (got 'two', expected cores as 2 or"),
        ((*OURS, *PVC, "--replicas", "4,1"), "replicas: cannot be (got 4,1"),
        ((*OURS, *PVC, "--replicas", "a"), "--replicas: must be least,most"),
        ((*OURS, *PVC, "--replicas", "0,2"), "none at all is for --scale-on concurrency"),
        ((*OURS, *PVC, "--gpus", -1), "gpus: must be 0 or more"),
        ((*OURS, *PVC, "--queue-ms", 0), "queue-ms: must be 1 or more"),
        ((*OURS, *PVC, "--target", "eager"), "target eager: is not served"),
        ((*OURS, *PVC, "--target", "nope"), "unknown target 'nope'"),
    ],
)
def test_what_cannot_be_is_refused(kserve, words, message):
    ran = kserve(*words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_a_model_without_the_artifact_is_told_how_to_export_it(kserve):
    ran = kserve(*OURS, *PVC, "--target", "tensorrt")
    assert (ran.status, ran.out) == (1, "")
    assert "Run: coat-deploy export toy --target tensorrt" in ran.err


def test_feature_maps_are_for_triton_alone(kserve, only_features):
    assert kserve(*TRITON, *S3).status == 0
    ran = kserve(*OURS, *S3)
    assert (ran.status, ran.out) == (1, "")
    assert "no artifact for onnxruntime (there: onnxruntime-fp32)" in ran.err


def test_an_engine_needs_a_gpu(kserve, engine):
    words = (*OURS, *PVC, "--target", "tensorrt", "--precision", "fp16")
    ran = kserve(*words)
    assert ran.status == 2
    assert "an engine needs a GPU. Ask for it with --gpus 1." in ran.err
    assert kserve(*words, "--gpus", 1).status == 0


@pytest.mark.parametrize(
    ("model", "name"), [("coat_lite_tiny", "coat-lite-tiny"), ("Shop.v2", "shop-v2"), ("7up", None)]
)
def test_a_name_is_made_of_the_models(kserve, renamed, model, name):
    renamed(model)
    ran = kserve(*OURS, *PVC, model=model)
    if name:
        assert yaml.safe_load(ran.out)["metadata"]["name"] == name
        assert model in container(yaml.safe_load(ran.out))["args"]
    else:
        assert ran.status == 2
        assert "no name for Kubernetes can be made of it" in ran.err
