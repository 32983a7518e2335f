"""How long requests wait for their turn, as Prometheus knows it of each server."""

import json

WINDOW = "1m"

QUEUE_TIMES = {
    "coat-deploy": ("coat_queue_seconds_sum", "coat_queue_seconds_count", 1e3),
    "triton": ("nv_inference_queue_duration_us", "nv_inference_request_success", 1e-3),
}
"""Of each server: the metric of time spent in the queue, of requests, and milliseconds a unit."""


def queue_time_query(server: str, model: str) -> str:
    """Return the query for the mean milliseconds in the queue, 0 where nobody asked anything."""
    spent, requests, ms = QUEUE_TIMES[server]
    of_model = f"{{model={json.dumps(model)}}}"
    rates = [f"sum(rate({metric}{of_model}[{WINDOW}]))" for metric in (spent, requests)]
    # Without requests it is 0/0, which is not above 0 and so nothing.
    return f"({ms:g} * {rates[0]} / {rates[1]} > 0) or vector(0)"
