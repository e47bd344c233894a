// Shared by all views: elements, fields, numbers from the page or the kernel, and starting a view.
// No library, no request. Names come from files: they reach the page as text and attribute values, never as HTML.
const SVG = "http://www.w3.org/2000/svg";
let fields = 0;

function fill(node, attributes, children) { // a function among the attributes listens to the event of its name
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const html = (tag, attrs = {}, ...children) => fill(document.createElement(tag), attrs, children);
const svg = (tag, attrs = {}, ...children) => fill(document.createElementNS(SVG, tag), attrs, children);
const text = (x, y, words, attrs = {}) => svg("text", { x, y, ...attrs }, words);
const path = (d, attrs) => svg("path", { d, ...attrs });
const line = (points) => `M${points.map((point) => point.join(" ")).join("L")}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const row = (...children) => html("div", { class: "controls" }, ...children);

function field(name, control, ...rest) { // a control and its label
  control.id = `ipmn-field-${crypto.getRandomValues(new Uint32Array(1))[0]}-${++fields}`;
  return html("div", { class: "field" }, html("label", { for: control.id }, name), control, ...rest);
}

const select = (change) => html("select", { change: (event) => change(event.target.value) });

function options(list, entries, chosen) { // entries: [value, text]
  list.replaceChildren(...entries.map(([value, words]) => html("option", { value }, words)));
  list.value = chosen;
}

function tick(name, change) {
  const box = html("input", { type: "checkbox", change: () => change(box.checked) });
  box.checked = true;
  return { box, field: field(name, box) };
}

function slider(name, input) {
  const range = html("input", { type: "range", input: () => input(Number(range.value)) });
  const output = html("output");
  const show = (value, words) => {
    range.value = value;
    range.setAttribute("aria-valuetext", words);
    output.textContent = words;
  };
  const fit = (min, max, step = 1) => Object.assign(range, { min, max, step });
  return { show, fit, field: field(name, range, output) };
}

function table(caption, head, rows, attrs = {}) { // rows of cells
  const titles = head.map((title) => html("th", { scope: "col" }, title));
  return html("table", attrs, html("caption", {}, caption), html("thead", {}, html("tr", {}, ...titles)),
    html("tbody", {}, ...rows.map((cells) => html("tr", {}, ...cells))));
}

// ---- Numbers: [name, type, base64 of deflated bytes], or [name, type] and a buffer that the kernel sent

const TYPES = { uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, float32: Float32Array };
const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

async function inflated(base64) {
  const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function numbers(arrays, buffers = []) {
  const whole = ({ buffer, byteOffset, byteLength }) => buffer.slice(byteOffset, byteOffset + byteLength);
  const read = async ([name, type, packed], i) =>
    [name, new TYPES[type](buffers[i] ? whole(buffers[i]) : await inflated(packed))];
  return Object.fromEntries(await Promise.all(arrays.map(read)));
}

// ---- Start: on a page, from a picture and its data; in JupyterLab, with a kernel that sends further data

const VIEWS = {}; // name: (element, state, ask), which shows the view in the element

function asking(model) { // a question to the kernel, which answers { number, about } and buffers
  const waiting = new Map();
  let number = 0;
  model.on("msg:custom", (answer, buffers) => {
    waiting.get(answer.number)?.(answer.about, buffers);
    waiting.delete(answer.number);
  });
  return (question) => new Promise((done) => {
    waiting.set(++number, (about, buffers) => done([about, buffers]));
    model.send({ number, question });
  });
}

function render({ model, el }) {
  const keydown = (event) => event.stopPropagation(); // otherwise arrow keys move between JupyterLab's cells
  const view = html("div", { class: "ipmn-view", "data-view": model.get("view"), keydown,
    "data-lm-suppress-shortcuts": "true" });
  el.append(view);
  VIEWS[model.get("view")](view, model.get("state"), asking(model));
}

async function enliven(view) { // replaces the picture by the live view; keeps the picture if that fails
  const live = html("div");
  try {
    await VIEWS[view.dataset.view](live, JSON.parse(view.querySelector("script").textContent));
    view.querySelector("img").replaceWith(live);
  } catch (error) {
    console.error(error);
  }
}
