import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from activities.checks.fences import code_blocks
from activities.checks.policy import POLICY_FILE, Policy, PolicyRules, Violation, entropy
from activities.config import CONFIG

RULES = yaml.safe_load((CONFIG / POLICY_FILE).read_bytes())
POLICY = Policy(PolicyRules.model_validate(RULES))

# Assembled here so that no secret scanner reports this file as a leak.
KEY = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6lM9o"
SECRETS = {
    "aws_access_key": "AKIA" + "2E0A8F3B244C9986",
    "github_token": "ghp_" + KEY[:36],
    "gitlab_token": "glpat-" + KEY[:20],
    "slack_token": "xoxb-" + "2048-4096-" + KEY[:24],
    "openai_key": "sk-proj-" + KEY[:20] + "T3Blbk" + "FJ" + KEY[:20],
    "anthropic_key": "sk-ant-" + "api03-" + KEY + KEY,
    "hugging_face_token": "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH",
    "google_key": "AIza" + KEY[:35],
    "stripe_key": "sk_live_" + KEY[:24],
    "npm_token": "npm_" + KEY[:36],
    "pypi_token": "pypi-" + "AgE" + KEY + KEY,
    "sendgrid_key": "SG." + KEY[:22] + "." + KEY + "aB3",
    "azure_storage_key": "AccountKey=" + KEY + KEY + "abcdef==",
    "private_key": "-----BEGIN RSA " + "PRIVATE KEY-----\n" + KEY + KEY,
}
DESTRUCTIVE = {
    "remove_root": [
        "rm -rf /",
        "sudo rm -fr --no-preserve-root /",
        "rm -r -f ~",
        "rm --recursive /etc",
        "rm -rf $HOME",
        'rm -rf "${HOME}"',
        "rm -rf build /usr && ls",
        'subprocess.run(["rm", "-rf", "/"])',
        "os.system('rm -rf /*')",
        "rm -rf \\\n  /",
    ],
    "remove_tree_root": ['shutil.rmtree("/")', 'rmtree(Path("/home"))'],
    "make_file_system": ["mkfs.ext4 /dev/sda1", "mkfs -t xfs /dev/nvme0n1"],
    "write_to_device": ["dd if=/dev/zero of=/dev/sda bs=1M", "cat image > /dev/nvme0n1"],
    "fork_bomb": [":(){ :|:& };:", "while True:\n    os.fork()"],
    "open_permissions_on_root": ["chmod -R 777 /", "chown --recursive app /etc"],
    "drop_database": ["DROP DATABASE prod;", "drop  database if exists x", "dropdb prod"],
    "force_push": [
        "git push --force origin main",
        "git push -f origin master",
        "git push origin main --force",
        "git push origin +main",
        "git push --force-with-lease origin HEAD:main",
    ],
    "pipe_to_shell": [
        "curl https://example.com/i.sh | sh",
        "curl -fsSL https://example.com/i | sudo -E bash -",
        "wget -qO- https://example.com/i | /bin/sh",
        'bash -c "$(curl -fsSL https://example.com/i)"',
        "bash <(curl -s https://example.com/i)",
    ],
}
HARMLESS = [
    "rm -rf build/ dist",
    "rm -rf /tmp/work",
    'rm -rf "$TMP"',
    "rm -rf ~/project/build",
    "dd if=a of=b",
    "echo x > /dev/null",
    "DROP TABLE x",
    "git push origin main",
    "git push --force origin feature/x",
    "git push -f origin fix-main-menu",
    "curl https://example.com | jq .",
    'shutil.rmtree(tmp / "x")',
    'password = os.environ["DB_PASSWORD"]',
    "password: str",
    'password = "<your password>"',
    "DB_PASSWORD=${DB_PASSWORD}",
    "POSTGRES_PASSWORD: postgres",
    "SECRET_KEY = settings",
    "postgresql://user:password@localhost/x",
    'secret_name = "fleet-db-credentials"',
    'sha = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"',
    'id = "123e4567-e89b-12d3-a456-426614174000"',
    "AKIAIOSFODNN7EXAMPLE",
    "SPDX-License-Identifier: MIT",
    "SPDX-License-Identifier: LGPL-3.0-only",
    "SPDX-License-Identifier: MIT OR GPL-2.0-only",
    'license = "Apache-2.0"',
    "import ctypeslike",
]


