"""Conversations as clients send them: tools, reasoning, parts, nulls, instructions, several turns."""

from typing import Any

Message = dict[str, Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Where & when <it> rains",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
                "days": {"type": ["integer", "null"], "default": {"b": 1, "a": [True, None, 0.5]}},
                "grid": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            },
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {"properties": {}}}}
TOOLS = [WEATHER, CLOCK]


def user(content: Any = "Rain?", **more: Any) -> Message:
    return {"role": "user", "content": content, **more}


def system(content: Any = "Be brief.", **more: Any) -> Message:
    return {"role": "system", "content": content, **more}


def developer(content: Any = "Answer in Latin.", **more: Any) -> Message:
    return {"role": "developer", "content": content, **more}


def assistant(content: Any = "Yes.", **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any = "[1, 2]", **more: Any) -> Message:
    return {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": content, **more}


def calls(*arguments: Any, content: Any = "", **more: Any) -> Message:
    """An assistant's calls of `weather`, one for each of these arguments."""
    made = [
        {"id": f"call{number:05}", "type": "function", "function": {"name": "weather", "arguments": each}}
        for number, each in enumerate(arguments, 1)
    ]
    return assistant(content, tool_calls=made, **more)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ODD = "a < b & 'c' \"d\" 東京 🙂\n\n  indented {{ braces }} {% if %} \\ <|end|>"
OBJECT = {"city": "Zürich", "days": 2, "x": "</b>", "deep": {"b": [1.5, None, True], "a": "\n"}}
TEXT = '{"city": "Zürich", "days": 2, "x": "</b>", "deep": {"b": [1.5, null, true], "a": "\\n"}}'

CONVERSATIONS: dict[str, list[Message]] = {
    "a question": [user("Why?")],
    "odd characters": [user(ODD)],
    "spaces around": [system("  Be brief. \n"), user("\n Why? \n")],
    "an empty text": [user("")],
    "line ends": [user("a\r\nb\rc\n")],
    "a long text": [user("word " * 2000)],
    # instructions
    "system": [system(), user()],
    "developer": [developer(), user()],
    "system and developer": [system(), developer(), user()],
    "developer and system": [developer(), system(), user()],
    "two of the system": [system(), user(), assistant(), system("In Greek."), user("And?")],
    "system alone": [system()],
    "developer later": [user(), assistant(), developer("In Greek."), user("And?")],
    "an empty system": [system(""), user()],
    # turns
    "three turns": [user("One"), assistant("1"), user("Two"), assistant("2"), user("Three")],
    "ends with the assistant": [user("One"), assistant("1")],
    "begins with the assistant": [assistant("Hello."), user("One")],
    "two questions": [user("One"), user("Two")],
    "an unknown role": [user("One"), {"role": "critic", "content": "No."}],
    "thoughts in the text": [user(), assistant("<think>\nHm.\n</think>\n\nYes."), user("And?")],
    "names": [user("Why?", name="Ann"), assistant(name="Bob"), user("And?", name="Ann")],
    # reasoning
    "thinking": [user(), assistant(thinking="Clouds."), user("And?")],
    "reasoning_content": [user(), assistant(reasoning_content="Clouds."), user("And?")],
    "reasoning": [user(), assistant(reasoning="Clouds."), user("And?")],
    "two kinds of reasoning": [user(), assistant(thinking="One.", reasoning_content="Two."), user("And?")],
    "three kinds of reasoning": [user(), assistant(reasoning="3", thinking=None, reasoning_content="2"), user("And?")],
    "reasoning last": [user(), assistant("Yes.", reasoning="Clouds\n")],
    "empty reasoning": [user(), assistant(reasoning_content=""), user("And?")],
    "reasoning and a call": [user(), calls(OBJECT, reasoning_content="Call it."), tool(), assistant(), user("So?")],
    # tool calls
    "a call": [user(), calls(OBJECT), tool(), user("So?")],
    "a call as text": [user(), calls(TEXT), tool(), user("So?")],
    "a call without arguments": [user(), calls({}), tool(), user("So?")],
    "a call with none as text": [user(), calls("{}"), tool(), user("So?")],
    "two calls": [user(), calls(OBJECT, {"city": "Rome"}), tool("1"), tool("2"), user("So?")],
    "two calls as text": [user(), calls(TEXT, '{"city":"Rome"}'), tool("1"), tool("2"), user("So?")],
    "a call of null content": [user(), calls(OBJECT, content=None), tool(), user("So?")],
    "a call as text of null content": [user(), calls(TEXT, content=None), tool(), assistant("Dry."), user("So?")],
    "a call and words": [system(), user(), calls(OBJECT, content="Let me see."), tool(), user("So?")],
    "a call without `function`": [user(), assistant("", tool_calls=[{"name": "weather", "arguments": OBJECT}]), tool()],
    "a tool's object": [user(), calls(OBJECT), tool({"rain": [0.1, "much"]})],
    "a tool's list": [user(), calls(OBJECT), tool([1, 2])],
    "a tool without a call": [user(), tool()],
    # nulls
    "null content": [user(None)],
    "null calls": [user(), assistant(tool_calls=None), user("And?")],
    "null reasoning": [user(), assistant(reasoning_content=None, thinking=None), user("And?")],
    "null everywhere": [system(name=None), user(name=None), assistant(tool_calls=None, refusal=None), user("So?")],
    # parts
    "a part": [user(parts("Why?"))],
    "two parts": [user(parts("Why", " now?"))],
    "parts everywhere": [system(parts("Be ", "brief.")), user(parts("One")), assistant(parts("1", "!")), user("Two")],
    "a developer's parts": [developer(parts("In ", "Latin.")), user(parts("Hi"))],
    "a tool's parts": [user(), calls(OBJECT), tool(parts("[1", ", 2]")), user("So?")],
    "no parts": [user([])],
    "odd parts": [user(parts(ODD, "", "\n"))],
}
