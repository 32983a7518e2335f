import base64
import hashlib

from coat_deploy.serve import page


def test_the_policy_allows_the_pages_own_blocks_and_nothing_else(http, shared_service, monkeypatch):
    script, style = "let a = '<b>';\n", "p { color: red }"
    content = f"<!doctype html><style>{style}</style><p>hi<script type=module>{script}</script>"
    monkeypatch.setattr(page, "_read", lambda: content)
    answer = http(shared_service).get("/")
    assert (answer.status_code, answer.text) == (200, content)
    assert answer.headers["content-type"].startswith("text/html")
    rules = answer.headers["content-security-policy"].split("; ")
    for name, block in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in rules
    assert "default-src 'none'" in rules and "frame-ancestors 'none'" in rules


def test_without_a_page_that_is_told(http, shared_service, monkeypatch):
    monkeypatch.setattr(page, "_read", lambda: "")
    answer = http(shared_service).get("/")
    assert answer.status_code == 404 and "has no page" in answer.json()["error"]
