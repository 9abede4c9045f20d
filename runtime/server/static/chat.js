// A conversation with the server this page came from. Text only ever becomes text: nothing is read as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const conversation = [];
let running = null; // the AbortController of the answer that is being made

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

function show(role, text) {
  const place = document.createElement("div");
  place.className = `message ${role}`;
  place.textContent = text;
  $("messages").append(place);
  place.scrollIntoView({ block: "end" });
  return place;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function request() {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...conversation] : conversation,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Yields the objects of a stream of server-sent events until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts.filter((one) => one.startsWith("data: "))) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function statistics(last, usage) {
  const { timings, seed } = last;
  const rate = (value) => value.toFixed(1);
  const parts = [
    `${usage.prompt_tokens} prompt tokens (${usage.prompt_tokens_details.cached_tokens} reused), ${rate(timings.prompt_per_second)}/s`,
    `${usage.completion_tokens} tokens, ${rate(timings.predicted_per_second)}/s`,
    `seed ${seed}`,
  ];
  if (last.choices[0].finish_reason === "length") parts.push("cut off at the limit");
  return parts.join(" · ");
}

async function answer() {
  const asked = conversation.at(-1);
  running = new AbortController();
  const place = show("assistant waiting", "");
  let text = "";
  let last = null;
  busy(true);
  complain("");
  $("stats").textContent = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice && choice.finish_reason) last = chunk;
      if (!choice) $("stats").textContent = statistics(last, chunk.usage);
      else if (choice.delta.content) {
        text += choice.delta.content;
        place.textContent = text;
        place.scrollIntoView({ block: "end" });
      }
    }
  } catch (error) {
    if (error.name === "AbortError") $("stats").textContent = "stopped";
    else complain(error.message);
  }
  place.classList.remove("waiting");
  running = null;
  if (conversation.at(-1) !== asked) {
    // a new conversation was begun meanwhile
  } else if (text) {
    conversation.push({ role: "assistant", content: text });
  } else {
    conversation.pop();
    place.previousElementSibling.remove();
    place.remove();
    if (!$("prompt").value) $("prompt").value = asked.content;
  }
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  document.body.dataset.state = yes ? "busy" : "idle";
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  $("prompt").value = "";
  conversation.push({ role: "user", content: text });
  show("user", text);
  answer();
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

$("stop").addEventListener("click", () => running?.abort());

$("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  $("messages").replaceChildren();
  $("stats").textContent = "";
  complain("");
  $("prompt").focus();
});

async function greet() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) {
      $("settings").open = response.status === 401;
      throw new Error(await failure(response));
    }
    const model = (await response.json()).data[0];
    $("model").textContent = `${model.id} · ${model.meta.n_ctx} tokens of context`;
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

$("key").addEventListener("change", greet);
busy(false);
greet();
$("prompt").focus();
