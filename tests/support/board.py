"""A small workflow that keeps what it is sent; a module by itself, because workers sandbox it."""

from datetime import timedelta
from typing import Any

from temporalio import activity, workflow

from workflows.models.errors import ErrorType, application_error


@activity.defn
async def shout(text: str) -> str:
    return text.upper()


@activity.defn
async def refuse(text: str) -> None:
    raise application_error(ErrorType.INVALID_ENTRY, f"refused: {text}", text)


@workflow.defn
class Board:
    """A workflow that keeps what it is sent."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ended = False

    @workflow.run
    async def run(self, text: str) -> list[str]:
        workflow.upsert_memo({"title": text})
        options: Any = {"start_to_close_timeout": timedelta(seconds=20), "summary": text[:50]}
        self.notes.append(await workflow.execute_activity(shout, text, **options))
        try:
            await workflow.execute_activity(refuse, text, **options)
        except Exception as error:
            self.notes.append(str(error.__cause__))
        await workflow.wait_condition(lambda: self.ended)
        return self.notes

    @workflow.signal
    def note(self, text: str) -> None:
        self.notes.append(text)

    @workflow.signal
    def not_understood(self, name: str, reason: str) -> None:
        self.notes.append(f"{name}: {reason}")

    @workflow.update
    def end(self, text: str) -> str:
        self.ended = True
        return text

    @workflow.query
    def all(self) -> list[str]:
        return self.notes
