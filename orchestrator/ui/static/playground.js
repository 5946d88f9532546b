"use strict";
// The form of the playground: previews and images of a service, as they arrive, on canvases.

const form = document.getElementById("playground");
if (form) {
  const models = JSON.parse(form.dataset.models), field = (name) => form.elements[name];
  const state = document.getElementById("playground-state"), drawn = document.getElementById("drawn"), stop = document.getElementById("stop");
  let running = null;
  const show = () => {
    const model = models.find((m) => m.id === field("model").value);
    const classes = model.class_names?.length ? model.class_names : [...Array(model.num_classes || 0).keys()].map(String);
    const isShown = { text: model.has_text, class: classes.length, steps: true, guidance: true };
    form.querySelectorAll("[data-for]").forEach((label) => { label.hidden = !isShown[label.dataset.for]; });
    field("class_label").replaceChildren(new Option("any", ""), ...classes.map((name) => new Option(name)));
    field("steps").placeholder = model.steps; field("guidance_scale").placeholder = model.guidance_scale;
    field("selection").options[0].textContent = `default (${model.selection})`;
  };
  const body = () => {
    const value = (name) => (field(name).closest("[hidden]") ? "" : field(name).value.trim());
    const n = Number(value("n")), first = Number(value("seed"));
    const asked = { model: value("model"), prompt: value("prompt"), n, seeds: [...Array(n).keys()].map((i) => first + i), stream: true, partial_images: 3 };
    if (value("class_label")) asked.class_label = value("class_label");
    if (value("selection")) asked.selection = value("selection");
    for (const name of ["steps", "guidance_scale"]) if (value(name)) asked[name] = Number(value(name));
    return asked;
  };
  const place = (seed) => {
    const item = document.createElement("li"), canvas = document.createElement("canvas"), caption = document.createElement("span");
    canvas.width = canvas.height = 1; canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", `Seed ${seed}, not drawn yet`);
    caption.className = "caption"; caption.textContent = `seed ${seed}`;
    item.append(canvas, caption); drawn.append(item);
    return { canvas, caption, seed, number: 0, shown: 0 };
  };
  const paint = async (cell, event) => {
    const number = ++cell.number;
    const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
    const picture = await createImageBitmap(new Blob([bytes], { type: `image/${event.output_format}` }));
    if (number < cell.shown) return; // decoded later than the picture after it
    cell.shown = number; cell.canvas.width = picture.width; cell.canvas.height = picture.height;
    cell.canvas.getContext("2d").drawImage(picture, 0, 0);
    const isLast = event.type.endsWith("completed");
    cell.canvas.classList.toggle("preview", !isLast);
    cell.canvas.setAttribute("aria-label", `Seed ${cell.seed}, ${isLast ? "image" : "preview"}`);
    if (isLast) cell.caption.textContent = `seed ${event.seed}${Number.isInteger(event.expert) ? ` · expert ${event.expert}` : ""}`;
  };
  const explain = (text) => { try { return JSON.parse(text).error.message; } catch { return text; } };
  const read = async (answer, cells) => {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", done = 0;
    for (;;) {
      const part = await reader.read();
      if (part.done) return done;
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const text of events) {
        const data = text.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (text.startsWith("event: error")) throw new Error(explain(data));
        const event = JSON.parse(data);
        await paint(cells[event.index], event);
        if (event.type.endsWith("completed")) { done += 1; state.textContent = `${done} of ${cells.length} images`; }
      }
    }
  };
  const draw = async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = (running = new AbortController()), asked = body();
    drawn.replaceChildren();
    const cells = asked.seeds.map(place), start = performance.now();
    stop.disabled = false; state.textContent = "waiting";
    try {
      const answer = await fetch("/playground/images", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked), signal: mine.signal });
      if (!answer.ok) throw new Error(explain(await answer.text()));
      const done = await read(answer, cells);
      state.textContent = done < cells.length ? `The service ended after ${done} of ${cells.length} images.` : `${done} images in ${((performance.now() - start) / 1000).toFixed(1)} s`;
    } catch (error) {
      if (mine === running) state.textContent = error.name === "AbortError" ? "stopped" : error.message;
    } finally {
      if (mine === running) { running = null; stop.disabled = true; }
    }
  };
  stop.addEventListener("click", () => running?.abort());
  field("model").addEventListener("change", show);
  form.addEventListener("submit", draw);
  show();
}
