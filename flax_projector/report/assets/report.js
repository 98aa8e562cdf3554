"use strict";

const page = JSON.parse(document.getElementById("page-data").textContent);
const byId = (id) => document.getElementById(id);
const several = page.runs.length > 1;
page.sets = [...new Set(page.charts.flatMap((chart) => chart.lines.filter((line) => line.isHeldOut).map((line) => line.name)))];
for (const row of page.utterances) {
  if (!page.sets.includes(row.set)) page.sets.push(row.set);
  // What was heard right is in the page once.
  for (const part of row.results.flatMap((result) => result?.parts ?? [])) part[2] ??= part[1];
}

/** An element with attributes and children; texts are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// --- curves ------------------------------------------------------------------------------------

const isTouched = matchMedia("(pointer: coarse)").matches;
/** How lines are drawn if their colours tell runs apart: by Plotly, and by CSS in legends. */
const DASHES = [["solid", "solid"], ["dash", "dashed"], ["dot", "dotted"]];
const TRAINING = ["training", "CTC warm start"];

function dash(name, number) {
  if (TRAINING.includes(name)) return DASHES[0];
  return page.sets.includes(name) ? DASHES[1 + (page.sets.indexOf(name) % 2)] : DASHES[number % 3];
}

/** A curve has the same colour in every chart: that of its set, or of its place among the others. */
function colorName(name, number) {
  if (name === "training") return "--ink";
  if (name === "CTC warm start") return "--c6";
  const set = page.sets.indexOf(name);
  return `--c${(set < 0 ? number : set) % 6}`;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function baseLayout(xTitle, yTitle) {
  const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true };
  return {
    margin: { l: 58, r: 14, t: 10, b: 42 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--quiet") },
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } },
    showlegend: false,
    dragmode: isTouched ? false : "zoom", // fingers scroll the page
    xaxis: { ...axis, title: { text: xTitle, standoff: 8 }, nticks: 7 },
    yaxis: { ...axis, title: { text: yTitle, standoff: 6 }, nticks: 7 },
  };
}

const CONFIG = { displayModeBar: false, responsive: true, doubleClick: "reset" };

/** Ticks at 1, 2 and 5, or at powers of ten if these would be too many. */
function logTicks(low, high) {
  const values = [];
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const digits = last - first > 3 ? [1] : last - first > 1 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let power = first; power <= last; power++) {
    for (const digit of digits) values.push(Number(`${digit}e${power}`));
  }
  const text = (v) => (v >= 1e5 || v < 1e-3 ? v.toExponential().replace("e+", "e") : v.toLocaleString("en"));
  return { tickvals: values, ticktext: values.map(text) };
}

/** Where the longest run ends: all charts have the same steps, or hours, below one another. */
const LAST = {};
for (const x of ["steps", "hours"]) {
  LAST[x] = Math.max(0, ...page.charts.flatMap((chart) => chart.lines.map((line) => line[x].at(-1))));
}

class Chart {
  constructor(chart) {
    this.chart = chart;
    this.names = [...new Set(chart.lines.map((line) => line.name))];
    this.hidden = new Set();
    this.plot = make("div", { class: "plot", role: "img", "aria-label": this.summary() });
    this.figure = make(
      "figure", {},
      make("figcaption", {}, make("h3", {}, chart.title), make("p", { class: "small" }, chart.note), this.legend()),
      this.plot,
    );
  }

  summary() {
    const ends = this.chart.lines.map((line) => {
      const run = several ? `${page.runs[line.run]}, ` : "";
      return `${run}${line.name}: ${line.values.at(-1)}`;
    });
    return `${this.chart.title} in ${this.chart.unit}. Last values: ${ends.join("; ")}`;
  }

