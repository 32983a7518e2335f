"""Write inference_service.json: what KServe's InferenceService may hold, as a JSON schema.

    pip download --no-deps --dest wheels kserve==0.21.0 kubernetes==32.0.1
    python tests/kserve/write_schema.py wheels

Both packages hold classes that were generated from the OpenAPI description of the resource
definition and of Kubernetes. The classes are read, not imported, for their dependencies are many.
Those in KEPT are closed: a field that they do not know is an error, and so is a field of theirs
whose class is not kept, until it is.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACE = Path(__file__).with_name("inference_service.json")
ROOT = "V1beta1InferenceService"
KEPT = (
    ROOT, "V1ObjectMeta", "V1beta1InferenceServiceSpec", "V1beta1PredictorSpec",
    "V1beta1ModelSpec", "V1beta1ModelFormat", "V1beta1AutoScalingSpec", "V1beta1MetricsSpec",
    "V1beta1ExternalMetricSource", "V1beta1ExternalMetrics", "V1beta1MetricTarget",
    "V1Container", "V1ContainerPort", "V1EnvVar", "V1Probe", "V1HTTPGetAction", "V1GRPCAction",
    "V1ResourceRequirements", "V1SecurityContext", "V1Capabilities", "V1SeccompProfile",
    "V1PodSecurityContext", "V1Volume", "V1VolumeMount", "V1EmptyDirVolumeSource",
    "V1PersistentVolumeClaimVolumeSource", "V1LocalObjectReference", "V1Toleration",
)  # fmt: skip

_QUANTITY = {"anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?([mkMGTP]|[KMGTP]i)?$"},
                       {"type": "number"}]}  # fmt: skip
_SCALARS: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "object": {"anyOf": [{"type": "integer"}, {"type": "string"}]},  # a port: number or name
    "ResourceQuantity": _QUANTITY,
    "V1beta1MetricQuantity": _QUANTITY,
}


def classes(wheel: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kept classes of a wheel, by name, as schemas."""
    with zipfile.ZipFile(wheel) as archive:
        for file in archive.namelist():
            if "/models/" in file and file.endswith(".py"):
                source = archive.read(file).decode()
                found = re.search(r"^class (\w+)\(", source, re.MULTILINE)
                if found and found[1] in KEPT:
                    yield found[1], schema(source)


def schema(source: str) -> dict[str, Any]:
    """Return the schema of the class in a file."""
    literals = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("openapi_types", "attribute_map")
    }
    names = literals["attribute_map"]
    required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", source)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {names[key]: field(t) for key, t in literals["openapi_types"].items()},
        "required": sorted({names[key] for key in required}),
    }


def field(kind: str) -> Any:
    """Return the schema of a field of a type as the generated classes write it."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": field(inner[1])}
    if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": field(inner[1])}
    if kind in _SCALARS:
        return _SCALARS[kind]
    return {"$ref": f"#/$defs/{kind}"} if kind in KEPT else False


def main(folder: Path) -> None:
    """Write the schema, of the wheels in a folder."""
    wheels = sorted(folder.glob("*.whl"))
    definitions = dict(found for wheel in wheels for found in classes(wheel))
    missing = set(KEPT) - set(definitions)
    assert not missing, missing
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"Written by write_schema.py, of {', '.join(w.name for w in wheels)}.",
        "$ref": f"#/$defs/{ROOT}",
        "$defs": {name: definitions[name] for name in KEPT},
    }
    PLACE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
