"""repositories.yaml is read strictly: each mistake names the field, the rule and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from temporalio.exceptions import ApplicationError

from activities.config import CONFIG
from activities.workspace.repositories import find_repository, load_repositories
from workflows.models.errors import ErrorType
from workflows.models.workspace import Limits, Repository
from workflows.rules.repository_urls import url_problem

URL = "https://git.example.org/team/sample.git"


def load(tmp_path: Path, entry: dict[str, Any], key: str = "sample") -> dict[str, Repository]:
    file = tmp_path / "repositories.yaml"
    file.write_text(yaml.safe_dump({"repositories": {key: entry}}))
    return load_repositories(file)


def refusal(tmp_path: Path, entry: dict[str, Any], key: str = "sample") -> str:
    with pytest.raises(ApplicationError) as refused:
        load(tmp_path, entry, key)
    assert refused.value.type == ErrorType.INVALID_CONFIG
    assert refused.value.non_retryable
    return refused.value.message


SHIPPED = CONFIG / "repositories.yaml"


def test_the_shipped_file_names_the_sample_where_its_variable_is_set() -> None:
    url = "file:///srv/sample.git"

    assert load_repositories(SHIPPED) == {}
    assert load_repositories(SHIPPED, {"SAMPLE_REPOSITORY": ""}) == {}
    assert load_repositories(SHIPPED, {"SAMPLE_REPOSITORY": url})["sample"].url == url


def test_a_variable_in_a_url_does_not_get_around_its_rules(tmp_path: Path) -> None:
    file = tmp_path / "repositories.yaml"
    entry = {"url": "https://${HOST}/team/sample.git"}
    file.write_text(yaml.safe_dump({"repositories": {"sample": entry}}))

    found = load_repositories(file, {"HOST": "git.example.org"})
    assert found["sample"].url == URL
    with pytest.raises(ApplicationError, match=r"sample\.url: a URL has no credentials") as refused:
        load_repositories(file, {"HOST": "user:secret@git.example.org"})
    assert refused.value.type == ErrorType.INVALID_CONFIG
    assert "secret" not in refused.value.message


def test_the_example_in_the_shipped_file_is_valid(tmp_path: Path) -> None:
    text = (CONFIG / "repositories.yaml").read_text()
    example = text[text.index("# repositories:") : text.index("\nrepositories:")]
    file = tmp_path / "repositories.yaml"
    file.write_text("\n".join(line.removeprefix("# ") for line in example.splitlines()))

    sample = load_repositories(file)["shop"]

    assert sample.limits == Limits(steps=40, seconds=900, memory_bytes=2 * 1024**3, processes=256)
    assert sample.unit.startswith("pytest -q --junitxml=$REPORTS/unit.xml")
    assert sample.open_paths == [".github/dependabot.yml"]


def test_what_an_entry_leaves_out_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, {"url": URL}) == {"sample": Repository(key="sample", url=URL)}


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({}, ["repositories.sample.url", "required; add it"]),
        ({"url": URL, "branch": "main"}, ["sample.branch", "unknown field"]),
        ({"url": URL, "push": "yes please"}, ["sample.push", "valid boolean"]),
        ({"url": URL, "base": "-x"}, ["sample.base", "not the name of a branch"]),
        ({"url": URL, "base": "a..b"}, ["sample.base", "not the name of a branch"]),
        ({"url": URL, "base": "a.lock"}, ["sample.base", "not the name of a branch"]),
        ({"url": URL, "base": "a:b"}, ["sample.base", "not the name of a branch"]),
        ({"url": URL, "base": ""}, ["sample.base", "not the name of a branch"]),
        ({"url": URL, "base": "story/US-1"}, ["sample.base", "a name that the fleet uses"]),
        ({"url": URL, "base": "refs/heads/main"}, ["sample.base", "a name that the fleet uses"]),
        ({"url": URL, "open_paths": ["/x"]}, ["sample.open_paths", "neither begins"]),
        ({"url": URL, "test_paths": ["a/../b"]}, ["sample.test_paths", "'..'"]),
        ({"url": URL, "limits": {"memory": "2GB"}}, ["limits.memory", "write a number and KiB"]),
        ({"url": URL, "limits": {"memory": "1KiB"}}, ["sample.limits", "memory_bytes"]),
        ({"url": URL, "limits": {"steps": 0}}, ["sample.limits", "steps"]),
        ({"url": URL, "limits": {"ram": 1}}, ["sample.limits.ram", "unknown field"]),
        ({"url": URL, "unit": "x" * 4_001}, ["sample.unit", "4000"]),
    ],
)
def test_a_mistake_is_named_with_its_field(
    entry: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    message = refusal(tmp_path, entry)

    for part in parts:
        assert part in message


@pytest.mark.parametrize("base", ["main", "release/1.x", "feature_1", "ünïcode"])
def test_ordinary_branches_are_taken(base: str, tmp_path: Path) -> None:
    assert load(tmp_path, {"url": URL, "base": base})["sample"].base == base


def test_a_key_with_capitals_or_spaces_is_refused(tmp_path: Path) -> None:
    assert "repositories.My Repo" in refusal(tmp_path, {"url": URL}, key="My Repo")


def test_a_file_without_the_top_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "repositories.yaml"
    file.write_text("")
    with pytest.raises(ApplicationError, match="repositories"):
        load_repositories(file)


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "ssh://git@git.example.org:2222/team/sample.git",
        "git@git.example.org:team/sample.git",
        "file:///srv/git/sample.git",
        "http://127.0.0.1:3000/sample.git",
    ],
)
def test_a_url_of_a_known_transport_is_taken(url: str) -> None:
    assert url_problem(url) == ""


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://token@git.example.org/x", "no credentials"),
        ("https://user:secret@git.example.org/x", "no credentials"),
        ("https://:secret@git.example.org/x", "no credentials"),
        ("ssh://git:secret@git.example.org/x", "no credentials"),
        ("https://git.example.org/x?private_token=secret", "no query"),
        ("https://git.example.org/x#secret", "no query"),
        ("ext::sh -c touch% /tmp/x", "no spaces"),
        ("ext::touch", "not a transport"),
        ("ext::ssh://x/y", "not a transport"),
        ("git://git.example.org/x", "not a transport"),
        ("ftp://git.example.org/x", "not a transport"),
        ("http://git.example.org/x", "use https"),
        ("--upload-pack=touch", "no leading '-'"),
        ("ssh://-oProxyCommand=touch/x", "names a host"),
        ("-oProxyCommand=touch@host:x", "no leading '-'"),
        ("/srv/git/sample.git", "write file:///"),
        ("../sample.git", "write file:///"),
        ("C:\\git\\sample", "write file:///"),
        ("file://host/srv/x", "without a host"),
        ("file:///", "without a host"),
        ("https:///x", "names a host"),
        ("https://git.example.org:port/x", "is not a URL"),
        ("", "write file:///"),
        ("https://git.example.org/x\n", "no spaces"),
    ],
)
def test_any_other_url_is_refused_without_its_secret(url: str, rule: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, {"url": url})

    assert rule in message
    assert "repositories.sample.url" in message
    assert "secret" not in message


def test_a_story_that_names_no_entry_is_refused_with_the_keys(tmp_path: Path) -> None:
    repositories = load(tmp_path, {"url": URL})

    assert find_repository(repositories, "sample").url == URL
    with pytest.raises(ApplicationError, match=r"has no 'simple'; it has: sample") as refused:
        find_repository(repositories, "simple")
    assert refused.value.type == ErrorType.UNKNOWN_REPOSITORY