  legend() {
    if (this.names.length < 2) return null;
    const list = make("ul", { class: "legend", "aria-label": `Curves of ${this.chart.title}` });
    this.names.forEach((name, number) => {
      const sample = make("i", { "aria-hidden": "true" });
      if (several) sample.style.borderTopStyle = dash(name, number)[1];
      else sample.style.color = `var(${colorName(name, number)})`;
      const button = make("button", { type: "button", "aria-pressed": "true" }, sample, name);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(name)) this.hidden.add(name);
        button.setAttribute("aria-pressed", String(!this.hidden.has(name)));
        this.draw(this.drawn);
      });
      list.append(make("li", {}, button));
    });
    return list;
  }

  draw(how) {
    this.drawn = how;
    const { chart } = this;
    const isLog = chart.isLog && how.y === "log";
    const lines = chart.lines.filter((line) => how.runs.has(line.run) && !this.hidden.has(line.name));
    const positive = lines.flatMap((line) => line.values).filter((value) => value > 0);
    const low = positive.reduce((a, b) => Math.min(a, b), Infinity);
    const high = positive.reduce((a, b) => Math.max(a, b), 0);
    const layout = baseLayout(how.x === "steps" ? "step" : "hours of audio", chart.unit);
    const isUnified = !isTouched && lines.length <= 3; // more of them would hide the chart
    layout.hovermode = isUnified ? "x unified" : "closest";
    layout.xaxis.unifiedhovertitle = { text: how.x === "steps" ? "step %{x:,d}" : "%{x:.2f} hours" };
    layout.xaxis.tickformat = how.x === "steps" ? ",d" : "";
    layout.xaxis.range = [0, 1.02 * LAST[how.x] || 1];
    if (isLog && positive.length) {
      const around = Math.max(0.05 * Math.log10(high / low), (1 - Math.log10(high / low)) / 2);
      layout.yaxis.range = [Math.log10(low) - around, Math.log10(high) + around];
      Object.assign(layout.yaxis, { type: "log" }, logTicks(low, high));
    } else {
      layout.yaxis.rangemode = "tozero";
      layout.yaxis.exponentformat = "e";
    }
    Plotly.react(this.plot, lines.map((line) => this.trace(line, how, isUnified, isLog ? low / 2 : null)), layout, CONFIG);
  }

  trace(line, how, isUnified, floor) {
    const number = this.names.indexOf(line.name);
    const hasMarkers = line.isHeldOut ? line.values.length <= 100 : line.values.length < 3;
    const where = isUnified ? "" : how.x === "steps" ? "step %{x:,d}: " : "%{x:.2f} hours: ";
    const label = [several ? page.runs[line.run] : "", several && this.names.length < 2 ? "" : line.name];
    return {
      x: line[how.x],
      y: floor === null ? line.values : line.values.map((value) => (value > 0 ? value : floor)),
      customdata: line.values,
      name: label.filter(Boolean).join(", ").replace(/</g, "&lt;"),
      hovertemplate: `${where}%{customdata:.4~g}`,
      mode: hasMarkers ? "lines+markers" : "lines",
      marker: { size: 6 },
      line: {
        width: line.isHeldOut ? 2 : 1.5,
        color: css(several ? `--c${line.run % 8}` : colorName(line.name, number)),
        dash: several && this.names.length > 1 ? dash(line.name, number)[0] : "solid",
      },
    };
  }
}

function drawCurves() {
  const place = byId("charts");
  if (!place) return;
  const form = byId("axes");
  const charts = page.charts.map((chart) => new Chart(chart));
  place.append(...charts.map((chart) => chart.figure));
  const draw = () => {
    const boxes = [...form.querySelectorAll("[name=run]")];
    const runs = boxes.length ? boxes.filter((box) => box.checked).map((box) => Number(box.value)) : [0];
    for (const chart of charts) chart.draw({ x: form.elements.x.value, y: form.elements.y.value, runs: new Set(runs) });
  };
  form.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
}

