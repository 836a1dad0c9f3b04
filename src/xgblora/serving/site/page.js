"use strict";
const $ = (id) => document.getElementById(id);
let run;
let stages = [];
let asked = 0;

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

function fields() {
  return run.columns.length ? run.columns : ["message"];
}

function row() {
  return Object.fromEntries(fields().map((name) => [name, $(`field-${name}`).value]));
}

function showOptions(id, stage) {
  $(id).replaceChildren(
    ...Object.entries(stage.probabilities)
      .sort((one, other) => other[1] - one[1])
      .map(([option, sure]) => {
        const line = document.createElement("div");
        line.className = option === stage.answer ? "option chosen" : "option";
        const [name, share, bar, part] = ["span", "span", "div", "span"].map((kind) => document.createElement(kind));
        name.textContent = option;
        share.textContent = `${(100 * sure).toFixed(1)} %`;
        bar.className = "bar";
        part.style.width = `${100 * sure}%`;
        bar.append(part);
        line.append(name, share, bar);
        return line;
      }),
  );
}

function slide() {
  const count = Number($("boosters").value);
  $("count").textContent = `${count} of ${run.boosters}`;
  $("some-title").textContent = `With ${count} booster${count === 1 ? "" : "s"}`;
  if (stages.length) showOptions("some", stages[count]);
}

async function write(id, boosters, number) {
  const answer = $(id);
  answer.textContent = "...";
  const content = fields().length === 1 ? row()[fields()[0]] : JSON.stringify(row());
  const response = await post("/v1/chat/completions", {
    model: `${run.name}:${boosters}`,
    messages: [{ role: "user", content }],
    stream: true,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  answer.textContent = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done || number !== asked) return reader.cancel();
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      answer.textContent += piece.choices[0].delta.content || "";
    }
  }
}

async function ask() {
  const number = ++asked;
  $("error").textContent = "";
  try {
    if (run.writes) {
      await write("trained", run.boosters, number);
      if (number === asked) await write("base", 0, number);
      if (number === asked) await write("some", Number($("boosters").value), number);
      return;
    }
    const answered = await (await post("/api/stages", { row: row() })).json();
    if (number !== asked) return;
    stages = answered;
    showOptions("base", stages[0]);
    showOptions("trained", stages[stages.length - 1]);
    slide();
  } catch (error) {
    if (number === asked) $("error").textContent = error.message;
  }
}

function addField(name) {
  const label = document.createElement("label");
  label.htmlFor = `field-${name}`;
  label.textContent = name;
  const text = document.createElement("textarea");
  text.id = `field-${name}`;
  text.required = true;
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("fields").append(label, text);
}

function addExample(values) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const text = Object.values(values).join(" · ");
  button.textContent = text.length > 120 ? `${text.slice(0, 120)}…` : text;
  button.addEventListener("click", () => {
    for (const [name, value] of Object.entries(values)) $(`field-${name}`).value = value;
    ask();
  });
  item.append(button);
  $("examples").append(item);
}

async function start() {
  run = await (await fetch("/api/run")).json();
  document.title = $("name").textContent = run.name;
  $("about").textContent = `It learned ${run.task}, with ${run.boosters} booster${run.boosters === 1 ? "" : "s"}.`;
  fields().forEach(addField);
  run.examples.forEach(addExample);
  $("tries").hidden = !run.examples.length;
  $("boosters").max = run.boosters;
  $("boosters").value = Math.floor(run.boosters / 2);
  $("boosters").addEventListener("input", slide);
  $("boosters").addEventListener("change", () => run.writes && ask());
  slide();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
}

start();