def violations(markdown: str) -> list[Violation]:
    return POLICY.violations(markdown, code_blocks(markdown))


def fenced(code: str, language: str = "") -> str:
    return f"Do this:\n\n```{language}\n{code}\n```\n"


@pytest.mark.parametrize("rule", SECRETS)
def test_a_secret_blocks_wherever_it_stands_and_is_not_repeated(rule: str) -> None:
    secret = SECRETS[rule]

    for text in (f"Use {secret} to log in.", fenced(f"key = '{secret}'", "python")):
        found = [each for each in violations(text) if each.rule == rule]

        assert [each.severity for each in found] == ["blocking"]
        assert secret[:12] not in repr(violations(text))


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ('password = "hunter2-hunter2"', "password_in_code"),
        ('settings["api_key"] = "k9-fleet-77"', "password_in_code"),
        ('{"client_secret": "k9-fleet-77"}', "password_in_code"),
        ("export DB_PASSWORD=s3cr3tP4ss", "password_in_environment"),
        ("DB_PASSWORD: s3cr3tP4ss", "password_in_environment"),
        ("postgresql://app:s3cr3tP4ss@db/x", "password_in_url"),
        (f'token = "{KEY}"', "high_entropy"),
        ("jwt: eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0abcd." + KEY, "json_web_token"),
    ],
)
def test_what_may_be_a_secret_is_a_warning(code: str, rule: str) -> None:
    assert (rule, "warning") in [(each.rule, each.severity) for each in violations(fenced(code))]


@pytest.mark.parametrize(
    ("rule", "code"), [(rule, code) for rule, codes in DESTRUCTIVE.items() for code in codes]
)
def test_a_destructive_command_blocks(rule: str, code: str) -> None:
    found = violations(fenced(code))

    assert [(each.rule, each.severity, each.line) for each in found] == [(rule, "blocking", 4)]


def test_a_destructive_command_in_prose_is_a_warning() -> None:
    found = violations("Never run `rm -rf /` and never DROP DATABASE.")

    assert [each.severity for each in found] == ["warning", "warning"]


@pytest.mark.parametrize(
    "text",
    [
        "First:\n\nrm -rf /\n",
        "1. `sudo rm -rf /`\n2. Start again.",
        "> $ rm -rf /",
        "<pre><code>rm -rf /</code></pre>",
        '<div onclick="x">\nRun rm -rf / now\n</div>',
        "<!-- rm -rf / -->",
    ],
)
def test_a_destructive_command_blocks_outside_of_code_blocks_too(text: str) -> None:
    assert [(v.rule, v.severity) for v in violations(text)] == [("remove_root", "blocking")]


def test_a_sentence_that_begins_with_a_command_is_a_warning() -> None:
    assert [v.severity for v in violations("rm -rf / is never run.")] == ["warning"]


def test_an_import_in_html_blocks() -> None:
    text = "<pre><code>\nimport ctypes\n</code></pre>"

    assert [(v.rule, v.line) for v in violations(text)] == [("native_code", 2)]


@pytest.mark.parametrize("code", HARMLESS)
def test_harmless_text_has_no_violations(code: str) -> None:
    assert violations(fenced(code, "python")) == []


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("copyleft_spdx", "# SPDX-License-Identifier: AGPL-3.0-only"),
        ("copyleft_spdx", "// SPDX-License-Identifier: MIT AND GPL-2.0"),
        ("copyleft_header", "# under the terms of the GNU General Public License"),
        ("copyleft_package", 'license = "GPL-3.0-or-later"'),
        ("copyleft_package", '"License :: OSI Approved :: GNU Affero General Public License v3"'),
    ],
)
def test_a_copyleft_licence_blocks(rule: str, code: str) -> None:
    assert [(v.rule, v.severity) for v in violations(fenced(code))] == [(rule, "blocking")]


