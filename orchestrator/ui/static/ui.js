"use strict";
// Charts, logs that follow, and the stream of changes. Everything else works without this file.

const run = document.body.dataset.run;
const byId = (id) => document.getElementById(id);
const COLORS = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"]; // as in reporting/charts.py
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

document.querySelector(".top nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

// ---- stream of changes: one connection for the page ----
const listeners = { rows: [], logs: [], open: [] };
if (run) {
  const live = byId("live");
  const source = new EventSource(`/run/${run}/events`);
  const show = (isOn) => {
    live.className = `live ${isOn ? "on" : "off"}`;
    live.textContent = isOn ? "live" : "connection lost, trying again";
  };
  let wasOpen = false;
  source.addEventListener("open", (event) => {
    if (event.data === undefined) return; // the browser's own event, before the server has looked
    show(true);
    document.body.dispatchEvent(new CustomEvent("status"));
    if (wasOpen) listeners.open.forEach((f) => f());
    wasOpen = true;
  });
  source.onerror = () => show(false);
  source.addEventListener("status", () => document.body.dispatchEvent(new CustomEvent("status")));
  for (const kind of ["rows", "logs"]) {
    source.addEventListener(kind, (event) => { const data = JSON.parse(event.data); listeners[kind].forEach((f) => f(data)); });
  }
}

// ---- losses ----
const losses = byId("losses");
if (losses) {
  let curves = null, plot = null, isLog = false, isSmooth = false, isHeldOut = false;
  const many = () => curves.series.length > 16;
  const smooth = (values) => {
    let mean = null;
    return values.map((value) => (value === null ? null : (mean = mean === null ? value : 0.85 * mean + 0.15 * value)));
  };
  const color = (series) => {
    if (series.kind !== "expert") return series.kind === "router" ? css("--warn") : css("--muted");
    const k = Number(series.name.split("_")[1]);
    return many() ? `hsl(${(k * 137.5) % 360} 45% 55%)` : COLORS[k % COLORS.length];
  };
  const data = () => [curves.steps, ...curves.series.map((s) => { const values = isHeldOut ? s.held_out ?? s.losses.map(() => null) : s.losses; return isSmooth ? smooth(values) : values; })];
  const draw = () => {
    plot?.destroy();
    if (!curves.series.length) { losses.textContent = "No training has reported a loss yet."; return; }
    losses.textContent = "";
    const axis = { stroke: css("--muted"), grid: { stroke: css("--chart-grid"), width: 1 }, ticks: { stroke: css("--chart-grid"), width: 1 }, font: "12px system-ui, sans-serif" };
    plot = new uPlot({
      width: losses.clientWidth, height: Math.max(300, Math.min(440, losses.clientWidth * 0.45)),
      scales: { x: { time: false }, y: { distr: isLog ? 3 : 1 } },
      axes: [{ ...axis }, { ...axis, size: 62 }],
      legend: { show: !many() }, cursor: { focus: { prox: 24 } }, focus: { alpha: 0.15 },
      hooks: { setSeries: [(_, index) => { byId("curve-name").textContent = index > 0 ? curves.series[index - 1].name : ""; }] },
      series: [{ label: "step" }, ...curves.series.map((s) => ({
        label: s.name, stroke: color(s), width: many() ? 1 : 1.75, spanGaps: true, dash: s.kind === "expert" ? undefined : [6, 4], points: { show: false },
        value: (_, value) => (value === null || value === undefined ? "–" : value.toPrecision(4)),
      }))],
    }, data(), losses);
  };
  const table = byId("last-rows").tBodies[0];
  const list = (name, step, loss) => {
    let row = [...table.rows].find((candidate) => candidate.dataset.name === name);
    if (!row) {
      row = table.insertRow();
      row.dataset.name = name;
      const head = document.createElement("th");
      head.scope = "row"; head.textContent = name;
      row.append(head, document.createElement("td"), document.createElement("td"));
    }
    row.cells[1].textContent = step.toLocaleString("en");
    row.cells[2].textContent = loss.toPrecision(5);
  };
  const load = async () => {
    const answer = await fetch(losses.dataset.url);
    if (!answer.ok) { losses.textContent = await answer.text(); return; }
    curves = await answer.json();
    curves.series.forEach((s) => { const last = s.losses.findLastIndex((v) => v !== null); list(s.name, Math.round(curves.steps[last]), s.losses[last]); });
    byId("held-out").hidden = !curves.series.some((s) => s.held_out);
    draw();
  };
  const add = (rows) => {
    if (!curves) return;
    for (const [name, [step, loss, heldOut]] of Object.entries(rows)) {
      const series = curves.series.find((s) => s.name === name);
      if (!series) { load(); return; }
      let at = curves.steps.findIndex((s) => s >= step);
      if (at < 0) at = curves.steps.length;
      if (curves.steps[at] !== step) { curves.steps.splice(at, 0, step); curves.series.forEach((s) => { s.losses.splice(at, 0, null); s.held_out?.splice(at, 0, null); }); }
      series.losses[at] = loss;
      if (heldOut !== null) { series.held_out ??= curves.steps.map(() => null); series.held_out[at] = heldOut; }
      list(name, step, loss);
    }
    if (curves.steps.length > 1500) load(); else plot ? plot.setData(data()) : draw();
  };
  const toggle = (id, act) => byId(id).addEventListener("click", (event) => {
    const isOn = event.target.getAttribute("aria-pressed") !== "true";
    event.target.setAttribute("aria-pressed", isOn); act(isOn); if (curves) draw();
  });
  toggle("log-scale", (isOn) => { isLog = isOn; });
  toggle("held-out", (isOn) => { isHeldOut = isOn; });
  toggle("smooth", (isOn) => { isSmooth = isOn; });
  listeners.rows.push(add); listeners.open.push(load);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => curves && draw());
  new ResizeObserver(() => plot && plot.width !== losses.clientWidth && plot.setSize({ width: losses.clientWidth, height: plot.height })).observe(losses);
  load();
}

