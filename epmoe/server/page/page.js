// The page: a conversation over /v1/chat/completions, and what /metrics says meanwhile.
//
//   send ─▶ messages ─▶ fetch ─▶ events ─▶ Answer (reasoning, content, calls) ─▶ elements, once a frame
//
// What a model says becomes text, never markup: the policy that the page comes with forbids the browser the rest.

const $ = (id) => document.getElementById(id);
const [log, text, settings] = [$("log"), $("text"), $("settings")];
const FIGURES_MS = 2000;
const NEAR_END = 80; // pixels: who is so near the end wants to stay there

let messages = []; // as the API has them, without the system message
let open = []; // calls of the last answer: {id, field} whose results are to be sent
let running = null; // the AbortController of the answer that comes

/** An element with a class and children, each an element or a text. */
function make(tag, name = "", ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

function button(label, act) {
  const made = make("button", "", label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// --- Markdown, the little that answers need: code, bold, lists, headings ---

/** A line's pieces: `code`, **bold** and plain text. */
function inline(line) {
  return line.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).filter(Boolean).map((part) => {
    if (/^`[^`]+`$/.test(part)) return make("code", "", part.slice(1, -1));
    if (/^\*\*[^*]+\*\*$/.test(part)) return make("strong", "", ...inline(part.slice(2, -2)));
    return part;
  });
}

const FENCE = /^ {0,3}(```+|~~~+)(.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;

/** A text's blocks, {kind, lines}; those before the last one stay as they are while the text grows. */
function blocks(source) {
  const found = [];
  let fence = null;
  let last = null;
  const begin = (kind, line) => found.push((last = { kind, lines: [line] }));
  for (const line of source.split("\n")) {
    const mark = line.match(FENCE)?.[1];
    if (fence) {
      if (mark?.startsWith(fence) && line.trim() === mark) fence = last = null;
      else last.lines.push(line);
    } else if (mark) {
      fence = mark;
      begin("code", line);
    } else if (HEADING.test(line)) {
      begin("heading", line);
      last = null;
    } else if (ITEM.test(line)) {
      if (last?.kind === "list") last.lines.push(line);
      else begin("list", line);
    } else if (/^\s*\|.*\|\s*$/.test(line)) {
      if (last?.kind === "table") last.lines.push(line);
      else begin("table", line);
    } else if (!line.trim()) {
      last = null;
    } else if (last && last.kind !== "table") {
      last.lines.push(line);
    } else begin("text", line);
  }
  return found;
}

function list(lines) {
  const items = [];
  for (const line of lines) {
    const match = line.match(ITEM);
    if (!match) {
      items.at(-1).append("\n", ...inline(line.trim()));
      continue;
    }
    const item = make("li", "", ...inline(match[3]));
    item.dataset.depth = Math.min(2, Math.floor(match[1].replaceAll("\t", "  ").length / 2));
    if (match[2]) item.value = Number(match[2]);
    items.push(item);
  }
  return make(ITEM.exec(lines[0])[2] ? "ol" : "ul", "", ...items);
}

function block({ kind, lines }) {
  if (kind === "code") return make("pre", "", make("code", "", lines.slice(1).join("\n")));
  if (kind === "table") return make("pre", "", make("code", "", lines.join("\n")));
  if (kind === "heading") return make("h3", "", ...inline(lines[0].match(HEADING)[1]));
  return kind === "list" ? list(lines) : make("p", "", ...inline(lines.join("\n")));
}

/** Let `place` show `source`; what it shows already stays, so that a selection does, too. */
function show(place, source) {
  const found = blocks(source);
  found.forEach((each, at) => {
    const key = each.kind + "\n" + each.lines.join("\n");
    const old = place.children[at];
    if (old?.key === key) return;
    const made = block(each);
    made.key = key;
    if (old) old.replaceWith(made);
    else place.append(made);
  });
  while (place.children.length > found.length) place.lastChild.remove();
}

// --- An answer ---

class Answer {
  constructor() {
    this.reasoning = this.content = this.reason = "";
    this.calls = [];
    this.usage = null;
    this.begun = performance.now();
    this.first = this.last = 0; // of a chunk, in ms since it was asked
    this.thought = make("details", "thought thinking", make("summary", "", "Reasoning …"), make("div"));
    this.thought.hidden = true;
    this.body = make("div");
    this.tools = make("div");
    this.foot = make("div", "foot", make("span", "", "…"));
    this.element = make("article", "answer", this.thought, this.body, this.tools, this.foot);
  }

  /** Take an event's object. */
  take(chunk) {
    this.last = performance.now() - this.begun;
    this.first ||= this.last;
    this.usage = chunk.usage ?? this.usage;
    const [choice] = chunk.choices ?? [];
    if (choice) {
      const delta = choice.delta ?? {};
      this.reasoning += delta.reasoning ?? delta.reasoning_content ?? "";
      this.content += delta.content ?? "";
      for (const part of delta.tool_calls ?? []) this.call(part);
      this.reason = choice.finish_reason ?? this.reason;
    }
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  call(part) {
    const call = (this.calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= part.id ?? "";
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }

  draw() {
    this.frame = null;
    const stay = document.documentElement.scrollHeight - scrollY - innerHeight < NEAR_END;
    if (this.reasoning) {
      const thinking = !this.reason && !this.content && !this.calls.length;
      const words = this.reasoning.trim().split(/\s+/).length;
      this.thought.hidden = false;
      this.thought.classList.toggle("thinking", thinking);
      this.thought.firstChild.textContent = thinking ? "Reasoning …" : `Reasoning, ${words} words`;
      show(this.thought.lastChild, this.reasoning);
    }
    show(this.body, this.content);
    this.calls.forEach((call, at) => {
      if (!this.tools.children[at]) {
        const head = make("figcaption", "", "calls ", make("code", "", ""));
        this.tools.append(make("figure", "call", head, make("pre", "", make("code"))));
      }
      const [head, given] = this.tools.children[at].children;
      head.lastChild.textContent = call.function.name;
      given.firstChild.textContent = pretty(call.function.arguments);
    });
    this.foot.firstChild.textContent = this.figures().join(" · ");
    if (stay) scrollTo(0, document.documentElement.scrollHeight);
  }

  figures() {
    if (!this.first) return [this.reason || "…"];
    const found = [];
    const tokens = this.usage?.completion_tokens ?? 0;
    if (tokens > 1 && this.last > this.first) {
      found.push(`${(((tokens - 1) * 1000) / (this.last - this.first)).toFixed(1)} tokens/s`);
    }
    found.push(`first token ${seconds(this.first)}`);
    if (tokens) found.push(`${tokens} token${tokens > 1 ? "s" : ""}`);
    const { prompt_tokens: prompt, prompt_tokens_details: details } = this.usage ?? {};
    if (prompt) found.push(`prompt ${prompt}, ${details?.cached_tokens ?? 0} from cache`);
    if (this.reason === "length") found.push("cut at its length");
    if (["stopped", "failed"].includes(this.reason)) found.push(this.reason);
    return found;
  }

  /** Nothing more comes; `why` where the answer itself did not say so. */
  end(why) {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.reason ||= why;
    this.draw();
    const said = this.content || this.reasoning;
    if (said) this.foot.append(button("Copy", (event) => copy(said, event.target)));
    this.element.dataset.ended = this.reason;
  }

  get message() {
    const said = { role: "assistant", content: this.content };
    if (this.reasoning) said.reasoning_content = this.reasoning;
    if (this.calls.length) said.tool_calls = this.calls;
    return said;
  }
}

const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);

function pretty(given) {
  try {
    return JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    return given; // it is not complete, or is no JSON: as it is
  }
}

async function copy(said, where) {
  try {
    await navigator.clipboard.writeText(said);
  } catch {
    // Without TLS a browser has no clipboard but this one.
    const field = make("textarea");
    field.value = said;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  where.textContent = "Copied";
  setTimeout(() => (where.textContent = "Copy"), 1500);
}

// --- Asking ---

/** What the server says of an error, as it is. */
class Refused extends Error {}

function wrong(error, status) {
  const { message, type, param, code } = error ?? {};
  const more = [type, code, param && `param ${param}`].filter(Boolean).join(", ");
  const said = message ?? "no answer that this page understands";
  return new Refused([status, said, more && `(${more})`].filter(Boolean).join(" "));
}

function headers() {
  const key = settings.elements.key.value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The request's body. Throws for tools that are no JSON. */
function body() {
  const { system, temperature, max_tokens, reasoning_effort, tools } = settings.elements;
  const asked = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  asked.messages = system.value.trim() ? [{ role: "system", content: system.value }, ...messages] : messages;
  if (temperature.value !== "") asked.temperature = Number(temperature.value);
  if (max_tokens.value !== "") asked.max_tokens = Number(max_tokens.value);
  if (reasoning_effort.value) asked.reasoning_effort = reasoning_effort.value;
  if (tools.value.trim()) {
    try {
      asked.tools = JSON.parse(tools.value);
    } catch (error) {
      throw new Refused(`Tools are no JSON: ${error.message}`);
    }
  }
  return JSON.stringify(asked);
}

/** The objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused("The connection ended before the answer did.");
    const parts = (kept + value).split("\n\n");
    kept = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Ask for the answer to `messages`, and show it as it comes. */
async function answer() {
  const found = new Answer();
  log.append(found.element);
  scrollTo(0, document.documentElement.scrollHeight);
  const control = (running = new AbortController());
  state();
  let error = null;
  try {
    const said = { "Content-Type": "application/json", ...headers() };
    const asked = { method: "POST", headers: said, body: body(), signal: control.signal };
    found.begun = performance.now();
    const response = await fetch("v1/chat/completions", asked);
    if (!response.ok) throw wrong((await response.json().catch(() => ({}))).error, response.status);
    for await (const chunk of events(response)) {
      if (chunk.error) throw wrong(chunk.error);
      found.take(chunk);
    }
  } catch (thrown) {
    error = control.signal.aborted ? null : thrown;
  }
  if (running !== control) return; // a new chat has begun meanwhile
  running = null;
  found.end(error ? "failed" : "stopped");
  if (found.first) messages.push(found.message);
  if (error) complain(found, error);
  else if (found.calls.length && found.reason === "tool_calls") expect(found);
  state();
  $("said").textContent = error ? error.message : "The answer is complete.";
}

function complain(found, error) {
  const said = error instanceof Refused ? error.message : `The server cannot be reached: ${error.message}`;
  found.foot.before(make("p", "error", said));
  if (/^401 /.test(said)) unfold(true, "key");
  const again = button("Try again", () => {
    if (running) return;
    if (found.first) messages.pop();
    found.element.remove();
    answer();
  });
  again.className = "again";
  found.foot.append(again);
}

/** Fields for what the called tools return. */
function expect(found) {
  open = found.calls.map((call, at) => {
    const field = make("textarea");
    field.rows = 1;
    field.placeholder = `what ${call.function.name} returned`;
    field.setAttribute("aria-label", field.placeholder);
    found.tools.children[at].append(field);
    return { id: call.id, name: call.function.name, field };
  });
  found.results = button("Send the results", () => running || send(""));
  found.results.className = "results";
  found.foot.before(found.results);
  open[0].field.focus();
}

/** The user's next message, after the results of calls that were open. */
function send(said) {
  for (const { id, name, field } of open) {
    messages.push({ role: "tool", tool_call_id: id, name, content: field.value });
    field.readOnly = true;
  }
  open = [];
  text.focus();
  log.querySelectorAll(".results, .again").forEach((each) => each.remove());
  if (said) {
    messages.push({ role: "user", content: said });
    log.append(make("div", "user", said));
  }
  answer();
}

// --- The page itself ---

function state() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !text.value.trim();
}

function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  state();
}

function unfold(shown, name) {
  settings.hidden = !shown;
  $("open").setAttribute("aria-expanded", String(shown));
  (shown ? settings.elements[name ?? "system"] : text).focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const said = text.value.trim();
  if (running || !said) return;
  text.value = "";
  fit();
  send(said);
});
text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("open").addEventListener("click", () => unfold(settings.hidden));
$("fresh").addEventListener("click", () => {
  running?.abort();
  [messages, open, running] = [[], [], null];
  log.replaceChildren();
  state();
  text.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && settings.contains(event.target)) unfold(false);
  else if (event.key === "Escape") running?.abort();
  else if (event.key === "/" && !event.target.matches("input, textarea, select")) {
    event.preventDefault();
    text.focus();
  }
});

// Settings and key live as long as the tab.
for (const field of settings.elements) {
  field.value = sessionStorage.getItem(field.name) ?? field.value;
  field.addEventListener("input", () => sessionStorage.setItem(field.name, field.value));
}
settings.addEventListener("submit", (event) => event.preventDefault());
settings.elements.key.addEventListener("change", () => model());

async function model() {
  const response = await fetch("v1/models", { headers: headers() }).catch(() => null);
  if (response?.status === 401) return unfold(true, "key");
  const found = response?.ok ? (await response.json()).data[0].id : "";
  $("model").textContent = found;
  if (found) document.title = `${found} · epmoe`;
}

/** Metrics without labels, by name. */
function parsed(exposed) {
  const found = [...exposed.matchAll(/^(epmoe_\w+) (\S+)$/gm)];
  return Object.fromEntries(found.map(([, name, value]) => [name, Number(value)]));
}

const percent = (part) => (Number.isFinite(part) ? `${(100 * part).toFixed(0)} %` : "–");
let before = {};

async function figures() {
  const response = document.hidden ? null : await fetch("metrics", { headers: headers() }).catch(() => null);
  if (response?.ok) {
    const now = parsed(await response.text());
    const steps = now.epmoe_steps_total - before.epmoe_steps_total;
    const taken = now.epmoe_step_seconds_total - before.epmoe_step_seconds_total;
    $("running").textContent = now.epmoe_requests_running ?? "–";
    $("waiting").textContent = now.epmoe_requests_waiting ?? "–";
    $("step").textContent = steps > 0 ? `${((1000 * taken) / steps).toFixed(1)} ms` : "–";
    $("used").textContent = percent(now.epmoe_cache_usage_ratio);
    $("hits").textContent = percent(now.epmoe_cached_tokens_total / now.epmoe_prompt_tokens_total);
    before = now;
  } else if (!document.hidden) {
    for (const each of document.querySelectorAll("#figures dd")) each.textContent = "–";
  }
  setTimeout(figures, FIGURES_MS);
}

fit();
model();
figures();
