from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateStoryRequest(_message.Message):
    __slots__ = ("title", "brief", "ac")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    BRIEF_FIELD_NUMBER: _ClassVar[int]
    AC_FIELD_NUMBER: _ClassVar[int]
    title: str
    brief: str
    ac: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, title: _Optional[str] = ..., brief: _Optional[str] = ..., ac: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateStoryResponse(_message.Message):
    __slots__ = ("story_id", "state", "dor_score")
    STORY_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DOR_SCORE_FIELD_NUMBER: _ClassVar[int]
    story_id: str
    state: str
    dor_score: int
    def __init__(self, story_id: _Optional[str] = ..., state: _Optional[str] = ..., dor_score: _Optional[int] = ...) -> None: ...

class ListStoriesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Story(_message.Message):
    __slots__ = ("story_id", "title", "state", "dor_score", "brief")
    STORY_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DOR_SCORE_FIELD_NUMBER: _ClassVar[int]
    BRIEF_FIELD_NUMBER: _ClassVar[int]
    story_id: str
    title: str
    state: str
    dor_score: int
    brief: str
    def __init__(self, story_id: _Optional[str] = ..., title: _Optional[str] = ..., state: _Optional[str] = ..., dor_score: _Optional[int] = ..., brief: _Optional[str] = ...) -> None: ...

class ListStoriesResponse(_message.Message):
    __slots__ = ("stories",)
    STORIES_FIELD_NUMBER: _ClassVar[int]
    stories: _containers.RepeatedCompositeFieldContainer[Story]
    def __init__(self, stories: _Optional[_Iterable[_Union[Story, _Mapping]]] = ...) -> None: ...

class GetStoryRequest(_message.Message):
    __slots__ = ("story_id",)
    STORY_ID_FIELD_NUMBER: _ClassVar[int]
    story_id: str
    def __init__(self, story_id: _Optional[str] = ...) -> None: ...

class GetStoryResponse(_message.Message):
    __slots__ = ("story", "ac", "plan_json")
    STORY_FIELD_NUMBER: _ClassVar[int]
    AC_FIELD_NUMBER: _ClassVar[int]
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    story: Story
    ac: _containers.RepeatedScalarFieldContainer[str]
    plan_json: str
    def __init__(self, story: _Optional[_Union[Story, _Mapping]] = ..., ac: _Optional[_Iterable[str]] = ..., plan_json: _Optional[str] = ...) -> None: ...

class TransitionRequest(_message.Message):
    __slots__ = ("story_id", "event", "actor")
    STORY_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    story_id: str
    event: str
    actor: str
    def __init__(self, story_id: _Optional[str] = ..., event: _Optional[str] = ..., actor: _Optional[str] = ...) -> None: ...

class TransitionResponse(_message.Message):
    __slots__ = ("story_id", "state", "blocked", "reason")
    STORY_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    story_id: str
    state: str
    blocked: bool
    reason: str
    def __init__(self, story_id: _Optional[str] = ..., state: _Optional[str] = ..., blocked: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class GetPlanRequest(_message.Message):
    __slots__ = ("story_id",)
    STORY_ID_FIELD_NUMBER: _ClassVar[int]
    story_id: str
    def __init__(self, story_id: _Optional[str] = ...) -> None: ...

class GetPlanResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
