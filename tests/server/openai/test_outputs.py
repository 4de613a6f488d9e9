"""Outputs: an answer's messages become items, and the events add up to them, whenever they are asked for."""

import random
from typing import Any

import pytest
from harmony_cases import ids_of
from scripted import save_tokenizer

from epmoe.engine.request import TokenLogprobs
from epmoe.server.openai.outputs import Outputs
from epmoe.text.harmony import Messages
from epmoe.text.tokenizer import Tokenizer

WHOLE = (
    "<|channel|>analysis<|message|>They ask.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.rain <|constrain|>json<|message|>{"town":"Ulm"}<|end|>'
    "<|start|>assistant<|channel|>commentary to=functions.sun<|message|><|end|>"
    "<|start|>assistant<|channel|>final<|message|><|end|>"
    "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def fed(
    tokenizer: Tokenizer, text: str, *, ask: float = 0.0, several: bool = True, cut: bool = False
) -> tuple[Outputs, list[dict[str, Any]]]:
    """What comes of this answer, asked for with probability `ask` after each id, and all events."""
    parser = Messages(tokenizer, ids_of(tokenizer, "<|start|>user<|message|>Rain?<|end|><|start|>assistant"))
    outputs = Outputs(tokenizer, parser, several=several, top=1)
    found, rng = list[dict[str, Any]](), random.Random(text)
    for number, id in enumerate(ids_of(tokenizer, text)):
        parser.feed(id)
        outputs.heard([id], [TokenLogprobs(-float(number), ((id, -float(number)),))])
        if rng.random() < ask:
            found += outputs.fresh()
    parser.finish(complete=not cut)
    return outputs, [*found, *outputs.fresh(cut=cut)]


def test_each_message_is_an_item(tokenizer: Tokenizer) -> None:
    outputs, _ = fed(tokenizer, WHOLE)
    thought, look, rain, sun, said = outputs.objects
    assert thought["type"] == "reasoning" and thought["content"] == [{"type": "reasoning_text", "text": "They ask."}]
    assert look["phase"] == "commentary" and look["content"][0]["text"] == "I look."
    assert (rain["name"], rain["arguments"]) == ("rain", '{"town":"Ulm"}')
    assert (sun["name"], sun["arguments"]) == ("sun", "")
    assert said["phase"] == "final_answer" and said["content"][0]["text"] == "It rains."
    assert {each["status"] for each in outputs.objects} == {"completed"}
    assert outputs.reasoning_tokens == len("They ask.")
    assert len({each["id"] for each in outputs.objects}) == 5 and rain["call_id"] != sun["call_id"]


@pytest.mark.parametrize("ask", [0.0, 0.05, 0.5, 1.0])
def test_events_add_up_to_the_items(tokenizer: Tokenizer, ask: float) -> None:
    outputs, events = fed(tokenizer, WHOLE, ask=ask)
    begun = [each["item"] for each in events if each["type"] == "response.output_item.added"]
    assert [each["output_index"] for each in events if each["type"] == "response.output_item.added"] == [*range(5)]
    assert {each["status"] for each in begun} == {"in_progress"}
    assert [each["item"] for each in events if each["type"] == "response.output_item.done"] == outputs.objects
    for place, item in enumerate(outputs.objects):
        own = [each for each in events if each["output_index"] == place]
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(each["delta"] for each in own if each["type"].endswith(".delta")) == text
        assert {each["item_id"] for each in own if "item_id" in each} == {item["id"]}
        scores = [one["token"] for each in own if each["type"].endswith(".delta") for one in each.get("logprobs", ())]
        if item["type"] == "message":
            assert "".join(scores) == text == "".join(one["token"] for one in item["content"][0]["logprobs"])


def test_log_probabilities_are_those_of_their_tokens(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, WHOLE)
    outputs, _ = fed(tokenizer, WHOLE, ask=0.3)
    (part,) = outputs.objects[-1]["content"]
    begin = len(ids) - len("It rains.") - 1
    assert [each["logprob"] for each in part["logprobs"]] == [-float(begin + at) for at in range(len("It rains."))]


def test_one_call_where_only_one_is_wanted(tokenizer: Tokenizer) -> None:
    for ask in (0.0, 1.0):
        outputs, _ = fed(tokenizer, WHOLE, several=False, ask=ask)
        assert [each["name"] for each in outputs.objects if each["type"] == "function_call"] == ["rain"]


@pytest.mark.parametrize("ask", [0.0, 1.0])
def test_a_cut_answer(tokenizer: Tokenizer, ask: float) -> None:
    """Its last item says so, unless the model had ended that."""
    outputs, events = fed(tokenizer, WHOLE.removesuffix("<|return|>"), cut=True, ask=ask)
    assert [each["status"] for each in outputs.objects] == ["completed"] * 4 + ["incomplete"]
    assert events[-1]["item"] == outputs.objects[-1]
    outputs, _ = fed(tokenizer, "<|channel|>analysis<|message|>They ask.<|end|><|start|>assist", cut=True, ask=ask)
    assert [each["status"] for each in outputs.objects[:1]] == ["completed"]


def test_nothing_and_plain_text(tokenizer: Tokenizer) -> None:
    assert fed(tokenizer, "")[0].objects == [] and fed(tokenizer, "")[1] == []
    (said,) = fed(tokenizer, "<|message|>Yes.", ask=1.0)[0].objects
    assert said["content"][0]["text"] == "Yes."
