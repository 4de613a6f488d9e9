"""Chat templates in the styles of published ones, written for these tests; and what each is written for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """A template, and in which shape it wants what comes in several."""

    name: str
    source: str
    parts: bool = False  # goes over a list of content parts
    arguments: str = "either"  # of a tool call: "object", "text", or both as they come


# One instruction, of the system or the developer; channels; types of tools; reasoning under the name `thinking`.
HARMONY = Style(
    "harmony",
    """\
{#- the type of a tool's parameter, as TypeScript writes it -#}
{%- macro typed(spec) -%}
    {%- if spec.type == "array" -%}
        {{- typed(spec["items"]) + "[]" -}}
    {%- elif spec.enum is defined -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") -}}
    {%- else -%}
        {{- spec.type | default("any") -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro namespaced(tools) -%}
    {{- "namespace functions {\\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\\ntype " + tool.name + " = (_: {\\n" }}
        {%- for name, spec in tool.parameters.properties.items() %}
            {{- name + ("" if name in (tool.parameters.required or []) else "?") + ": " + typed(spec) }}
            {%- if spec.default is defined %}{{ ", // default: " + spec.default | tojson }}{% endif %}
            {{- ",\\n" }}
        {%- endfor %}
        {{- "}) => any;\\n" }}
    {%- endfor %}
    {{- "}" }}
{%- endmacro -%}
{%- if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif -%}
{{- "<|start|>system<|message|>Date: " + strftime_now("%Y-%m-%d") + "\\nReasoning: " + reasoning_effort }}
{%- if builtin_tools %}{{ "\\nTools: " + builtin_tools | join(", ") }}{% endif %}
{{- "<|end|>" }}
{%- if messages[0].role in ["developer", "system"] %}
    {%- set rules, rest = messages[0].content, messages[1:] %}
{%- else %}
    {%- set rules, rest = "", messages %}
{%- endif %}
{%- if rules or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if rules %}{{ "# Instructions\\n\\n" + rules + "\\n\\n" }}{% endif %}
    {%- if tools %}{{ "# Tools\\n\\n" + namespaced(tools) }}{% endif %}
    {{- "<|end|>" }}
{%- endif %}
{%- set last = namespace(call=none) %}
{%- for message in rest %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {%- if message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- elif message.content %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>" }}
        {%- endif %}
        {%- set call = message.tool_calls[0] %}
        {%- if call.function %}{% set call = call.function %}{% endif %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
        {{- call.arguments | tojson }}{{ "<|call|>" }}
        {%- set last.call = call.name %}
    {%- elif message.role == "assistant" %}
        {%- if loop.last and "thinking" in message %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "tool" %}
        {%- if last.call is none %}{{ raise_exception("a tool's message without a call before") }}{% endif %}
        {{- "<|start|>functions." + last.call + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson }}{{ "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
""",
    arguments="object",
)

# Any role; tools as JSON lines; reasoning in tags, of the turns after the last question; tools' answers share a turn.
CHATML = Style(
    "chatml",
    """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(searching=true, question=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if seen.searching and message.role == "user" and message.content is string
            and not message.content.startswith('<tool_response>') %}
        {%- set seen.searching, seen.question = false, index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role == "user" or message.role == "developer" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > seen.question and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{ '\\n' }}{% endif %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
)

# Headers for any role, trimmed contents, a call as one JSON object.
LLAMA = Style(
    "llama",
    """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}{{ "\\n\\n" + t | tojson(indent=4) }}{% endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception("one call at a time") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
    arguments="object",
)

# Strict turns of user and assistant, the system's words in the last question, whole calls as JSON, bos and eos.
MISTRAL = Style(
    "mistral",
    """\
{%- if messages[0]["role"] == "system" %}
    {%- set rules = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set last = turns | selectattr("role", "equalto", "user") | list | last %}
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
    {%- if message.role in ["user", "assistant"] and not message.tool_calls %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate: user/assistant/user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == last) %}
            {{- "[AVAILABLE_TOOLS]" + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and rules is defined %}
            {{- "[INST] " + rules + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {%- if tool_call.id is not defined %}{{ raise_exception("a call needs an id") }}{% endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("only user, assistant and tool are known, after one of the system") }}
    {%- endif %}
{%- endfor %}
""",
    arguments="object",
)

# All systems' words first; calls' arguments as they are; what was thought is split off.
DEEPSEEK = Style(
    "deepseek",
    """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', first=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.first %}
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.first = false %}{%- else %}
{%- set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{ '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none %}
{%- set ns.is_first = true %}
{%- for tool in message['tool_calls'] %}
{%- if ns.is_first %}{{ '<|Assistant|><|calls|>' }}{%- set ns.is_first = false %}{%- else %}{{ '\\n' }}{%- endif %}
{{- tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] + '\\n```' }}
{%- endfor %}{{ '<|end of calls|>' + eos_token }}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + eos_token }}
{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{ '<|output|>' + message['content'] }}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|><think>\\n' }}{% endif %}""",
    arguments="text",
)

# Marks what is trained on; what is set within the mark ends there. Reads `reasoning_content` or `thinking`.
GENERATION = Style(
    "generation",
    """\
{%- set mark = "outer" %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
{{ "<|assistant|>" }}{% generation %}{% set mark = "inner" %}
{%- if message.reasoning_content or message.thinking -%}
<think>{{ message.thinking or message.reasoning_content }}|{{ message.reasoning_content }}</think>
{%- endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ call.function.name }}({{ call.function.arguments | dictsort }})
{%- endfor %}
{{ mark }}<|end|>{% endgeneration %}
    {%- else %}
<|{{ message.role }}|>{{ message.content }}{{ mark }}<|end|>
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    arguments="object",
)

# Text or parts, through a macro; a call's arguments item by item.
VISION = Style(
    "vision",
    """\
{%- macro show(content, count=true) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if 'image' in item or item.type == 'image' -%}
                {{- '<|image|>' -}}
            {%- elif 'text' in item -%}
                {{- '[' ~ loop.index ~ ']' ~ item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- elif content is none or content is undefined -%}
        {{- '' -}}
    {%- endif -%}
{%- endmacro -%}
{%- if tools %}{% for tool in tools %}{{ '<tool>' + tool.function.name + '</tool>' }}{% endfor %}{% endif %}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + show(message.content, false) }}
    {%- for tool_call in message.tool_calls or [] %}
        {%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
        {{- '<function=' + tool_call.name + '>' }}
        {%- for name, value in tool_call.arguments | items %}
            {{- '<' + name + '>' }}
            {%- set value = value if value is string else value | tojson %}
            {{- value + '</' + name + '>' }}
        {%- endfor %}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
""",
    parts=True,
    arguments="object",
)

# The shortest kind: whatever stands in a message.
PLAIN = Style(
    "plain",
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant",
)

STYLES = (HARMONY, CHATML, LLAMA, MISTRAL, DEEPSEEK, GENERATION, VISION, PLAIN)
