"""Errors as OpenAI's objects, with the status that its clients act on."""

from collections.abc import Mapping
from typing import Any

from epmoe.engine.call import QueueFull, Stopped
from epmoe.errors import UserError, shown

RETRY_S = 1  # what a client that is refused for now is told to wait


class ApiError(Exception):
    """What a client is told in place of an answer.

    Args:
        param: the field of the request that is wrong.
        code: OpenAI's word for it, which programs compare.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": shown(str(self)), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(RETRY_S)} if self.status in (429, 503) else {}


def refused(name: str, why: str) -> ApiError:
    """A field that would change the answer, and is not served."""
    return ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")


def of(error: BaseException) -> ApiError:
    """What a client is told of any error. One that nobody foresaw is named by its type alone: it may hold text."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="rate_limit_exceeded")
        case UserError():
            return ApiError(400, str(error))
        case Stopped():
            return ApiError(503, str(error), code="service_unavailable")
    return ApiError(500, f"the server has failed ({type(error).__name__}): its standard error says more")
