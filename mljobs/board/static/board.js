// All of the board's own script. Everything works without it; it adds what moves, the viewer's time zone, keys, copying, a
// theme without a reload, the zoom of a chart. No inline script, no eval: it runs under the strictest policy.
import htmx from "./htmx.js";

const $ = (s, r = document) => r.querySelector(s), $$ = (s, r = document) => [...r.querySelectorAll(s)];
const body = document.body, root = document.documentElement;
const base = body.dataset.root;

// ------------------------------------------------------------------------------------------------ times and zone
const two = n => String(n).padStart(2, "0"), months = [...Array(12).keys()].map(m => new Date(2000, m, 1).toLocaleString("en", {month: "short"}));
const zoneOf = d => new Intl.DateTimeFormat("en-GB", {timeZoneName: "short"}).formatToParts(d).find(p => p.type === "timeZoneName").value;
const shapes = {
  hm: d => `${two(d.getHours())}:${two(d.getMinutes())}`,
  hms: d => `${shapes.hm(d)}:${two(d.getSeconds())}`,
  ms: d => `.${String(d.getMilliseconds()).padStart(3, "0")}`,
  md: d => `${months[d.getMonth()]} ${two(d.getDate())}`,
  day: d => `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`,
  mdhm: d => `${shapes.day(d).slice(5)} ${shapes.hm(d)}`,
  mdhms: d => `${shapes.day(d).slice(5)} ${shapes.hms(d)}`,
  mdhmsf: d => shapes.mdhms(d) + shapes.ms(d),
  full: d => `${shapes.day(d)} ${shapes.hms(d)}`,
  fullf: d => shapes.full(d) + shapes.ms(d),
};
function localise(within = document) {
  const now = zoneOf(new Date());
  for (const t of $$("[data-f]", within)) {
    const moment = new Date(t.getAttribute("datetime") || t.dataset.t), zone = zoneOf(moment), time = t.tagName === "TIME";
    // The head of a column says the zone of now: in summer a time of winter says its own.
    const own = time && zone !== now && t.dataset.f.includes("hm");
    const text = shapes[t.dataset.f](moment) + (own || t.hasAttribute("data-z") ? ` ${zone}` : "");
    if (time) t.dataset.zn = own ? "" : zone;
    if (t.firstChild && t.firstChild.nodeType === 3) { if (t.firstChild.data !== text) t.firstChild.data = text; } else t.prepend(text);
    if (time && !t.title.includes("·") && zone !== "UTC") t.title = `${shapes.fullf(moment)} ${zone} · ${t.title}`;
  }
  for (const z of $$("[data-zone]", within)) z.textContent = now;
}

// ------------------------------------------------------------------------------------------------ what moves
const live = $("#live"), url = body.dataset.stream;
let source = null, last = body.dataset.last || "", held = false, byHand = false, beat = 0, waiting = {}, poller = 0, eaten = 0;

