// Turns every .ipmn-view of a page live: the data beside its picture become a viewer of scans or an explorer
// of results (static_views.py writes them). No library, no request, no kernel. Names come from files: they
// reach the page as text and attribute values, never as HTML. Where this cannot run the picture stays.
"use strict";
(() => {
  // ---- Elements. A function among the attributes listens to the event of its name.

  const SVG = "http://www.w3.org/2000/svg";
  let fields = 0;

  function fill(node, attributes, children) {
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
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function field(name, control, ...rest) { // a control and its label
    control.id = `ipmn-field-${++fields}`;
    return html("div", { class: "field" }, html("label", { for: control.id }, name), control, ...rest);
  }

  function options(list, entries, chosen) { // entries: [value, text, name of its group]
    const groups = new Map();
    list.replaceChildren();
    for (const [value, words, group] of entries) {
      if (group && !groups.has(group)) groups.set(group, html("optgroup", { label: group }));
      (groups.get(group) ?? list).append(html("option", { value }, words));
    }
    list.append(...groups.values());
    list.value = chosen;
  }

  function slider(name, max, input) {
    const range = html("input", { type: "range", min: 0, max, input: () => input(Number(range.value)) });
    const output = html("output");
    const show = (value, words) => {
      range.value = value;
      range.setAttribute("aria-valuetext", words);
      output.textContent = words;
    };
    return { range, show, field: field(name, range, output) };
  }

  function table(caption, head, rows) { // rows of cells
    const titles = head.map((title) => html("th", { scope: "col" }, title));
    return html("table", {}, html("caption", {}, caption), html("thead", {}, html("tr", {}, ...titles)),
      html("tbody", {}, ...rows.map((cells) => html("tr", {}, ...cells))));
  }

  // ---- Volumes { shape, mm, voxels }; indices run to the patient's right, front, head, the first fastest.

  const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const bits = (packed, n) => Uint8Array.from({ length: n }, (_, i) => (packed[i >> 3] >> (i & 7)) & 1);

  async function unpacked(base64) {
    const stream = new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function load(item, size) { // unpacks a case once
    if (item.image) return;
    const mm = item.spacing.map((width, axis) => width * item.step[axis]);
    const image = { shape: item.shape, mm, voxels: await unpacked(item.voxels) };
    const cube = { shape: [size, size, size], mm: [1, 1, 1], voxels: await unpacked(item.cube) };
    const inside = item.mask && bits(await unpacked(item.mask), image.voxels.length);
    Object.assign(item, { image, cube, inside });
  }

  // A shown voxel's place among the slices of the whole image, counted from 0, and the other way round.
  const inWhole = (item, axis, k) => item.start[axis] + (k + 0.5) * item.step[axis] - 0.5;
  const fromWhole = (item, axis, place) =>
    clamp(Math.floor((place + 0.5 - item.start[axis]) / item.step[axis]), 0, item.shape[axis] - 1);

  function inCube(item, at) { // the cube spans the box of the ROI; beyond its edges its outer cells stand
    const [size] = item.cube.shape;
    const cells = at.map((k, axis) => {
      const [start, length] = item.box[axis];
      return Math.floor(((inWhole(item, axis, k) + 0.5 - start) / length) * size);
    });
    const outside = cells.some((cell) => cell < 0 || cell >= size);
    return { at: cells.map((cell) => clamp(cell, 0, size - 1)), outside };
  }

  function fromCube(item, axis, cell) {
    const [start, length] = item.box[axis];
    return fromWhole(item, axis, start + ((cell + 0.5) / item.cube.shape[axis]) * length - 0.5);
  }

  // ---- Planes as radiologists see them: against the indices, so right, front and head come first.

  const PLANES = [
    { name: "axial", across: 0, down: 1, normal: 2 },
    { name: "coronal", across: 0, down: 2, normal: 1 },
    { name: "sagittal", across: 1, down: 2, normal: 0 },
  ];
  const ENDS = ["RL", "AP", "HF"];
  const ORIGIN = ["left", "back", "foot end"]; // where an axis has its index 0
  const [OUTLINE, CROSS] = ["#E69F00", "#56B4E9"];
  const scratch = document.createElement("canvas");

  function section(volume, plane, at) { // a slice; index(column, row) of the voxel, counted from its top left
    const [columns, rows] = [volume.shape[plane.across], volume.shape[plane.down]];
    const stride = [1, volume.shape[0], volume.shape[0] * volume.shape[1]];
    const [across, down] = [stride[plane.across], stride[plane.down]];
    const last = at[plane.normal] * stride[plane.normal] + (columns - 1) * across + (rows - 1) * down;
    return { columns, rows, index: (column, row) => last - column * across - row * down };
  }

  function paint(canvas, volume, plane, at, { grey, inside, hair }) {
    const context = canvas.getContext("2d");
    const flat = section(volume, plane, at);
    voxels(context, flat, volume.voxels, grey);
    if (inside) outline(context, flat, inside);
    if (hair) crossHair(context, flat, at[plane.across], at[plane.down]);
    letters(context, ENDS[plane.across], ENDS[plane.down]);
  }

  function voxels(context, { columns, rows, index }, values, grey) {
    const picture = new ImageData(columns, rows);
    const pixels = new Uint32Array(picture.data.buffer);
    for (let row = 0, i = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, i++) pixels[i] = grey[values[index(column, row)]];
    }
    Object.assign(scratch, { width: columns, height: rows });
    scratch.getContext("2d").putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = false; // a voxel is a box: nothing is made up between two
    context.drawImage(scratch, 0, 0, context.canvas.width, context.canvas.height);
  }

  function outline(context, { columns, rows, index }, inside) { // the borders between voxels in and out
    const [wide, high] = [context.canvas.width / columns, context.canvas.height / rows];
    const holds = (column, row) =>
      column >= 0 && row >= 0 && column < columns && row < rows && inside[index(column, row)] === 1;
    Object.assign(context, { strokeStyle: OUTLINE, lineWidth: 3, lineJoin: "round" });
    context.beginPath();
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const here = holds(column, row);
        context.moveTo(column * wide, (row + 1) * high);
        if (here !== holds(column - 1, row)) context.lineTo(column * wide, row * high);
        else context.moveTo(column * wide, row * high);
        if (here !== holds(column, row - 1)) context.lineTo((column + 1) * wide, row * high);
      }
    }
    context.stroke();
  }

  function crossHair(context, { columns, rows }, across, down) { // through the middle of a voxel
    const { width, height } = context.canvas;
    Object.assign(context, { strokeStyle: CROSS, lineWidth: 2 });
    const [x, y] = [(1 - (across + 0.5) / columns) * width, (1 - (down + 0.5) / rows) * height];
    context.stroke(new Path2D(`M${x} 0V${height}M0 ${y}H${width}`));
  }

  function letters(context, [left, right], [top, bottom]) {
    const { width, height } = context.canvas;
    Object.assign(context, { font: "bold 26px sans-serif", textAlign: "center", textBaseline: "middle" });
    Object.assign(context, { fillStyle: "#fff", strokeStyle: "#000", lineWidth: 5, lineJoin: "round" });
    const beside = [[left, 18, height / 2], [right, width - 18, height / 2]];
    for (const place of [...beside, [top, width / 2, 20], [bottom, width / 2, height - 18]]) {
      context.strokeText(...place);
      context.fillText(...place);
    }
  }

  function greys(width, level) { // 256 opaque pixels: black half a width below the level, white above
    const tone = (i) => clamp(Math.round(((i - level) / Math.max(width, 1) + 0.5) * 255), 0, 255);
    return Uint32Array.from({ length: 256 }, (_, i) => 0xff000000 + tone(i) * 0x010101);
  }

  function pane(plane, kind, point) { // a canvas; tells `point` where, 0 to 1 along the indices
    const [[left], [top]] = [ENDS[plane.across], ENDS[plane.down]];
    const name = `${plane.name} plane of the ${kind}, ${left} on the left, ${top} on top; a click moves it`;
    const canvas = html("canvas", { role: "img", "aria-label": name });
    const tell = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect();
      point(kind, plane, 1 - (clientX - box.left) / box.width, 1 - (clientY - box.top) / box.height);
    };
    canvas.addEventListener("pointerdown", tell);
    canvas.addEventListener("pointermove", (event) => event.buttons && tell(event));
    return canvas;
  }

  function fit(canvases, { shape, mm }, across, down) { // one scale for all; two canvas pixels a page's pixel
    const size = shape.map((n, axis) => n * mm[axis]);
    const total = PLANES.reduce((sum, plane) => sum + size[plane.across], 0);
    const scale = 2 * Math.min(across / total, down / Math.max(size[1], size[2]));
    PLANES.forEach((plane, i) => {
      canvases[i].width = Math.round(size[plane.across] * scale);
      canvases[i].height = Math.round(size[plane.down] * scale);
      canvases[i].parentElement.style.flexBasis = `${canvases[i].width / 2}px`;
    });
  }

  // ---- The viewer

  const viewers = []; // of the page, for its explorers: { has, open }

  function viewer(root, { cases, size }, view) {
    const state = { item: cases[0], at: [0, 0, 0], width: 255, level: 127.5, outline: true };
    const list = html("select", { change: () => open(cases[list.value]) });
    const tick = html("input", { type: "checkbox", change: () => set({ outline: tick.checked }) });
    const width = slider("window", 255, (value) => set({ width: value }));
    const level = slider("level", 255, (value) => set({ level: value }));
    const moves = PLANES.map(({ name, normal }) =>
      slider(name, 0, (k) => set({ at: state.at.with(normal, k) })));
    const [panes, cubes] = ["image", "cube"].map((kind) => PLANES.map((plane) => pane(plane, kind, point)));
    const [facts, note] = [html("dl"), html("p", { class: "note", "aria-live": "polite" })];

    function set(change) {
      Object.assign(state, change);
      draw();
    }

    function point(kind, { across, down }, x, y) {
      const { item, at } = state;
      const shown = (axis, part) => {
        const cell = clamp(Math.floor(part * item[kind].shape[axis]), 0, item[kind].shape[axis] - 1);
        return kind === "image" ? cell : fromCube(item, axis, cell);
      };
      set({ at: at.with(across, shown(across, x)).with(down, shown(down, y)) });
    }

    function where(axis) { // the slice of the whole image, in words
      const place = inWhole(state.item, axis, state.at[axis]);
      const mm = (place * state.item.spacing[axis]).toFixed(1);
      return `slice ${Math.floor(place) + 1} of ${state.item.whole[axis]}, ${mm} mm from the ${ORIGIN[axis]}`;
    }

    function sayIntensities() { // in the units of the file
      const [low, high] = state.item.window;
      const unit = (high - low) / 255;
      const short = (value) => String(Number(value.toPrecision(3)));
      width.show(state.width, short(state.width * unit));
      level.show(state.level, short(low + state.level * unit));
    }

    function draw() {
      const { item, at } = state;
      const net = inCube(item, at);
      const inside = state.outline && item.inside;
      const look = { grey: greys(state.width, state.level), inside, hair: true };
      PLANES.forEach((plane, i) => {
        paint(panes[i], item.image, plane, at, look);
        paint(cubes[i], item.cube, plane, net.at, { grey: greys(255, 127.5), hair: !net.outside });
        moves[i].show(at[plane.normal], where(plane.normal));
      });
      note.textContent = net.outside ? "The cross-hair lies outside; the nearest slices are shown." : "";
      sayIntensities();
    }

    async function open(item) {
      list.value = cases.indexOf(item);
      await load(item, size);
      if (item !== cases[list.value]) return; // another was chosen meanwhile
      fit(panes, item.image, 880, 320);
      fit(cubes, item.cube, 490, 160);
      PLANES.forEach(({ normal }, i) => moves[i].range.setAttribute("max", item.shape[normal] - 1));
      tick.disabled = !item.inside;
      const fact = ([name, words]) => [html("dt", {}, name), html("dd", {}, words)];
      facts.replaceChildren(...item.facts.flatMap(fact));
      set({ item, at: item.at, width: 255, level: 127.5 });
    }

    function layOut() {
      const figure = (canvas, ...rest) => html("div", { class: "pane" }, canvas, ...rest);
      options(list, cases.map((item, i) => [i, item.title, item.center]), 0);
      tick.checked = true;
      root.append(
        html("div", { class: "controls" }, field("case", list), field("outline", tick)),
        html("div", { class: "panes" }, ...panes.map((canvas, i) => figure(canvas, moves[i].field))),
        html("div", { class: "controls" }, width.field, level.field),
        html("div", { class: "columns" }, html("div", {},
          html("p", {}, `What a network sees: the masked ROI, resized to ${size}³ voxels`),
          html("div", { class: "panes" }, ...cubes.map((canvas) => figure(canvas))), note), facts));
    }

    function visit(item) { // from elsewhere in the page
      for (let box = view; (box = box.parentElement.closest("details"));) box.open = true;
      view.scrollIntoView();
      list.focus({ preventScroll: true });
      return open(item);
    }

    const named = (id, modality) => cases.find((item) => item.case === id && item.modality === modality);
    viewers.push({ has: (...name) => Boolean(named(...name)), open: (...name) => visit(named(...name)) });
    layOut();
    return open(cases[0]);
  }

  // ---- Results. An arm is its place in view.arms, a center in view.centers, the last is all.

  const three = (value) => value.toFixed(3);
  const argmax = (p) => p.indexOf(Math.max(...p)); // a tie goes to the lower class
  const byArm = (view, rule, arm) => view.scores.find((one) => one.arm === arm && one.rule === rule);

  function tested(view, rule, arm, center) { // [{ id, center, y, p }], the cases of a center or of all
    const { id, center: places, y } = view.cases;
    const scored = byArm(view, rule, arm);
    if (!scored) return [];
    const [table, n] = [scored.table ??= new Float32Array(bytes(scored.p).buffer), view.classes.length];
    const here = (k) => center === view.centers.length - 1 || center === places[k];
    const p = (k) => Array.from(table.subarray(k * n, (k + 1) * n));
    return id.map((_, k) => k).filter((k) => here(k) && !Number.isNaN(table[k * n])) // NaN: was not tested
      .map((k) => ({ id: id[k], center: view.centers[places[k]], y: y[k], p: p(k) }));
  }

  function roc(cases) { // points (1 - specificity, sensitivity) and AUC of high risk, or null
    const high = cases[0]?.p.length - 1;
    const positives = cases.filter((one) => one.y === high).length;
    const negatives = cases.length - positives;
    if (!positives || !negatives) return null;
    const sorted = cases.toSorted((a, b) => b.p[high] - a.p[high]);
    let [hits, alarms, wins] = [0, 0, 0];
    const points = [[0, 0]];
    for (let i = 0; i < sorted.length;) {
      let [hit, alarm] = [0, 0]; // equal scores make one step
      for (const score = sorted[i].p[high]; sorted[i]?.p[high] === score; i++) {
        if (sorted[i].y === high) hit++;
        else alarm++;
      }
      wins += alarm * (hits + hit / 2);
      [hits, alarms] = [hits + hit, alarms + alarm];
      points.push([alarms / negatives, hits / positives]);
    }
    return { points, auc: wins / (positives * negatives) };
  }

  // ---- Pictures of results. A row of the summary is [arm, rule, metric, center, mean, low, high, why not].

  function interval(row) {
    if (!row || row[4] === null) return row?.[7] ? `n/a: ${row[7]}` : "n/a";
    return three(row[4]) + (row[5] === null ? "" : `\u00a0[${three(row[5])},\u00a0${three(row[6])}]`);
  }

  const dashes = (arm) => ({ "stroke-dasharray": arm.reference ? "5 3" : "none" }); // trains no network

  function mark(row, x, y, arm) {
    if (!row || row[4] === null) return text(x(0.5), y + 4, "n/a", { class: "undefined", fill: arm.color });
    const [mean, low, high] = [row[4], row[5] ?? row[4], row[6] ?? row[4]].map((v) => x(clamp(v, 0, 1)));
    const point = { x: mean - 3.5, y: y - 3.5, width: 7, height: 7, rx: arm.reference ? 0 : 3.5 };
    return svg("g", {}, svg("rect", { ...point, fill: arm.color }),
      path(`M${low} ${y}H${high}`, { stroke: arm.color, "stroke-width": 2, ...dashes(arm) }));
  }

  function axis(x, y, name) { // from 0 to 1
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((value) => text(x(value), y + 16, value));
    return svg("g", { "text-anchor": "middle" }, path(`M${x(0)} ${y}H${x(1)}`, { class: "line" }), ...ticks,
      text(x(0.5), y + 34, name));
  }

  function forest(view, arms, chosen, find, name, pick) {
    const [step, height] = [11, arms.length * 11 + 12];
    const bottom = view.centers.length * height + 4;
    const x = (value) => 90 + value * 740;
    const rows = view.centers.map((center, c) => {
      const found = arms.map((arm) => find(arm, c));
      const [top, middle] = [c * height + 2, (c + 0.5) * height + 5];
      const nowhere = arms.length && !found.some((row) => row && row[4] !== null);
      const marks = nowhere ? [text(x(0.5), middle, interval(found[0]), { class: "undefined" })]
        : arms.map((arm, a) => mark(found[a], x, top + 10 + a * step, view.arms[arm]));
      return centerRow(center, c === chosen, () => pick(c),
        arms.map((arm, a) => `${view.arms[arm].label} ${interval(found[a])}`),
        svg("rect", { class: "ground", x: 2, y: top, width: 846, height: height - 2, rx: 3 }),
        ...(name.includes("AUC") ? [path(`M${x(0.5)} ${top}V${top + height}`, { class: "guide" })] : []),
        text(12, middle, center), ...marks);
    });
    const size = { class: "forest", viewBox: `0 0 850 ${bottom + 44}` };
    return svg("svg", { ...size, role: "group", "aria-label": name }, ...rows,
      axis(x, bottom, name));
  }

  function centerRow(center, pressed, pick, said, ...children) { // a button that says its intervals
    const keydown = (event) => [" ", "Enter"].includes(event.key) && (event.preventDefault(), pick());
    const attrs = { role: "button", tabindex: 0, "aria-pressed": pressed, click: pick, keydown };
    return svg("g", { class: "row", "aria-label": center, ...attrs },
      svg("title", {}, [center, ...said].join("\n")), ...children);
  }

  function curves(name, lines) { // lines: [arm, points]
    const [x, y] = [(value) => 46 + value * 300, (value) => 308 - value * 300];
    const through = (points) => `M${points.map(([a, b]) => `${x(a)} ${y(b)}`).join("L")}`;
    const ticks = [0, 0.5, 1].map((value) => text(40, y(value) + 4, value, { "text-anchor": "end" }));
    const drawn = lines.map(([arm, points]) =>
      path(through(points), { class: "curve", stroke: arm.color, ...dashes(arm) }));
    return svg("svg", { class: "roc", viewBox: "0 0 362 350", role: "img", "aria-label": name },
      path(through([[0, 0], [1, 1]]), { class: "guide" }), path("M46 8V308", { class: "line" }), ...ticks,
      text(-158, 12, "sensitivity", { transform: "rotate(-90)", "text-anchor": "middle" }),
      axis(x, 308, "1 - specificity"), ...drawn);
  }

  function histogram(cases, classes) { // of the probability of high risk, a strip a true class
    const [bins, high, strip] = [20, classes.length - 1, 68];
    const counts = classes.map(() => new Array(bins).fill(0));
    for (const { y, p } of cases) counts[y][Math.min(Math.floor(p[high] * bins), bins - 1)]++;
    const most = Math.max(1, ...counts.flat());
    const x = (value) => 10 + value * 400;
    const bar = (n, bin, bottom) => {
      const size = (n / most) * (strip - 24);
      return svg("rect", { x: x(bin / bins) + 1, y: bottom - size, width: 18, height: size, class: "bar" },
        svg("title", {}, `${bin / bins} to ${(bin + 1) / bins}: ${n} cases`));
    };
    const strips = counts.map((row, y) => svg("g", {},
      text(x(0), y * strip + 17, `${classes[y]} (n = ${row.reduce((sum, n) => sum + n)})`),
      ...row.map((n, bin) => bar(n, bin, (y + 1) * strip)),
      path(`M${x(0)} ${(y + 1) * strip}H${x(1)}`, { class: "line" })));
    const name = "predicted probability of high risk";
    return svg("svg", { class: "histogram", viewBox: `0 0 420 ${classes.length * strip + 42}`, role: "img",
      "aria-label": `histogram of the ${name}` }, ...strips, axis(x, classes.length * strip, name));
  }

  function confusion(cases, classes) {
    const counts = classes.map(() => new Array(classes.length).fill(0));
    for (const { y, p } of cases) counts[y][argmax(p)]++;
    const cell = (n, row) => {
      const share = n / Math.max(1, row.reduce((sum, one) => sum + one));
      return html("td", { style: `background: rgba(0, 114, 178, ${0.45 * share})` }, n);
    };
    const rows = counts.map((row, y) =>
      [html("th", { scope: "row" }, classes[y]), ...row.map((n) => cell(n, row))]);
    const caption = "Cases; rows: true class, columns: predicted";
    return fill(table(caption, ["", ...classes], rows), { class: "confusion" }, []);
  }

  function worst(cases, view) { // those with the lowest probability of their true class
    const button = (id) => {
      const shown = viewers.find((one) => one.has(id, view.modality));
      const open = { "aria-label": `show ${id}`, click: () => shown.open(id, view.modality) };
      return shown ? [html("button", { type: "button", ...open }, "show")] : [];
    };
    const { classes } = view;
    const cells = ({ id, center, y, p }) => [id, center, classes[y], classes[argmax(p)], three(p[y])];
    const rows = cases.toSorted((a, b) => a.p[a.y] - b.p[b.y]).slice(0, 8).map((one) =>
      [...cells(one).map((words) => html("td", {}, words)), html("td", {}, ...button(one.id))]);
    const head = ["case", "center", "true class", "predicted class", "probability of the true class", "scan"];
    return table("The 8 cases most wrong", head, rows);
  }

  // ---- The explorer

  const ALONE = "local_only";
  const NO_SCALE = "Local only: a model a center, whose scores share no scale, so there is no ROC of all.";

  function explorer(root, { rules, metrics, views }) {
    const state = { view: views[0], center: -1, arm: 0, off: new Set() };
    Object.assign(state, { metric: metrics[0][0], rule: rules[0][0] });
    const choose = {
      task: (task) => open(views.find((v) => v.task === task && v.modality === state.view.modality)
        ?? views.find((v) => v.task === task)),
      modality: (modality) => open(views.find((v) => v.task === state.view.task && v.modality === modality)),
      metric: (metric) => set({ metric }),
      rule: (rule) => set({ rule }),
      center: (center) => set({ center: Number(center) }),
      arm: (arm) => set({ arm: Number(arm) }),
    };
    const lists = Object.fromEntries(Object.entries(choose).map(([name, chosen]) =>
      [name, html("select", { change: (event) => chosen(event.target.value) })]));
    const arms = html("fieldset");
    const [above, left, right, below] = Array.from({ length: 4 }, () => html("div"));

    const isAll = () => state.center === state.view.centers.length - 1;
    const place = () => (isAll() ? "all centers" : state.view.centers[state.center]);

    function set(change) {
      Object.assign(state, change);
      draw();
    }

    function open(view) { // another task or modality; the center stays where it can
      const center = view.centers.indexOf(state.view.centers[state.center]);
      const unique = new Map(views.map((v) => [v.task, v.taskName]));
      options(lists.task, unique, view.task);
      const same = views.filter((v) => v.task === view.task);
      options(lists.modality, same.map((v) => [v.modality, v.modalityName]), view.modality);
      const all = view.centers.length - 1;
      options(lists.center, view.centers.map((name, c) => [c, name]), center < 0 ? all : center);
      options(lists.arm, view.arms.map((arm, a) => [a, arm.label]), 0);
      arms.replaceChildren(html("legend", {}, "methods"), ...view.arms.map(armBox));
      set({ view, arm: 0, off: new Set(), center: Number(lists.center.value) });
    }

    const swatch = (arm) => html("span", { class: "swatch", style:
      `border-top: 5px ${arm.reference ? "dashed" : "solid"} ${arm.color}` });

    function armBox(arm, a) {
      const change = () => {
        if (!state.off.delete(a)) state.off.add(a);
        draw();
      };
      const box = html("input", { type: "checkbox", change });
      box.checked = true;
      return html("label", {}, box, swatch(arm), arm.label);
    }

    function pick(center) { // a row of the forest plot, which keeps the keyboard
      lists.center.value = center;
      set({ center });
      above.querySelector('[aria-pressed="true"]').focus({ preventScroll: true });
    }

    function draw() {
      const { view, metric, rule, center } = state;
      const shown = view.arms.map((_, a) => a).filter((a) => !state.off.has(a));
      const find = (arm, at) =>
        view.summary.find((row) => row[0] === arm && row[1] === rule && row[2] === metric && row[3] === at);
      const macro = metric === "auc" && view.classes.length > 2 ? "macro " : "";
      const name = macro + new Map(metrics).get(metric);
      const of = metric === "acc" ? "all test cases" : "mean over folds"; // as inference.intervals has them
      const title = `${name}, ${of}, with 95 % interval`;
      above.replaceChildren(forest(view, shown, center, find, title, pick));
      left.replaceChildren(...rocPanel(shown, (arm) => interval(find(arm, center)), name));
      right.replaceChildren(...armPanel());
      below.replaceChildren(worst(tested(view, rule, state.arm, center), view));
    }

    function rocPanel(shown, mean, metric) {
      const { view, rule, center } = state;
      const mixed = (a) => isAll() && view.arms[a].name === ALONE;
      const found = shown.map((a) => [view.arms[a], mixed(a) ? null : roc(tested(view, rule, a, center)), a]);
      const why = (a) => mixed(a) ? "n/a, see below" : "n/a: one class only";
      const rows = found.map(([arm, curve, a]) => [html("th", { scope: "row" }, swatch(arm), arm.label),
        html("td", {}, curve ? three(curve.auc) : why(a)), html("td", {}, mean(a))]);
      const lines = found.filter(([, curve]) => curve).map(([arm, curve]) => [arm, curve.points]);
      const title = `ROC, ${place()}: high risk against the rest`;
      const caption = "The curve pools the test folds; the last column is that of the plot above.";
      const legend = table(caption, ["method", "AUC of the curve", `${metric} [95 %]`], rows);
      return [html("h4", {}, title), curves(title, lines), fill(legend, { class: "legend" }, []),
        html("p", { class: "note" }, shown.some(mixed) ? NO_SCALE : "")];
    }

    function armPanel() {
      const { view, rule, center, arm } = state;
      const cases = tested(view, rule, arm, center);
      const epochs = byArm(view, rule, arm)?.epochs.join(", ") ?? "none";
      return [html("h4", {}, `${view.arms[arm].label}, ${place()}: ${cases.length} cases`),
        html("p", { class: "note" }, `Epochs chosen, by fold: ${epochs}`),
        confusion(cases, view.classes), histogram(cases, view.classes)];
    }

    options(lists.metric, metrics, state.metric);
    options(lists.rule, rules, state.rule);
    const row = (...children) => html("div", { class: "controls" }, ...children);
    root.append(
      row(field("task", lists.task), field("modality", lists.modality), field("metric", lists.metric),
        field("epoch", lists.rule)),
      row(arms), above, row(field("center", lists.center), field("method on the right", lists.arm)),
      html("div", { class: "columns" }, left, right), below);
    open(views[0]);
  }

  // ---- The page

  async function enliven(view, start) { // the picture goes when the live view stands
    if (view.dataset.live) return;
    view.dataset.live = "yes";
    try {
      const live = html("div", { class: "live" });
      await start(live, JSON.parse(view.querySelector("script").textContent), view);
      view.querySelector("img").replaceWith(live);
    } catch (error) {
      console.error(error);
    }
  }

  function run() { // viewers first: explorers ask what they hold
    for (const [kind, start] of [["viewer", viewer], ["explorer", explorer]]) {
      for (const view of document.querySelectorAll(`.ipmn-view[data-view="${kind}"]`)) enliven(view, start);
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", run);
  else run();
})();
