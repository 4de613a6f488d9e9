"""The fields of a request: those that are served, those that change no answer, and those that are refused by name.

    a field of the type        served
    in ACCEPTED                taken, and changes nothing
    in NEUTRAL                 taken with the value that changes nothing, else refused by name
    any other                  refused by name: it might change the answer

A null counts as not given. docs/serving.md lists them all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from epmoe.engine.request import SamplingParams
from epmoe.server.errors import ApiError, refused

# For the caller's own books, or how a service elsewhere goes about it.
ACCEPTED = frozenset({
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "request_id",
})  # fmt: skip

# Not served yet, or not at all → the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
}

# Of SamplingParams, with the same name there, and the server's value where they are left out.
SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "logit_bias", "allowed_token_ids", "min_tokens", "seed", "ignore_eos", "stop", "stop_token_ids",
)  # fmt: skip

# What one request may ask for: all of it is made, sent and looked at once for each answer.
MOST_ANSWERS, MOST_STOPS, MOST_STOP_CHARACTERS, MOST_IDS = 128, 64, 4096, 1 << 18

Asked = TypeVar("Asked", bound="Sampled")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream says beside the answer."""

    include_usage: bool = False  # a last chunk with the whole usage
    continuous_usage_stats: bool = False  # usage so far in each chunk
    include_obfuscation: bool = False  # padding: there is none


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What an answer must obey, by vLLM's names: one of them."""

    json: dict[str, Any] | None = None  # a schema
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # in Lark's notation


class Sampled(msgspec.Struct, kw_only=True):
    """What all requests for an answer may say."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    priority: int = 0
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool = False  # token_ids beside each text
    stream: bool = False
    stream_options: StreamOptions | None = None

    def params(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """How tokens are chosen, `more` before all else, and `defaults` for what is left out.

        Raises:
            UserError: a value out of range.
            ApiError: more than a request may ask for.
        """
        self._check_size()
        given = {name: getattr(self, name) for name in SAME}
        if given["top_k"] == -1:  # vLLM's word for all
            given["top_k"] = 0
        found = {name: value for name, value in {**given, **more}.items() if value is not None}
        if found.get("stop") == "":
            del found["stop"]
        unset = {name: getattr(defaults, name) for name in (*SAME, "grammar") if name not in found}
        return SamplingParams(**{**unset, **found})

    def _check_size(self) -> None:
        answers, stops = self.n or 1, [self.stop] if isinstance(self.stop, str) else self.stop or []
        if answers > MOST_ANSWERS:
            raise ApiError(400, f"n={answers} is more than {MOST_ANSWERS} answers: ask for fewer", param="n")
        if len(stops) > MOST_STOPS or sum(map(len, stops)) > MOST_STOP_CHARACTERS:
            raise ApiError(
                400,
                f"stop has {len(stops)} strings, {sum(map(len, stops))} characters together, and may have {MOST_STOPS} "
                f"and {MOST_STOP_CHARACTERS}: give fewer",
                param="stop",
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            count = len(getattr(self, name) or ())
            if answers * count > MOST_IDS:
                raise ApiError(
                    400,
                    f"{name} has {count} token ids for each of n={answers} answers, and may have {MOST_IDS} together: "
                    "give fewer",
                    param=name,
                )

    def ids(self, ids: Sequence[int]) -> dict[str, Any]:
        """These ids of an answer, where they are asked for."""
        return {"token_ids": list(ids)} if self.return_token_ids else {}

    @property
    def usage(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


def decoded(body: bytes) -> dict[str, Any]:
    """A request's body as an object, without its nulls.

    Raises:
        ApiError: it is no JSON object.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {type(found).__name__}, and must be an object")
    return {name: value for name, value in found.items() if value is not None}


def typed(found: Mapping[str, Any], kind: type[Asked]) -> Asked:
    """The request that a decoded body asks for.

    Raises:
        ApiError: a field of the wrong type, or one that is not served.
    """
    served = {name: value for name, value in found.items() if name in kind.__struct_fields__}
    for name, value in found.items():
        if name in served or name in ACCEPTED or value in NEUTRAL.get(name, ()):
            continue
        if name in NEUTRAL:
            neutral = " or ".join(msgspec.json.encode(each).decode() for each in (*NEUTRAL[name], None))
            raise refused(name, f"not served: leave it out, or give {neutral}")
        raise refused(name, "no field that this server knows: leave it out")
    try:
        return msgspec.convert(served, kind, str_keys=True)
    except msgspec.ValidationError as error:
        place = str(error).rpartition("$.")[2].rstrip("`") if "$." in str(error) else None
        raise ApiError(400, str(error), param=place) from error