function say(word, mark) {
  if (!live) return;
  $("[data-word]", live).textContent = word;
  live.dataset.state = word;
  const use = $("use", live);
  if (use) { use.setAttribute("href", `#${mark}`); use.parentNode.setAttribute("class", `m ${mark}`); }
}
// Nothing moves under a hand: a row that has the focus, a text that is selected, a menu or dialog that is open.
function busy(element) {
  const s = getSelection();
  return element.contains(document.activeElement) && document.activeElement !== body
    || (s && !s.isCollapsed && element.contains(s.anchorNode)) || element.querySelector("details[open] :focus") !== null;
}
function clock(at) {
  const t = $("#live time");
  if (t) { t.setAttribute("datetime", at); t.title = at; localise(live); }
}
async function show(id, html) {
  const element = document.getElementById(id);
  if (!element) return;
  if (busy(element)) { waiting[id] = html; return; }
  delete waiting[id];
  const t = document.createElement("template");
  t.innerHTML = html.trim();
  localise(t.content);
  await htmx.swap({text: t.innerHTML, target: element, swap: "outerMorph", sourceElement: body});
  const fresh = document.getElementById(id);
  if (fresh) { localise(fresh); unhide(fresh); }
  if (id === "state" && fresh && $(".seal.completed,.seal.failed,.seal.cancelled", fresh)) ended();
}
function ended() {          // a job has finished while it was looked at: what it left behind is on the page of now
  if (/view=job&/.test(url)) {
    stop(); setTimeout(() => { if (!held && !byHand && document.activeElement === body) location.reload(); else say("Ended: reload", "queued"); }, 600);
  }
}
function patch(message) {
  const html = message.html;
  clock(message.at);
  if ("~away" in html) away(html["~away"]);
  if ("~ids" in html) newer(html["~ids"]);
  if (held || byHand) { Object.assign(waiting, html); return; }
  for (const [id, text] of Object.entries(html)) if (!id.startsWith("~")) show(id, text);
}
function away(why) {
  const b = $("#banner"), was = $(".away", b);
  document.querySelectorAll(".cols,.figs").forEach(e => e.classList.toggle("stale", Boolean(why)));
  if (!why) { was?.remove(); return; }
  const div = was || Object.assign(document.createElement("div"), {className: "banner away"});
  div.replaceChildren(Object.assign(document.createElement("b"), {textContent: "The database does not answer. "}), Object.assign(document.createElement("code"), {textContent: why}));
  b.append(div);
}
function newer(ids) {
  const place = $("#newer"), first = new URL(url, location.href).searchParams.get("since");
  if (!place) return;
  const all = ids ? ids.split(",") : [], at = all.indexOf(first), n = at < 0 ? all.length : at;
  place.textContent = "";
  if (!n) return;
  place.append(Object.assign(document.createElement("a"), {className: "link", href: location.href, textContent: `${n}${at < 0 && n >= 100 ? "+" : ""} newer: show`}));
}
function start() {
  if (!url || source || document.hidden || byHand) return;
  if (eaten > 1) { poll(); return; }
  const to = new URL(url, location.href);
  if (last) to.searchParams.set("last", last);
  source = new EventSource(to);
  beat = setTimeout(() => { eaten++; stop(); start(); }, 8000);    // something on the way holds the stream back
  source.addEventListener("hello", () => { clearTimeout(beat); eaten = 0; say(held ? "Paused" : "Live", held ? "queued" : "running"); });
  const got = e => { last = e.lastEventId || last; patch(JSON.parse(e.data)); };
  source.addEventListener("patch", got);
  source.addEventListener("beat", got);
  source.addEventListener("error", () => {
    say("Reconnecting", "queued");
    if (source && source.readyState === EventSource.CLOSED) { stop(); eaten++; setTimeout(start, 3000); }
  });
}
function stop() {
  clearTimeout(beat); clearTimeout(poller);
  source?.close(); source = null; poller = 0;
}
async function poll() {
  if (poller || document.hidden || byHand) return;
  poller = setTimeout(async () => {
    poller = 0;
    try {
      const to = new URL(`${base}/poll${new URL(url, location.href).search}`, location.href);
      if (last) to.searchParams.set("last", last);
      const answer = await fetch(to);
      if (answer.ok) { const m = await answer.json(); last = m.id; say("Live", "running"); patch(m); } else say("Reconnecting", "queued");
    } catch { say("Reconnecting", "queued"); }
    poll();
  }, 5000);
}
function settle() {         // the hand is gone: what has waited is shown
  if (held || byHand) return;
  for (const [id, text] of Object.entries(waiting)) if (!id.startsWith("~")) show(id, text);
}
function pause(on) {
  byHand = on;
  if (on) { stop(); say("Paused", "queued"); } else { settle(); start(); say("Live", "running"); }
}
function count() {
  const n = $$(".pick:not(.all):checked").length;
  for (const b of $$("[data-n]")) b.textContent = n;
  if (n > 0 === held || !url) return;
  held = n > 0;
  say(held ? "Paused" : "Live", held ? "queued" : "running");
  settle();
}
document.addEventListener("visibilitychange", () => { if (document.hidden) stop(); else start(); });
addEventListener("pagehide", stop);
addEventListener("pageshow", e => { if (e.persisted) start(); });
document.addEventListener("focusout", () => setTimeout(settle, 0));
document.addEventListener("selectionchange", () => { if (getSelection()?.isCollapsed) setTimeout(settle, 0); });