function drawLengths() {
  const place = byId("lengths");
  if (!place) return;
  const plots = page.lengths.map((found) => {
    const run = several ? `${page.runs[found.run]}, ` : "";
    const title = `${run}${found.set}`;
    const note = `${found.num_utterances.toLocaleString("en")} utterances, ${found.hours.toFixed(2)} hours`;
    const plot = make("div", { class: "plot", role: "img", "aria-label": `How long the utterances of ${title} are` });
    place.append(make("figure", {}, make("figcaption", {}, make("h3", {}, title), make("p", { class: "small" }, note)), plot));
    return () => {
      const layout = baseLayout("length in seconds", "utterances");
      const width = found.edges[1] - found.edges[0];
      layout.bargap = 0.08;
      const bars = {
        type: "bar", x: found.counts.map((_, i) => found.edges[i] + width / 2), y: found.counts, width: width * 0.92,
        customdata: found.counts.map((_, i) => `${found.edges[i].toFixed(2)} to ${found.edges[i + 1].toFixed(2)} s`),
        hovertemplate: "%{customdata}: %{y:,d}<extra></extra>", marker: { color: css(several ? `--c${found.run % 8}` : "--c0") },
      };
      Plotly.react(plot, [bars], layout, CONFIG);
    };
  });
  const draw = () => plots.forEach((plot) => plot());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

// --- utterances --------------------------------------------------------------------------------

const [SHOWN_FIRST, SHOWN_MORE] = [25, 50];
const collator = new Intl.Collator("en", { numeric: true });
const sum = (row, key) => row.results.reduce((total, result) => total + (result?.[key] ?? 0), 0);
const isCounted = (row) => row.results.some((result) => result && result.errors !== null);
const errorsOf = (row, run) => row.results[run]?.errors ?? null;
const rateOf = (row) => (isCounted(row) ? sum(row, "errors") / sum(row, "length") : null);

const COLUMNS = [
  ...page.runs.map((name, run) => ({
    title: several ? `Errors of ${name}` : "Errors", isNumber: true,
    value: (row) => errorsOf(row, run), text: (value) => value,
  })),
  ...(several ? [] : [{ title: "Error rate", isNumber: true, value: rateOf, text: (value) => `${(100 * value).toFixed(0)}%` }]),
  { title: "Seconds", isNumber: true, value: (row) => row.secs, text: (value) => value.toFixed(2) },
  { title: "Utterance", value: (row) => `${row.set} ${row.id}` },
  { title: "Said and heard", value: (row) => row.said },
];

/** Texts with a space between them, unless they are characters. */
function joined(nodes, row) {
  const space = row.unit === "words" ? " " : "";
  return nodes.flatMap((node, i) => (i && space ? [space, node] : [node]));
}

/** What was said, with what was not heard marked. */
function said(row, parts) {
  const nodes = parts.filter((part) => part[1]).map(([sign, text, heard]) => {
    if (sign === "~") return make("mark", { title: `heard: ${heard}` }, text);
    return sign === "-" ? make("del", { title: "not heard" }, text) : text;
  });
  return joined(nodes, row);
}

/** What was heard, with what was not said marked; and with what was missed, where that is asked for. */
function heard(row, parts, withMissed) {
  const nodes = parts.filter((part) => part[2] || withMissed).map(([sign, text, found]) => {
    if (sign === "~") return make("mark", { title: `said: ${text}` }, found);
    if (sign === "+") return make("ins", { title: "not said" }, found);
    return sign === "-" ? make("del", { title: "not heard" }, text) : found;
  });
  return joined(nodes, row);
}

const plain = (row, parts, side) =>
  parts.map((part) => part[side]).filter(Boolean).join(row.unit === "words" ? " " : "");

/** What was said and what was heard; of several runs, what each of them heard. */
function texts(row) {
  const list = make("dl", { class: "text" });
  const written = make("dl", { class: "text" });
  const add = (to, label, ...content) => to.append(make("dt", {}, label), make("dd", {}, ...content));
  const [first] = row.results.filter(Boolean);
  const reference = plain(row, first.parts, 1);
  add(list, "said", ...(several ? [reference] : said(row, first.parts)));
  if (reference !== row.said) add(written, "said", row.said);
  row.results.forEach((result, run) => {
    if (!result) return;
    const label = () => (several ? make("span", { class: `run-${run % 8}` }, page.runs[run]) : "heard");
    const note = result.notes.length ? make("span", { class: "note" }, ` [${result.notes.join("; ")}]`) : "";
    add(list, label(), ...heard(row, result.parts, several), note);
    if (plain(row, result.parts, 2) !== result.heard) add(written, label(), result.heard);
  });
  if (!written.children.length) return [list];
  return [list, make("details", {}, make("summary", {}, "as written"), written)];
}

/** A name that may be broken after its signs. */
function breakable(name) {
  const parts = name.match(/[^_/.-]+[_/.-]*|[_/.-]+/g) ?? [];
  return parts.flatMap((part) => [part, document.createElement("wbr")]);
}

function rowElement(row) {
  const tr = make("tr", { role: "row" });
  for (const column of COLUMNS.filter((column) => column.isNumber)) {
    const value = column.value(row);
    const text = value === null ? "–" : column.text(value);
    tr.append(make("td", { role: "cell", class: "number", "data-label": column.title }, text));
  }
  const sound = row.sound
    ? make("audio", { controls: "", preload: "none", "aria-label": `Clip of ${row.id}`, src: `data:audio/mpeg;base64,${row.sound}` })
    : row.silent ? `no player: ${row.silent}` : "–";
  tr.append(
    make("th", { role: "rowheader", scope: "row", class: "name" }, ...breakable(row.id), page.sets.length > 1 ? make("small", {}, ...breakable(row.set)) : null),
    make("td", { role: "cell", class: "what" }, ...texts(row)),
    make("td", { role: "cell", class: "sound" }, sound),
  );
  return tr;
}

function showUtterances() {
  const table = byId("table");
  if (!table) return;
  const [form, more, shown] = [byId("filters"), byId("more"), byId("shown")];
  let order = null; // {column, sign}; none: the worst first
  let limit = SHOWN_FIRST;
  let found = [];
  if (page.sets.length > 1) {
    byId("choose-set").hidden = false;
    form.elements.set.append(...page.sets.map((set) => make("option", { value: set }, set)));
  }
  for (const row of page.utterances) {
    const heard = row.results.map((result) => result?.heard ?? "");
    row.searched = [row.id, row.set, row.said, ...heard].join("\n").toLowerCase();
  }

  const worst = (a, b) =>
    isCounted(b) - isCounted(a) || sum(b, "errors") - sum(a, "errors") ||
    sum(a, "length") - sum(b, "length") || collator.compare(a.id, b.id);

  function compare(a, b) {
    const [x, y] = [order.column.value(a), order.column.value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // last, in both directions
    return order.sign * (order.column.isNumber ? x - y : collator.compare(x, y)) || worst(a, b);
  }

  const headers = COLUMNS.map((column) => {
    const button = make("button", { type: "button" }, column.title);
    const th = make("th", { role: "columnheader", scope: "col", class: column.isNumber ? "number" : null, "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      const isAgain = order?.column === column;
      order = { column, sign: isAgain ? -order.sign : column.isNumber ? -1 : 1 };
      headers.forEach((header) => header.setAttribute("aria-sort", "none"));
      th.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      update();
    });
    return th;
  });
  table.tHead.rows[0].append(...headers, make("th", { role: "columnheader", scope: "col", class: "sound" }, "Clip"));
  if (!several) headers[0].setAttribute("aria-sort", "descending");

  function update() {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { set, wrong } = form.elements;
    found = page.utterances.filter(
      (row) =>
        (!set.value || row.set === set.value) && (!wrong.checked || sum(row, "errors") > 0) &&
        words.every((word) => row.searched.includes(word)),
    );
    found.sort(order ? compare : worst);
    limit = SHOWN_FIRST;
    table.tBodies[0].replaceChildren();
    show();
  }

  function show() {
    const body = table.tBodies[0];
    body.append(...found.slice(body.rows.length, limit).map(rowElement));
    const left = found.length - body.rows.length;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(left, SHOWN_MORE)} more`;
    const of = `${found.length.toLocaleString("en")} of ${page.utterances.length.toLocaleString("en")} utterances`;
    shown.textContent = left > 0 ? `${of}, the first ${body.rows.length} shown` : of;
  }

  more.addEventListener("click", () => {
    limit += SHOWN_MORE;
    show();
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  // One clip at a time.
  table.addEventListener("play", (event) => {
    for (const other of table.querySelectorAll("audio")) if (other !== event.target) other.pause();
  }, true);
  update();
}

function filterOptions() {
  const form = byId("options-filter");
  if (!form) return;
  const update = () => byId("options-table").classList.toggle("only-differing", form.elements[0].checked);
  form.addEventListener("change", update);
  update();
}

drawCurves();
drawLengths();
showUtterances();
filterOptions();