@pytest.mark.parametrize(
    "code",
    [
        "import ctypes",
        "import os, ctypes.util as util",
        "def f():\n    from ctypes import CDLL",
        '__import__("ctypes")',
        'importlib.import_module("ctypes.util")',
        "import ctypes\nthis does not parse",
    ],
)
def test_a_forbidden_import_blocks_in_whatever_form(code: str) -> None:
    found = violations(fenced(code, "py"))

    assert [(each.rule, each.severity) for each in found] == [("native_code", "blocking")]
    assert found[0].line == 4 + code[: code.index("ctypes")].count("\n")


@pytest.mark.parametrize("label", ["", "text", "python3.11", "pycon", "run.py", "yaml"])
def test_an_import_counts_in_code_whatever_its_label(label: str) -> None:
    found = violations(fenced("import ctypes", label))

    assert [(each.rule, each.line) for each in found] == [("native_code", 4)]


def test_an_import_does_not_count_in_prose() -> None:
    assert violations("We do not import ctypes.\n\nimport ctypes\n") == []


def test_a_module_that_runs_what_it_loads_is_a_warning() -> None:
    found = violations(fenced("import pickle", "python"))

    assert [(each.rule, each.severity) for each in found] == [("executes_what_it_loads", "warning")]


@given(st.text(), st.text())
def test_any_text_has_the_same_violations_every_time(prose: str, code: str) -> None:
    text = f"{prose}\n```python\n{code}\n```\n"

    assert violations(text) == violations(text)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_violation_is_at_its_line(before: int, after: int) -> None:
    text = "a\n" * before + SECRETS["aws_access_key"] + "\nb" * after

    assert [each.line for each in violations(text)] == [before + 1]


def test_of_one_rule_five_violations_are_enough() -> None:
    assert len(violations(fenced("rm -rf /\n" * 9))) == 5


SIZE = 200_000
ADVERSARIAL = {
    "letters": "a",
    "spaces": " ",
    "quotes": '"',
    "two quotes": "'a",
    "continued lines": "\\\n",
    "curl": "curl ",
    "curl to nothing": "curl x|",
    "rm": "rm -r ",
    "git push": "git push -f ",
    "password": "password=",
    "open password": "password='",
    "url": "a://b:c",
    "key prefix": "sk-",
    "token prefix": "eyJaaaaaaaaaaa.",
    "key header": "-----BEGIN PRIVATE KEY-----",
    "licence": "SPDX-License-Identifier: MIT AND ",
    "stand-ins": "AKIAIOSFODNN7EXAMPLE ",
    "dd": "dd of= ",
    "accents": "é",
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_text_takes_long(name: str) -> None:
    text = (ADVERSARIAL[name] * SIZE)[:SIZE]

    began = time.process_time()
    violations(text)
    violations(fenced(text))

    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "source",
    ["(" * SIZE, "-" * SIZE + "1", "a" + ".b" * (SIZE // 2), "import a\n" * 20_000 + "(", "\0"],
)
def test_python_that_cannot_be_parsed_does_not_stop_the_checks(source: str) -> None:
    assert violations(fenced(source, "python")) == []


@given(st.text(min_size=1))
def test_entropy_is_at_most_that_of_distinct_characters(text: str) -> None:
    assert 0 <= entropy(text) <= len(set(text)).bit_length()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("secrets", {"pattern": "(?=x)"}, "not an RE2 pattern"),
        ("secrets", {"unless": "("}, "not an RE2 pattern"),
        ("commands", {"severity": "fatal"}, "blocking"),
        ("commands", {"where": "somewhere"}, "anywhere"),
        ("licences", {"patern": "x"}, "Extra inputs are not permitted"),
        ("imports", {"modules": []}, "at least 1 item"),
    ],
)
def test_an_inconsistent_rule_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    rule = RULES[kind]["rules"][0] | change

    with pytest.raises(ValidationError, match=message):
        PolicyRules.model_validate(RULES | {kind: {"rules": [rule]}})


def test_no_two_rules_share_an_id() -> None:
    rules = PolicyRules.model_validate(RULES)
    ids = [
        rule.id
        for kind in (rules.secrets, rules.commands, rules.licences, rules.imports)
        for rule in kind.rules
    ]

    assert len(set(ids)) == len(ids)