// ------------------------------------------------------------------------------------------------ hands
function toggleTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  document.cookie = `mljobs-theme=${root.dataset.theme};path=${base || "/"};max-age=31536000;samesite=lax${location.protocol === "https:" ? ";secure" : ""}`;
}
const singles = () => localStorage.getItem("mljobs-keys") !== "off";
function help() {
  let d = $("#keys");
  if (!d) {
    const keys = [["j k", "next, previous row"], ["Enter", "open the row"], ["x", "select the row"], ["/", "to the filter"],
      ["g n", "Now"], ["g j", "Jobs"], ["g t", "Targets"], ["g c", "Compare"], ["g o", "Overview"],
      ["[ ]", "newer, older page"], [".", "pause or go on"], ["?", "these keys"], ["Esc", "leave"]];
    d = Object.assign(document.createElement("dialog"), {id: "keys"});
    d.setAttribute("aria-labelledby", "keys-title");
    const h = Object.assign(document.createElement("h2"), {id: "keys-title", textContent: "Keys"}), l = Object.assign(document.createElement("dl"), {className: "keys"});
    for (const [k, t] of keys) {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      for (const one of k.split(" ")) dt.append(Object.assign(document.createElement("kbd"), {textContent: one}), " ");
      dd.textContent = t; l.append(dt, dd);
    }
    const label = document.createElement("label"), box = Object.assign(document.createElement("input"), {type: "checkbox", checked: singles()});
    box.addEventListener("change", () => localStorage.setItem("mljobs-keys", box.checked ? "on" : "off"));
    label.append(box, "single keys are on");
    const close = Object.assign(document.createElement("button"), {textContent: "Close"});
    close.addEventListener("click", () => d.close());
    const foot = Object.assign(document.createElement("p"), {className: "acts"});
    foot.append(close, label);
    d.append(h, l, foot); body.append(d);
  }
  d.showModal();
}
function move(step) {
  const rows = $$("tbody tr[id]").filter(r => r.offsetParent), at = rows.findIndex(r => r.classList.contains("cur"));
  const next = rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + step))];
  if (!next) return;
  if (at >= 0) rows[at].classList.remove("cur");
  next.classList.add("cur"); next.scrollIntoView({block: "nearest"});
  $("th a, a", next)?.focus({preventScroll: true});
}
document.addEventListener("change", e => {
  if (e.target.matches(".all")) $$(".pick").forEach(p => p.checked = e.target.checked);
  count();
});
document.addEventListener("reset", () => setTimeout(count, 0));
document.addEventListener("submit", e => { if (e.target.action.endsWith("/theme")) { e.preventDefault(); toggleTheme(); } });
document.addEventListener("click", async e => {
  const c = e.target.closest("[data-copy]");
  if (c) {
    const text = c.dataset.copy || $(c.dataset.from)?.textContent.trim() || "";
    try { await navigator.clipboard.writeText(text); c.textContent = "Copied"; } catch { c.textContent = "No clipboard here"; }
  }
  if (e.target.closest("[data-keys]")) help();
  const z = e.target.closest("[data-zoom]");
  if (z) zoom(z);
});
document.addEventListener("keydown", e => {
  const third = e.getModifierState("AltGraph");   // [ and ] on many keyboards, which count as Ctrl and Alt on some
  if (!third && (e.ctrlKey || e.metaKey || e.altKey) || e.isComposing || !singles() || $("dialog[open]")) return;
  if (e.target.matches("input:not([type=checkbox]):not([type=radio]),textarea,select")) { if (e.key === "Escape") e.target.blur(); return; }
  if (await_g) {
    await_g = false; clearTimeout(timer);
    const to = $(`nav a[data-go="${CSS.escape(e.key)}"]`);
    if (to) location.href = to.href;
    return;
  }
  if (e.key === "g") { await_g = true; timer = setTimeout(() => await_g = false, 1200); }
  else if (e.key === "j" || e.key === "k") move(e.key === "j" ? 1 : -1);
  else if (e.key === "x") $("tr.cur .pick")?.click();
  else if (e.key === "/") { const f = $("input[name=q]:not([type=hidden])"); if (f) { e.preventDefault(); f.focus(); f.select(); } else location.href = `${base}/jobs`; }
  else if (e.key === "[") $("a[rel=prev]")?.click();
  else if (e.key === "]") $("a[rel=next]")?.click();
  else if (e.key === ".") { if (url) pause(!byHand); }
  else if (e.key === "?") help();
  else if (e.key === "Escape") document.activeElement?.blur();
});
let await_g = false, timer;

