"""Repositories are reached with their credentials, or the reason is given."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from temporalio.exceptions import ApplicationError

from activities.workspace.repositories import verify
from activities.workspace.transports import transport
from tests.support.projects import Project, copy_project, make_project, plain_git
from workflows.models.errors import ErrorType
from workflows.models.workspace import Repository


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("template"))


@pytest.fixture
def project(template: Project, tmp_path: Path) -> Project:
    return copy_project(template, tmp_path)


class Forge(BaseHTTPRequestHandler):
    """A forge that serves a repository by the dumb protocol to those who have the token."""

    folder: Path
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        file = self.folder / self.path.partition("?")[0].lstrip("/")
        good = base64.b64encode(b"git:s3cret").decode()
        status = 200 if file.is_file() else 404
        if self.headers.get("Authorization") != f"Basic {good}":
            status = 401
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="forge"')
        self.end_headers()
        if status == 200:
            self.wfile.write(file.read_bytes())

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def forge(project: Project) -> Iterator[str]:
    plain_git("update-server-info", cwd=project.bare)
    Forge.folder, Forge.seen = project.bare.parent, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forge)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{project.bare.name}"
    server.shutdown()
    server.server_close()
    thread.join()


async def refused(kind: ErrorType, repository: Repository, credentials: Path | None = None) -> str:
    with pytest.raises(ApplicationError) as error:
        await verify(repository, credentials)
    assert error.value.type == kind
    return error.value.message


async def test_a_repository_with_its_base_is_accepted(project: Project) -> None:
    await verify(project.entry())


async def test_a_base_that_is_missing_is_named(project: Project) -> None:
    message = await refused(ErrorType.BASE_MISSING, project.entry(base="trunk"))

    assert message == (
        "repository sample: base: it has no branch 'trunk'; correct `base`, or create the branch"
    )


async def test_a_repository_that_does_not_answer_is_another_error(project: Project) -> None:
    entry = Repository(key="sample", url=f"{project.url}.gone")

    assert "does not answer; check its `url`" in await refused(ErrorType.REPOSITORY_AWAY, entry)
    entry = Repository(key="sample", url="http://127.0.0.1:1/issue-403")
    assert "does not answer; check its `url`" in await refused(ErrorType.REPOSITORY_AWAY, entry)


async def test_a_transport_that_executes_is_not_used(tmp_path: Path) -> None:
    entry = Repository(key="sample", url=f"ext::touch% {tmp_path}/marker")

    with pytest.raises(ApplicationError) as error:
        await verify(entry)

    assert error.value.non_retryable
    assert not (tmp_path / "marker").exists()


async def test_a_token_comes_from_its_file(forge: str, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "sample.token").write_text("s3cret\n")
    (credentials / "other.token").write_text("wrong\n")

    await verify(Repository(key="sample", url=forge), credentials)

    assert set(Forge.seen) == {"Basic " + base64.b64encode(b"git:s3cret").decode()}
    for key in ("other", "third"):
        entry = Repository(key=key, url=forge)
        message = await refused(ErrorType.REPOSITORY_AWAY, entry, credentials)
        assert "refuses the credentials; see the folder in REPOSITORY_CREDENTIALS" in message
        assert "wrong" not in message


async def test_a_token_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "sample.token").mkdir()
    entry = Repository(key="sample", url="http://127.0.0.1:1/x")

    message = await refused(ErrorType.REPOSITORY_AWAY, entry, tmp_path)

    assert "its credentials cannot be read; check REPOSITORY_CREDENTIALS" in message


async def test_ssh_uses_only_the_key_and_the_hosts_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my keys"
    folder.mkdir()
    (folder / "sample.key").write_text("key")
    entry = Repository(key="sample", url="git@127.0.0.1:x.git")

    command = transport(entry.url, entry.key, folder).env["GIT_SSH_COMMAND"]

    assert f"-i '{folder}/sample.key'" in command
    assert f"-oUserKnownHostsFile='{folder}/known_hosts'" in command
    assert "-oStrictHostKeyChecking=yes" in command
    assert command.startswith("ssh -F /dev/null -oBatchMode=yes")
    await refused(ErrorType.REPOSITORY_AWAY, Repository(key="x", url="ssh://127.0.0.1:1/x"), folder)