// ---- logs ----
const log = byId("log");
if (log) {
  let end = -1, isFollowing = true, isBusy = false, isAgain = false;
  const LIMIT = 400000;
  const more = async () => {
    if (isBusy) { isAgain = true; return; }
    isBusy = true;
    try {
      for (;;) {
        const answer = await fetch(`${log.dataset.url}&start=${end}`);
        const text = await answer.text();
        if (!answer.ok) { log.textContent = text; break; }
        const next = Number(answer.headers.get("X-Log-End"));
        if (text) { log.append(text); while (log.textContent.length > LIMIT && log.childNodes.length > 1) log.firstChild.remove(); }
        if (next === end || !text) { end = next; break; }
        end = next;
      }
      if (isFollowing) log.scrollTop = log.scrollHeight;
    } finally { isBusy = false; }
    if (isAgain) { isAgain = false; await more(); }
  };
  byId("follow").addEventListener("click", (event) => {
    isFollowing = !isFollowing;
    event.target.setAttribute("aria-pressed", isFollowing);
    if (isFollowing) log.scrollTop = log.scrollHeight;
  });
  listeners.logs.push((stages) => { if (stages.includes(log.dataset.stage)) more(); });
  listeners.open.push(more);
  more();
}

// ---- keys: a number opens a view, 0 the list of runs ----
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "0") location.href = "/";
  const link = /^[1-9]$/.test(event.key) ? document.querySelectorAll(".top li a")[event.key - 1] : null;
  if (link) location.href = link.href;
});

// ---- map of the features ----
const map = byId("map");
const clusterColor = (k) => (k < COLORS.length ? COLORS[k] : `hsl(${(k * 137.5) % 360} 45% 55%)`);
if (map) {
  let points = null, chosen = -1, timer = 0;
  const picture = byId("map-picture"), caption = byId("map-caption");
  const place = (i) => [16 + points.x[i] * (map.clientWidth - 32), 16 + (1 - points.y[i]) * (map.clientHeight - 32)];
  const draw = () => {
    const scale = window.devicePixelRatio || 1, brush = map.getContext("2d");
    map.width = map.clientWidth * scale; map.height = map.clientHeight * scale;
    brush.scale(scale, scale); brush.globalAlpha = 0.75;
    const radius = points.x.length > 1500 ? 2.4 : 3.4;
    points.x.forEach((_, i) => {
      const [x, y] = place(i);
      brush.fillStyle = clusterColor(points.cluster[i]); brush.beginPath(); brush.arc(x, y, radius, 0, 7); brush.fill();
    });
    if (chosen >= 0) {
      const [x, y] = place(chosen);
      brush.globalAlpha = 1; brush.lineWidth = 2; brush.strokeStyle = css("--ink"); brush.beginPath(); brush.arc(x, y, 7, 0, 7); brush.stroke();
    }
  };
  const choose = (i) => {
    if (i === chosen || i < 0) return;
    chosen = i; draw(); clearTimeout(timer);
    timer = setTimeout(() => {
      picture.hidden = false; picture.src = `${map.dataset.picture}${points.row[i]}.png`;
      picture.alt = `Training image ${points.row[i]} of cluster ${points.cluster[i]}`;
      caption.textContent = `Image ${points.row[i].toLocaleString("en")}, cluster ${points.cluster[i]}`;
    }, 60);
  };
  map.addEventListener("pointermove", (event) => {
    if (!points) return;
    let best = -1, nearest = 400;
    points.x.forEach((_, i) => { const [x, y] = place(i), d = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2; if (d < nearest) { nearest = d; best = i; } });
    choose(best);
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !points?.x.length) return;
    event.preventDefault(); choose((chosen + step + points.x.length) % points.x.length);
  });
  fetch(map.dataset.url).then(async (answer) => {
    if (!answer.ok) { caption.textContent = await answer.text(); return; }
    points = await answer.json(); draw();
    const legend = byId("map-legend");
    for (const k of [...new Set(points.cluster)].sort((a, b) => a - b)) {
      const item = document.createElement("li"), dot = document.createElement("span");
      dot.className = "dot"; dot.style.background = clusterColor(k); item.append(dot, `cluster ${k}`); legend.append(item);
    }
    const share = document.createElement("li");
    share.textContent = `${points.x.length.toLocaleString("en")} images; the two axes hold ${(100 * points.variance).toFixed(0)} % of the variance`;
    legend.append(share);
    new ResizeObserver(draw).observe(map);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  });
}