function unhide(within = document) { for (const e of $$("button[hidden],.all[hidden]", within)) e.hidden = false; }
// A row and its line or point, each lights the other.
function light(row, on) {
  for (const e of $$(`[data-row="${CSS.escape(row)}"]`)) { e.classList.toggle("lit", on); if (on && e.matches("g.run")) e.parentNode.append(e); }
  document.getElementById(`run-${row}`)?.classList.toggle("lit", on);
}
for (const [kind, on] of [["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]])
  document.addEventListener(kind, e => {
    const r = e.target.closest?.("tr[id^=run-]"), p = e.target.closest?.("[data-row]");
    if (r) light(r.id.slice(4), on); else if (p) light(p.dataset.row, on);
  });

// ------------------------------------------------------------------------------------------------ zoom
async function zoom(button) {
  button.disabled = true;
  const figure = $("[data-chart]"), answer = await fetch(button.dataset.zoom);
  if (!answer.ok) { button.textContent = "No data"; return; }
  const data = await answer.json();
  const css = Object.assign(document.createElement("link"), {rel: "stylesheet", href: button.dataset.uplotCss});
  const js = Object.assign(document.createElement("script"), {src: button.dataset.uplot});
  await Promise.all([css, js].map(e => new Promise((ok, no) => { e.onload = ok; e.onerror = no; document.head.append(e); })));
  const place = document.createElement("div"), names = Object.keys(data.metrics).slice(0, 6);
  const probe = document.createElement("i");
  body.append(probe);
  const real = n => { probe.style.color = `var(${n})`; return getComputedStyle(probe).color; };
  const strokes = ["--ink", "--run", "--ok", "--warn", "--bad", "--ink3"].map(real), grid = real("--line"), ink = real("--ink3");
  probe.remove();
  const chosen = new URL(location.href).searchParams.get("metric") || names[0];
  const axis = {stroke: ink, grid: {stroke: grid, width: 1}, ticks: {stroke: grid}, font: "11px system-ui"};
  place.className = "zoom";
  figure.replaceChildren(place);
  const one = new uPlot({
    width: figure.clientWidth, height: 320, cursor: {drag: {x: true, y: false}},
    scales: Object.fromEntries(names.map(n => [n, {}])),
    axes: [axis, {...axis, scale: chosen, size: 60}],
    series: [{label: "finished"}, ...names.map((n, i) => ({label: n, scale: n, stroke: strokes[i], width: 1.5, show: n === chosen, points: {show: true, size: 6}, dash: i ? [6, 2 + 2 * i] : undefined}))],
  }, [data.at.map(t => t / 1000), ...names.map(n => data.metrics[n])], place);
  new ResizeObserver(() => one.setSize({width: figure.clientWidth, height: 320})).observe(figure);
  place.append(Object.assign(document.createElement("p"), {className: "note", textContent: "Drag to zoom, double-click for all; click a name below the chart to show or hide it."}));
  button.textContent = "Zoomed";
}

// ------------------------------------------------------------------------------------------------ at the start
unhide();
localise();
count();
start();
