"""The JetStream streams as data, and their reconciliation at start-up."""

from datetime import timedelta

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, PersistMode, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError
from pydantic import BaseModel, ConfigDict

DUPLICATE_WINDOW = timedelta(hours=1)
UNLIMITED = -1
GIB = 1024**3

NO_STORAGE = (10002, 10023, 10028, 10047)
"""JetStream's error codes for a stream that may grow larger than the storage that is left."""

SUBJECTS_OVERLAP = 10065
"""JetStream's error code for a stream whose subjects another stream already takes."""


class StreamError(Exception):
    """A stream that start-up may not or cannot fix; the message names stream, rule and remedy."""


class Stream(BaseModel):
    """One stream. `subjects` end in `.>`. max_messages: None if only age and size are limited."""

    model_config = ConfigDict(frozen=True)

    name: str
    subjects: tuple[str, ...]
    max_age: timedelta
    max_bytes: int
    max_messages: int | None = None

    @property
    def duplicate_window(self) -> timedelta:
        """How long the server recognises an id: never longer than it keeps the message."""
        return min(DUPLICATE_WINDOW, self.max_age)

    def takes(self, subject: str) -> bool:
        """Return whether the stream stores `subject`."""
        return any(subject.startswith(pattern.removesuffix(">")) for pattern in self.subjects)


STREAMS = (
    Stream(
        name="PLANNING_EVENTS",
        subjects=("planning.>",),
        max_age=timedelta(days=30),
        max_bytes=1 * GIB,
        max_messages=1_000_000,
    ),
    Stream(
        name="CONTEXT",
        subjects=("context.>",),
        max_age=timedelta(days=7),
        max_bytes=GIB // 4,
        max_messages=100_000,
    ),
    Stream(
        name="ORCHESTRATOR_EVENTS",
        subjects=("orchestration.>",),
        max_age=timedelta(days=7),
        max_bytes=GIB // 4,
        max_messages=50_000,
    ),
    Stream(
        name="AGENT_COMMANDS",
        subjects=("agent.cmd.>",),
        max_age=timedelta(hours=1),
        max_bytes=GIB // 2,
        max_messages=10_000,
    ),
    Stream(
        name="AGENT_RESPONSES",
        subjects=("agent.response.>",),
        max_age=timedelta(hours=1),
        max_bytes=GIB // 2,
        max_messages=10_000,
    ),
    Stream(
        name="DEAD_LETTERS",
        subjects=("deadletter.>",),
        max_age=timedelta(days=30),
        max_bytes=GIB // 4,
    ),
)


def stream_of(subject: str) -> Stream | None:
    """Return the declared stream that stores `subject`, or None."""
    return next((stream for stream in STREAMS if stream.takes(subject)), None)


def declared(stream: Stream, replicas: int) -> dict[str, object]:
    """Return the declared settings of the stream, by StreamConfig's names."""
    return {
        "subjects": list(stream.subjects),
        "max_age": stream.max_age.total_seconds(),
        "max_bytes": stream.max_bytes,
        "max_msgs": stream.max_messages or UNLIMITED,
        "duplicate_window": stream.duplicate_window.total_seconds(),
        "discard": DiscardPolicy.OLD,
        "num_replicas": replicas,
        # Limits that are not declared here would also drop or refuse events.
        "max_msg_size": UNLIMITED,
        "max_msgs_per_subject": UNLIMITED,
        "no_ack": False,
    }


def incompatibility(found: StreamConfig) -> str:
    """Return why this stream loses or refuses events in a way that no update fixes; or ''."""
    if found.storage != StorageType.FILE:
        return "its storage is memory, and must be file: a restart of the server would empty it"
    if found.retention != RetentionPolicy.LIMITS:
        kept = RetentionPolicy(found.retention).value
        return f"its retention is {kept}, and must be limits: a message would go once it is read"
    if found.persist_mode == PersistMode.ASYNC:
        return "its persist mode is async, and must be default: acknowledged events could be lost"
    if found.mirror or found.sealed:
        return "it is a mirror or sealed, and must be neither: it takes no events"
    return ""


def drift(found: StreamConfig, stream: Stream, replicas: int) -> dict[str, object]:
    """Return the settings that differ from the declared ones, with their declared values."""
    return {
        setting: wanted
        for setting, wanted in declared(stream, replicas).items()
        if getattr(found, setting) != wanted
    }


async def reconcile(jetstream: JetStreamContext, replicas: int) -> dict[str, list[str]]:
    """Create missing streams and update changed settings; repeatable and safe concurrently.

    Returns:
        What was changed: stream -> `["made"]` or the names of the settings.

    Raises:
        StreamError: a stream that would lose events, or that the server refuses.
    """
    changes = {}
    for stream in STREAMS:
        if changed := await _reconcile(jetstream, stream, replicas):
            changes[stream.name] = changed
    return changes


async def _reconcile(jetstream: JetStreamContext, stream: Stream, replicas: int) -> list[str]:
    try:
        found = (await jetstream.stream_info(stream.name)).config
    except NotFoundError:
        return await _make(jetstream, stream, replicas)
    if why := incompatibility(found):
        raise StreamError(
            f"Stream {stream.name} would lose events: {why}. Keep what it holds, if you need it, "
            f"with `nats stream backup {stream.name} DIRECTORY`, then remove it with "
            f"`nats stream rm {stream.name}` and start again: it is then created again"
        )
    changes = drift(found, stream, replicas)
    if changes:
        try:
            await jetstream.update_stream(found.evolve(**changes))
        except APIError as error:
            raise _refused(stream, replicas, error) from error
    return sorted(changes)


async def _make(jetstream: JetStreamContext, stream: Stream, replicas: int) -> list[str]:
    config = StreamConfig(
        name=stream.name, storage=StorageType.FILE, retention=RetentionPolicy.LIMITS
    ).evolve(**declared(stream, replicas))
    try:
        # The server answers a repeated request with the existing stream.
        await jetstream.add_stream(config)
    except APIError as error:
        raise _refused(stream, replicas, error) from error
    return ["made"]


def _refused(stream: Stream, replicas: int, error: APIError) -> StreamError:
    subjects = ", ".join(stream.subjects)
    if error.err_code == SUBJECTS_OVERLAP:
        remedy = (
            f"another stream already takes {subjects}: find it with `nats stream find --subject "
            f"'{stream.subjects[0]}'` and remove those subjects from it"
        )
    elif error.err_code in NO_STORAGE:
        total = sum(each.max_bytes for each in STREAMS) / GIB
        remedy = f"the fleet's streams may take {total:g} GiB: give JetStream a max_file of more"
    else:
        remedy = f"NATS_REPLICAS is {replicas}: it must be 1 on one server, 3 in a cluster of three"
    return StreamError(
        f"Stream {stream.name} ({subjects}) is refused by NATS: {error.description}. {remedy}"
    )
