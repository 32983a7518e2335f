"""The OpenAPI document against the routes, and requests made from it against the answers."""

import copy
import io
import json
import re
from graphlib import TopologicalSorter

import pytest
import schemathesis
from hypothesis import strategies as st
from openapi_spec_validator import validate
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.config import (
    ChecksConfig,
    GenerationConfig,
    NotAServerErrorConfig,
    ProjectConfig,
    ProjectsConfig,
)

from coat_deploy.serve import binary
from coat_deploy.serve.http import all_routes, build_app
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.openapi import document
from coat_deploy.serve.replies import JSON, OCTETS

METHODS = {"get", "post"}
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
)
SEED, EXAMPLES = 7, 12


def images():
    """What is sent as an image: one now and then."""
    content = io.BytesIO()
    Image.linear_gradient("L").save(content, "PNG")
    return st.sampled_from([content.getvalue(), content.getvalue()[:-40]]) | st.binary(max_size=64)


schemathesis.openapi.media_type(OCTETS, images())


def described():
    """Every (method, path) of the document."""
    paths = document()["paths"].items()
    return {(method, path) for path, item in paths for method in METHODS & set(item)}


def test_it_is_an_openapi_document():
    validate(document())


def test_every_route_is_described_and_nothing_else(shared_service):
    routes = {
        (method.lower(), route.path)
        for route in all_routes(shared_service, Metrics())
        for method in route.methods - {"HEAD"}
    }
    assert routes == described() and len(routes) > 20


def test_it_is_served_to_everyone(http, shared_service):
    answer = http(shared_service, token="a-token-that-is-long-enough").get("/openapi.json")
    assert answer.status_code == 200 and answer.json() == document()


def test_operations_have_names_of_their_own():
    items = [item[m] for item in document()["paths"].values() for m in METHODS & set(item)]
    names = [item["operationId"] for item in items]
    assert len(set(names)) == len(names)


def api():
    """The document, whose requests are of models that are served, or of none by that name."""
    described = copy.deepcopy(document())
    parameters = described["components"]["parameters"]
    parameters["name"]["schema"]["enum"] = ["coat_toy", "coat_lite_toy", "no_such"]
    parameters["version"]["schema"]["enum"] = ["1", "2"]
    generation = GenerationConfig(
        modes=list(GenerationMode), max_examples=EXAMPLES, deterministic=True, database="none"
    )
    # A request may ask for an answer sooner than there can be one.
    late = NotAServerErrorConfig(expected_statuses=["2xx", "3xx", "4xx", 504])
    checks = ChecksConfig(not_a_server_error=late)
    projects = ProjectsConfig(default=ProjectConfig(generation=generation, checks=checks))
    config = schemathesis.Config(seed=SEED, projects=projects)
    return schemathesis.openapi.from_dict(described, config=config)


def test_no_schema_is_part_of_itself():
    """Generators of clients leave such a schema out, and every operation that needs it."""
    schemas = document()["components"]["schemas"]
    parts = {
        name: set(re.findall("#/components/schemas/([A-Za-z]+)", json.dumps(schema)))
        for name, schema in schemas.items()
    }
    tuple(TopologicalSorter(parts).static_order())  # raises for what goes round


@pytest.fixture(scope="module")
def application(shared_service):
    return build_app(shared_service, Metrics())


@api().parametrize()
def test_answers_are_as_described(case, application):
    case.operation.schema.app = application
    if case.media_type == JSON and case.headers.get(binary.HEADER_LENGTH) == "0":
        del case.headers[binary.HEADER_LENGTH]  # with it no JSON is read
    case.call_and_validate(checks=CHECKS.get_by_names(CHECKED), app=application)
