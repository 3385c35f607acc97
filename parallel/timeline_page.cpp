#include "parallel/timeline_page.h"

namespace dattn {

// Data: {ranks, phases: [{name, begin, end, verbs, steps, axes: [[name, bytes of a mean rank, share of the time that its
// busiest link is held]]}], spans: [[rank, kind, phase, step, begin, length, bytes, peer]]}, times in microseconds, kinds as in
// Span. Each rank's lane is a canvas; only what the window shows is drawn.
const char* const kTimelinePage = R"page(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>__TITLE__</title>
<style>
:root { --back: #fff; --lane: #f3f4f6; --line: #d5d9e0; --text: #1f2430; --faint: #6b7280;
  --k0: #2f6fb7; --k1: #9cc3ec; --k2: #e8912d; --k3: #c2412d; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181e; --lane: #1f242d; --line: #363d4a; --text: #e4e7ec; --faint: #98a1b0; --k0: #5b9be0; --k1: #34587f; }
}
body { margin: 0; font: 13px/1.4 system-ui, sans-serif; background: var(--back); color: var(--text); }
header { position: sticky; top: 0; z-index: 1; padding: 12px 16px 0; background: var(--back); border-bottom: 1px solid var(--line); }
h1 { margin: 0 0 6px; font-size: 16px; font-weight: 600; }
#legend span { margin-right: 18px; white-space: nowrap; }
#legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px; vertical-align: -1px; }
#links { color: var(--faint); }
#legend em { color: var(--faint); font-style: normal; float: right; }
.row, .lane { display: flex; }
.label { flex: 0 0 76px; padding: 0 8px 0 0; text-align: right; color: var(--faint); font-variant-numeric: tabular-nums; }
.lane { margin: 3px 16px; align-items: center; }
.lane canvas { flex: 1 1 0; min-width: 0; height: 30px; border-radius: 3px; background: var(--lane); cursor: crosshair; }
.row { margin: 6px 0 0; }
.row canvas { flex: 1 1 0; min-width: 0; height: 34px; }
#lanes { padding: 6px 0 24px; }
#tip { position: fixed; z-index: 2; display: none; max-width: 460px; padding: 7px 10px; border-radius: 5px; pointer-events: none;
  background: var(--text); color: var(--back); box-shadow: 0 2px 10px rgba(0, 0, 0, .3); }
#tip b { display: block; }
</style>
</head>
<body>
<header>
  <h1>__TITLE__</h1>
  <div id="legend"><span><i style="background:var(--k0)"></i>computing</span><span><i style="background:var(--k1)"></i>copying
    messages</span><span><i style="background:var(--k2)"></i>receiving inside the node</span><span><i
    style="background:var(--k3)"></i>receiving from other nodes</span><em>wheel: zoom, drag: move, double click: all</em></div>
  <div id="links"></div>
  <div class="row"><div class="label"></div><canvas id="axis"></canvas></div>
</header>
<div id="lanes"></div>
<div id="tip"></div>
<script>
"use strict";
const data = __DATA__;
const [RANK, KIND, PHASE, STEP, BEGIN, LENGTH, BYTES, PEER] = [0, 1, 2, 3, 4, 5, 6, 7];
const whole = [0, Math.max(1e-3, ...data.phases.map(p => p.end))];
let view = [...whole];
const colours = [0, 1, 2, 3].map(k => `--k${k}`);
const lanes = [];
for (let rank = 0; rank < data.ranks; ++rank) {
  const lane = document.createElement("div");
  lane.className = "lane";
  lane.dataset.rank = rank;
  lane.innerHTML = `<div class="label">rank ${rank}</div><canvas></canvas>`;
  document.getElementById("lanes").append(lane);
  lanes.push({canvas: lane.querySelector("canvas"), spans: [[], []]});
}
const isMessage = span => span[KIND] >= 2;
for (const span of data.spans) lanes[span[RANK]].spans[isMessage(span) ? 1 : 0].push(span);
for (const lane of lanes) for (const part of lane.spans) part.sort((a, b) => a[BEGIN] - b[BEGIN]);

function time(us) {
  const [unit, name] = Math.abs(us) >= 1e6 ? [1e6, "s"] : Math.abs(us) >= 1e3 ? [1e3, "ms"] : [1, "µs"];
  return `${+(us / unit).toPrecision(5)} ${name}`;
}
function size(bytes) {
  const names = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (bytes >= 1000 && i < 4) { bytes /= 1000; ++i; }
  return `${+bytes.toPrecision(4)} ${names[i]}`;
}
for (const phase of data.phases) {
  const axes = phase.axes.map(([name, bytes, share]) => `${name} ${size(bytes)}, busiest link ${(share * 100).toFixed(1)} %`);
  const line = document.createElement("div");
  line.textContent = `${phase.name}, received by a rank: ${axes.join(" · ") || "nothing"}`;
  document.getElementById("links").append(line);
}
function prepared(canvas) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const draw = canvas.getContext("2d");
  draw.scale(scale, scale);
  return [draw, width, height];
}
const across = (us, width) => (us - view[0]) / (view[1] - view[0]) * width;

