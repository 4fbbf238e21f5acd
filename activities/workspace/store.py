"""The store: one bare repository for each project, which holds all that stories make.

`refs/heads/story/...` are the stories' branches, `refs/fleet/...` the agents' work, `refs/base/...`
the project's base as it was last fetched. Workers share the store, in a folder or on a git server:
refs move by compare-and-swap, so none of them loses what another one made (refs.py). A commit is a
pure function of its parent, its tree, its message and its time, which the workflow gives: a retried
step makes no second commit.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from activities.workspace import git_output
from activities.workspace.commits import check_files, clean, message_text, one_line, remove_special
from activities.workspace.errors import ADDING, REMOTE, store_errors
from activities.workspace.git import OUTPUT_BYTES, GitFailed, OutputTooLong, git
from activities.workspace.refs import ABSENT, COMMIT, FolderRefs, Move, Refs
from activities.workspace.remembered import Remembered
from activities.workspace.transports import Transport, transport
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import agent_ref, ref_part, story_branch
from workflows.models.workspace import (
    BlamedLine,
    ChangedFile,
    Conflict,
    LoggedCommit,
    Merged,
    Repository,
    Trailers,
    TreeFile,
)

READ_BYTES = 10 * 1024**2
DIFF_BYTES = 2 * 1024**2

CUT = "[the diff is longer than"
"""The start of the last line of a diff that is cut; no line of a diff begins so."""

_LISTING = ("ls-tree", "-r", "-z", "--full-tree")
_DOMAIN = "fleet.invalid"
_NO_BRACKETS = str.maketrans("", "", "<>")

_SYNCED_ONE_BY_ONE = 50
"""Up to so many files it is cheaper to sync each than the whole file system once."""


class Store:
    """The store of one project.

    Every method raises ApplicationErrors: GitStoreAway, which is retried, if the store's folder
    cannot be used; NotFound for a commit, path or branch that it does not have.
    """

    def __init__(
        self,
        path: Path,
        repository: Repository,
        credentials: Path | None = None,
        remembered: Remembered | None = None,
        refs: Refs | None = None,
    ) -> None:
        """Use the store in a folder, or a mirror of it.

        Args:
            path: the bare repository.
            repository: the entry of the project.
            credentials: the folder of the repositories' credentials; see transports.py.
            remembered: what is known of its objects; None: nothing.
            refs: its refs; None: those of the folder.
        """
        self.path = path
        self.refs: Refs = refs or FolderRefs(path)
        self.remembered = remembered or Remembered()
        self._repository = repository
        self._credentials = credentials

    # --- refs ---

    async def base_commit(self) -> str:
        """Fetch the project's base and return its commit.

        Raises:
            ApplicationError: BaseMissing; InvalidConfig: it is a shallow clone; RepositoryAway,
                which is retried.
        """
        base = self._repository.base
        ref = f"refs/base/{base}"
        await self._fetch(f"+refs/heads/{base}:{ref}")
        if await FolderRefs(self.path).value(ref) is None:  # git only warns
            message = f"{self._what}: `url` is a shallow clone; run `git fetch --unshallow` in it"
            raise application_error(ErrorType.INVALID_CONFIG, message)
        await self.refs.share(ref)
        return await self._required(ref, f"the base {base!r}")

    async def fetch_commits(self, commits: Collection[str]) -> None:
        """Fetch commits of the project by their ids.

        Raises:
            ApplicationError: RepositoryAway, which is retried, also if one is missing.
        """
        refs = {f"refs/base/{checked(commit)}": commit for commit in commits}
        await self._fetch(*(f"+{commit}:{ref}" for ref, commit in refs.items()))
        await self.refs.share(*refs)

    async def _fetch(self, *refs: str) -> None:
        with store_errors(), store_errors(REMOTE, self._what):
            way = self._transport()
            await git(
                "fetch",
                "--quiet",
                "--no-tags",
                "--no-write-fetch-head",
                *way.fetch,
                self._repository.url,
                *refs,
                git_dir=self.path,
                env=way.env,
                config=way.config,
                protocol=way.protocol,
            )

    async def start_branch(self, story_id: str, commit: str) -> str:
        """Create a story's branch at a commit and return its head; one that exists stays."""
        ref = f"refs/heads/{story_branch(story_id)}"
        await self.refs.move(Move(ref, checked(commit), ABSENT))
        return await self._required(ref, f"the branch of story {story_id}")

    async def head(self, story_id: str) -> str | None:
        """Return the head of a story's branch; None if it has none."""
        return await self.refs.value(f"refs/heads/{story_branch(story_id)}")

    async def agent_head(self, story_id: str, task_id: str, agent_id: str) -> str | None:
        """Return the last commit of an agent's work on a task; None if it has none."""
        ref = agent_ref(story_id, task_id, agent_id)
        return await self.refs.noted(ref) or await self.refs.value(ref)

    async def place(self, story_id: str, task_id: str, agent_id: str, commit: str) -> None:
        """Let an agent's work go on from a commit: that of a reset history, or a merged base.

        What the ref named before stays in the store until the story's refs are collected.
        """
        ref = agent_ref(story_id, task_id, agent_id)
        kept = ref.replace("refs/fleet/", "refs/fleet-old/", 1)
        while (old := await self.refs.value(ref)) != checked(commit):
            keeping = [Move(f"{kept}/{old}", old)] if old else []
            if await self.refs.move(*keeping, Move(ref, commit, old or ABSENT)):
                return

    # --- commits ---

    async def commit(
        self, tree: Path, *, parent: str, message: str, trailers: Trailers, at: datetime
    ) -> str:
        """Commit a working tree as an agent's next step, and return the commit.

        It returns `parent` if nothing changed, and the same commit if the step is retried. Files
        that `.gitignore` or EXCLUDED name are not stored, links are stored as links, and special
        files are removed. The agent's ref must be at `parent` or missing, or already at or behind
        this commit.

        Args:
            tree: the working tree, without `.git`; an index beside it makes this fast.
            parent: the commit that the step began with.
            message: the first lines of the commit's message.
            trailers: the story, task, agent and step.
            at: the time that both dates of the commit get.

        Raises:
            ApplicationError: TreeRefused: a name or a size is over the rules; RefMoved: the
                agent's work went on from another commit (see `place`).
        """
        commit = await self.make_commit(
            tree, parent=parent, message=message, trailers=trailers, at=at
        )
        if commit != parent:
            await self.advance(trailers, parent, commit)
        return commit

    async def make_commit(
        self,
        tree: Path,
        *,
        parent: str,
        message: str,
        trailers: Trailers,
        at: datetime,
        brought: bool = False,
        written: str = "",
    ) -> str:
        """Make the commit of a working tree, which no ref names yet.

        Afterwards the index beside the tree has the files of the returned commit.

        Args:
            tree: as for `commit`.
            parent: as for `commit`.
            message: as for `commit`.
            trailers: as for `commit`.
            at: as for `commit`.
            brought: whether the index beside the tree has the files of `parent`, as when the tree
                was brought to it.
            written: a file that is stored even if `.gitignore` or EXCLUDED name it.

        Raises:
            ApplicationError: TreeRefused.
        """
        with store_errors():
            stored = await self._stored(tree, checked(parent), brought, written)
            if stored is None:
                return parent
            text = message_text(message, trailers)
            commit = await self.commit_object(stored, [parent], text, trailers.agent, at)
        self.remembered.add(_asked_for_tree(commit), stored.encode())
        return commit

    async def advance(self, trailers: Trailers, parent: str, commit: str) -> None:
        """Move the ref of an agent's work from a step's parent, or from nothing, to its commit.

        Raises:
            ApplicationError: RefMoved, as by `commit`.
        """
        ref = agent_ref(trailers.story, trailers.task, trailers.agent)
        if await self.refs.move(Move(ref, commit, parent)):
            return
        while True:
            old = await self.refs.value(ref)
            if old not in (None, parent):
                if await self.contains(old, commit):
                    return
                raise application_error(
                    ErrorType.REF_MOVED,
                    f"{ref}: is at {old} and not at {parent}, where this step began; another "
                    "attempt went on, or the history was reset: place the ref first",
                )
            if await self.refs.move(Move(ref, commit, old or ABSENT)):
                return

    async def _stored(self, tree: Path, parent: str, brought: bool, written: str) -> str | None:
        """Store the tree's files; return the id of their tree, None if it is the parent's."""
        index = tree.parent / f".index.{uuid.uuid4().hex}"
        kept = tree.parent / "index"
        await asyncio.to_thread(remove_special, tree)
        try:
            if kept.exists():
                await asyncio.to_thread(shutil.copy2, kept, index)
            if not brought:
                await self._git("read-tree", "--reset", parent, work_tree=tree, index=index)
            listed = await self._git(
                *("ls-files", "-z", "--modified", "--deleted", "--others", "--exclude-standard"),
                work_tree=tree,
                index=index,
            )
            changed = set(listed.split(b"\0")[:-1])
            ignored = written if os.fsencode(written) not in changed else ""
            found = None
            if changed or ignored:
                found = await self._added(tree, index, changed, ignored)
            if kept.exists():
                index.replace(kept)
        finally:
            index.unlink(missing_ok=True)
        before = await self._lasting(*_asked_for_tree(parent)) if found else b""
        return None if found == before.decode().strip() else found

    async def _added(self, tree: Path, index: Path, changed: set[bytes], ignored: str) -> str:
        """Add changed files to an index, and one that is ignored; return the id of its tree."""
        also = {os.fsencode(ignored)} if ignored else set()
        await asyncio.to_thread(check_files, tree, changed | also)
        config = {"core.fsyncMethod": "batch"} if len(changed) > _SYNCED_ONE_BY_ONE else {}
        adding = [("--all", "--", ".")] if changed else []
        adding += [("--force", "--", ignored)] if ignored else []
        with store_errors(ADDING):
            for words in adding:
                await self._git("add", *words, work_tree=tree, index=index, config=config)
        return (await self._git("write-tree", index=index)).decode().strip()

    async def commit_object(
        self, tree: str, parents: list[str], message: str, author: str, at: datetime
    ) -> str:
        """Make the commit of a stored tree, which no ref names yet, and return it.

        Args:
            tree: the tree's id.
            parents: commits.
            message: all of its message.
            author: an agent, or `fleet`.
            at: the time that both dates of the commit get.
        """
        date = f"{int(at.timestamp())} +0000"
        name = one_line(author).translate(_NO_BRACKETS) or "fleet"
        env = {
            "GIT_AUTHOR_NAME": name,
            "GIT_AUTHOR_EMAIL": f"{ref_part(author) or 'fleet'}@{_DOMAIN}",
            "GIT_AUTHOR_DATE": date,
            "GIT_COMMITTER_NAME": "SWE AI Fleet",
            "GIT_COMMITTER_EMAIL": f"fleet@{_DOMAIN}",
            "GIT_COMMITTER_DATE": date,
        }
        from_parents = [word for parent in parents for word in ("-p", parent)]
        output = await self._git(
            "commit-tree", tree, *from_parents, "-F", "-", stdin=message.encode(), env=env
        )
        return output.decode().strip()

    # --- reading ---

    async def contains(self, commit: str, ancestor: str) -> bool:
        """Return whether `ancestor` is `commit` or one of its ancestors."""
        with store_errors():
            try:
                await self._git("merge-base", "--is-ancestor", checked(ancestor), checked(commit))
            except GitFailed as failure:
                if failure.code != 1:
                    raise
                return False
            return True

    async def changed(self, base: str, commit: str) -> list[ChangedFile]:
        """Return the files that differ between two commits, by path."""
        words = ("diff-tree", "-r", "-z", "-M", "--raw", "--numstat", "--no-ext-diff")
        # A commit that is compared with itself is looked for.
        ask = self._git if base == commit else self._lasting
        with store_errors():
            return git_output.changed_files(
                await ask(*words, "--no-textconv", checked(base), checked(commit))
            )

    async def diff(
        self,
        base: str,
        commit: str,
        *,
        context: int = 3,
        limit: int = DIFF_BYTES,
        paths: Sequence[str] = (),
    ) -> str:
        """Return the unified diff between two commits.

        Args:
            base: the commit before.
            commit: the commit after.
            context: lines around each change.
            limit: bytes after which it is cut, which its last line then says.
            paths: only of these files; none: of all.
        """
        words = ("diff-tree", "-p", "-r", "-M", f"-U{context}", "--no-ext-diff", "--no-textconv")
        with store_errors():
            try:
                output = await self._git(
                    *(*words, "--no-color", checked(base), checked(commit), "--", *paths),
                    limit_bytes=limit,
                )
            except OutputTooLong as long:
                cut = long.output.decode(errors="replace")
                return f"{cut}\n{CUT} {limit:,} bytes]\n"
        return output.decode(errors="replace")

    async def log(self, base: str, commit: str) -> list[LoggedCommit]:
        """Return the commits from `base`, without it, to `commit`, the newest first."""
        span = f"{checked(base)}..{checked(commit)}"
        with store_errors():
            return git_output.logged_commits(
                await self._git("log", f"--format={git_output.LOG_FORMAT}", span, "--")
            )

    async def blame(self, commit: str, path: str, line: int) -> BlamedLine:
        """Return where a line of a file comes from; lines count from 1."""
        span = f"-L{line},{line}"
        with store_errors(what=f"{path}:{line}"):
            output = await self._git("blame", "--porcelain", span, checked(commit), "--", path)
            origin = output[:40].decode()
            one = ("log", "-1", f"--format={git_output.LOG_FORMAT}", origin, "--")
            logged = git_output.logged_commits(await self._git(*one))
        return git_output.blamed_line(output, logged[0])

    async def outline(self, commit: str) -> list[TreeFile]:
        """Return every file of a commit with its size, by path."""
        with store_errors():
            words = ("ls-tree", "-r", "-l", "-z", "--full-tree")
            return git_output.tree_files(await self._git(*words, checked(commit)))

    async def listing(self, commit: str) -> list[tuple[str, bytes]]:
        """Return kind and path of every file of a commit, by path."""
        with store_errors():
            return git_output.listed_files(await self._lasting(*_LISTING, checked(commit)))

    async def changed_paths(self, base: str, commit: str) -> list[bytes]:
        """Return the paths that differ between two commits, sorted."""
        with store_errors():
            before, after = [
                set((await self._lasting(*_LISTING, checked(each))).split(b"\0"))
                for each in (base, commit)
            ]
        return sorted({entry.split(b"\t", 1)[1] for entry in before ^ after})

    async def read(self, commit: str, path: str, *, limit: int = READ_BYTES) -> bytes:
        """Return the content of a file; of a link, the path that it names."""
        with store_errors(what=path):
            return await self._git(
                "cat-file", "blob", f"{checked(commit)}:{path}", limit_bytes=limit
            )

    # --- merging and delivering ---

    async def merge(
        self, story_id: str, commit: str, *, at: datetime, message: str
    ) -> Merged | Conflict:
        """Merge a commit into a story's branch: fast-forward if possible, else three-way.

        It is repeatable: a commit that the branch already has changes nothing. If another merge
        comes first, this one starts again on its result.

        Args:
            story_id: the story.
            commit: the agent's commit, or a moved base.
            at: the time that both dates of a merge commit get.
            message: the message of a merge commit.
        """
        ref = f"refs/heads/{story_branch(story_id)}"
        with store_errors(what=story_id):
            while True:
                head = await self._required(ref, f"the branch of story {story_id}")
                if await self.contains(head, commit):
                    return Merged(commit=head)
                merged = commit
                if not await self.contains(commit, head):
                    tree = await self._merged_tree(head, commit)
                    if isinstance(tree, Conflict):
                        return tree
                    of = {"Story": story_id}
                    merged = await self.commit_merge(tree, [head, commit], message, of, at)
                if await self.refs.move(Move(ref, merged, head)):
                    return Merged(commit=merged)

    async def commit_merge(
        self, tree: str, parents: list[str], message: str, trailers: Mapping[str, str], at: datetime
    ) -> str:
        """Return the fleet's merge commit of a tree, which no ref names yet.

        Args:
            tree: the id of the merged tree.
            parents: the branch's head, and what is merged into it.
            message: its first line.
            trailers: name -> value.
            at: the time that both dates of the commit get.
        """
        lines = "".join(f"{name}: {one_line(value)}\n" for name, value in trailers.items())
        text = f"{clean(message)}\n\n{lines}"
        with store_errors():
            return await self.commit_object(tree, parents, text, "fleet", at)

    async def _merged_tree(self, head: str, commit: str) -> str | Conflict:
        words = ("merge-tree", "--write-tree", "-z", "--name-only", "--no-messages")
        try:
            output = await self._git(*words, head, commit)
        except GitFailed as failure:
            if failure.code != 1:
                raise
            names = [name for name in failure.output.split(b"\0")[1:] if name]
            return Conflict(head=head, files=sorted({git_output.shown(name) for name in names}))
        return output.split(b"\0")[0].decode()

    async def push(self, story_id: str, commit: str) -> None:
        """Push a story's branch to the project's repository, as the commit that was approved.

        Raises:
            ApplicationError: PushRefused: the entry does not allow it, the branch is at another
                commit, or the repository has a branch of that name that this one does not
                continue; RepositoryAway, which is retried.
        """
        entry = self._repository
        branch = story_branch(story_id)
        head = await self.head(story_id)
        problem = ""
        if not entry.push:
            problem = "push: the entry of the repository does not allow it; set `push: true`"
        elif branch == entry.base:
            problem = f"base: {branch} is the project's base, which is never written"
        elif head != checked(commit):
            problem = f"{branch}: is at {head} and not at {commit}, which was approved; approve it"
        if problem:
            raise application_error(ErrorType.PUSH_REFUSED, problem)
        with store_errors(REMOTE, self._what):
            way = self._transport()
            await git(
                "push",
                "--quiet",
                "--no-verify",
                *way.push,
                entry.url,
                f"{commit}:refs/heads/{branch}",
                git_dir=self.path,
                env=way.env,
                config=way.config,
                protocol=way.protocol,
            )

    async def clone_branch(self, story_id: str, into: Path) -> str:
        """Clone a story's branch into a new folder and return its commit."""
        head = await self._required(
            f"refs/heads/{story_branch(story_id)}", f"the branch of story {story_id}"
        )
        with store_errors(what=str(into)):
            await git(
                *("clone", "--quiet", "--no-local", "--no-tags", "--template="),
                *("--single-branch", f"--branch={story_branch(story_id)}"),
                self.path.resolve().as_uri(),
                str(await asyncio.to_thread(into.resolve)),
                protocol="file",
            )
        return head

    # --- git ---

    def _transport(self) -> Transport:
        """Return how git reaches the project's repository."""
        return transport(self._repository.url, self._repository.key, self._credentials)

    @property
    def _what(self) -> str:
        return f"repository {self._repository.key}"

    async def _git(
        self,
        *args: str,
        work_tree: Path | None = None,
        index: Path | None = None,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
        limit_bytes: int = OUTPUT_BYTES,
        seconds: float = 900,
    ) -> bytes:
        return await git(
            *args,
            git_dir=self.path,
            work_tree=work_tree,
            index=index,
            stdin=stdin,
            env=env,
            config=config,
            limit_bytes=limit_bytes,
            seconds=seconds,
        )

    async def _lasting(self, *args: str) -> bytes:
        """Run a command whose answer never changes: it names objects by their ids, and no ref."""
        return await self.remembered.of(args, self._git)

    async def _required(self, ref: str, what: str) -> str:
        value = await self.refs.value(ref)
        if value is None:
            message = f"not found: the store has not {what}; was it collected or lost?"
            raise application_error(ErrorType.NOT_FOUND, message)
        return value


def checked(commit: str) -> str:
    """Return a commit's id.

    Raises:
        ApplicationError: it is not one.
    """
    if not COMMIT.fullmatch(commit):
        message = f"commit: {commit[:100]!r} is not the full id of a commit; give 40 hex digits"
        raise application_error(ErrorType.INVALID_INPUT, message)
    return commit


def _asked_for_tree(commit: str) -> tuple[str, str]:
    return ("rev-parse", f"{commit}^{{tree}}")