function drawAxis(style) {
  const [draw, width, height] = prepared(document.getElementById("axis"));
  const rough = (view[1] - view[0]) / Math.max(1, width / 110), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough);
  draw.font = "11px system-ui, sans-serif";
  draw.fillStyle = draw.strokeStyle = style.getPropertyValue("--faint");
  for (let at = Math.ceil(view[0] / step) * step; at <= view[1]; at += step) {
    const x = across(at, width);
    draw.fillRect(x, height - 5, 1, 5);
    draw.fillText(time(Math.abs(at) < step / 2 ? 0 : at), x + 3, height - 7);
  }
  draw.font = "600 11px system-ui, sans-serif";
  for (const phase of data.phases) {
    const x = Math.max(0, across(phase.begin, width)), end = Math.min(width, across(phase.end, width));
    if (end - x > 30) draw.fillText(`${phase.name} (${time(phase.end - phase.begin)})`, x + 3, 11, end - x);
  }
}
function drawLane(lane, style) {
  const [draw, width, height] = prepared(lane.canvas);
  let drawn = 0;
  lane.spans.forEach((spans, part) => {
    const top = part === 0 ? 2 : height - 10, tall = part === 0 ? height - 14 : 8;
    for (const span of spans) {
      const x = across(span[BEGIN], width), end = across(span[BEGIN] + span[LENGTH], width);
      if (end < 0 || x > width) continue;
      const gap = end - x > 4 ? 1 : 0;
      draw.fillStyle = style.getPropertyValue(colours[span[KIND]]);
      draw.fillRect(x, top, Math.max(0.5, end - x - gap), tall);
      ++drawn;
    }
  });
  draw.fillStyle = style.getPropertyValue("--text");
  for (const phase of data.phases.slice(1)) draw.fillRect(across(phase.begin, width) - 0.5, 0, 1, height);
  return drawn;
}
function drawAll() {
  const style = getComputedStyle(document.documentElement);
  drawAxis(style);
  let drawn = 0;
  for (const lane of lanes) drawn += drawLane(lane, style);
  document.body.dataset.drawn = drawn;
}
let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; drawAll(); });
}
function show(begin, length) {
  length = Math.min(whole[1], Math.max(1e-3, length));
  begin = Math.min(whole[1] - length, Math.max(0, begin));
  view = [begin, begin + length];
  redraw();
}
function found(lane, event) {
  const box = lane.canvas.getBoundingClientRect(), y = event.clientY - box.top;
  const spans = lane.spans[y < box.height - 11 ? 0 : 1], pixel = (view[1] - view[0]) / box.width;
  const at = view[0] + (event.clientX - box.left) * pixel;
  return spans.find(s => s[BEGIN] - pixel <= at && at <= s[BEGIN] + s[LENGTH] + pixel);
}
const tip = document.getElementById("tip");
function hover(lane, event) {
  const span = found(lane, event);
  tip.style.display = span ? "block" : "none";
  if (!span) return;
  const phase = data.phases[span[PHASE]], verb = phase.verbs[span[STEP]];
  const lines = [`rank ${span[RANK]}, ${phase.name}, step ${span[STEP]}: ${phase.steps[span[STEP]]}`];
  if (isMessage(span)) lines.push(`${size(span[BYTES])} from rank ${span[PEER]}, ${size(span[BYTES] / span[LENGTH] * 1e6)}/s`);
  lines.push(`starts at ${time(span[BEGIN])}, takes ${time(span[LENGTH])}`);
  tip.replaceChildren(document.createElement("b"), lines.join("\n"));
  tip.style.whiteSpace = "pre-line";
  tip.firstChild.textContent = span[KIND] === 1 ? `copy of ${verb}` : verb;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + "px";
}
let grip = null;
for (const lane of lanes) {
  const canvas = lane.canvas, scale = () => (view[1] - view[0]) / canvas.clientWidth;
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const at = view[0] + event.offsetX * scale(), factor = Math.exp(event.deltaY * 0.002);
    show(at - (at - view[0]) * factor, (view[1] - view[0]) * factor);
  }, {passive: false});
  canvas.addEventListener("mousedown", event => { grip = {x: event.clientX, begin: view[0], scale: scale()}; });
  canvas.addEventListener("mousemove", event => hover(lane, event));
  canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  canvas.addEventListener("dblclick", () => show(0, whole[1]));
}
addEventListener("mousemove", event => { if (grip) show(grip.begin - (event.clientX - grip.x) * grip.scale, view[1] - view[0]); });
addEventListener("mouseup", () => { grip = null; });
addEventListener("resize", redraw);
drawAll();
</script>
</body>
</html>
)page";

}  // namespace dattn
