// The ROI viewer: a case in three planes, the network's input cube, and optionally where the network looks.
// A volume is { shape, mm, voxels }; indices run to the patient's right, front, head, the first fastest.

const PLANES = [ // as radiologists see them: against the indices, so right, front and head come first
  { name: "axial", across: 0, down: 1, normal: 2 },
  { name: "coronal", across: 0, down: 2, normal: 1 },
  { name: "sagittal", across: 1, down: 2, normal: 0 },
];
const ENDS = ["RL", "AP", "HF"];
const ORIGIN = ["left", "back", "foot end"]; // where an axis has its index 0
const [OUTLINE, CROSS, LESION] = ["#E69F00", "#56B4E9", "#56B4E9"];
const NEAR = 12; // mm around the pancreas in a close-up
const scratch = document.createElement("canvas");
const viewers = []; // of the page, for its explorers: { cases, visit }
const placeOf = (cases, id, modality) => cases.findIndex((one) => one[0] === id && one[2] === modality);

function opened(item, { voxels, inside, cube, heat, lesion }, size) {
  const mm = item.spacing.map((width, axis) => width * item.step[axis]);
  const cubic = (values) => values && { shape: [size, size, size], mm: [1, 1, 1], voxels: values };
  return { ...item, image: { shape: item.shape, mm, voxels }, cube: cubic(cube), inside, heat, lesion };
}

// A shown voxel's place among the slices of the whole image, counted from 0, and the other way round.
const inWhole = (item, axis, k) => item.start[axis] + (k + 0.5) * item.step[axis] - 0.5;
const fromWhole = (item, axis, place) =>
  clamp(Math.floor((place + 0.5 - item.start[axis]) / item.step[axis]), 0, item.shape[axis] - 1);

function inCube(item, at) { // the cube spans the box of the ROI; beyond its edges its outer cells are shown
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

const whole = ({ shape }) => shape.map((n) => [0, n]); // a frame: first voxel and number of voxels of each axis

function closeUp(item) {
  return item.box.map(([start, length], axis) => {
    const more = NEAR / item.spacing[axis];
    const [first, last] = [start - more, start + length - 1 + more].map((place) => fromWhole(item, axis, place));
    return [first, last - first + 1];
  });
}

// ---- Pictures: (column, row) from the top left of a frame

function section({ shape }, plane, at, frame) {
  const [[across, columns], [down, rows]] = [frame[plane.across], frame[plane.down]];
  const stride = [1, shape[0], shape[0] * shape[1]];
  const [right, below] = [stride[plane.across], stride[plane.down]];
  const first = at[plane.normal] * stride[plane.normal] + (across + columns - 1) * right + (down + rows - 1) * below;
  return { columns, rows, first, right, below };
}

function color(context, { columns, rows, first, right, below }, values, pixel) { // pixel: value -> 0xAABBGGRR
  const picture = new ImageData(columns, rows);
  const pixels = new Uint32Array(picture.data.buffer);
  for (let row = 0, i = 0; row < rows; row++) {
    for (let at = first - row * below, end = i + columns; i < end; i++, at -= right) pixels[i] = pixel(values[at]);
  }
  Object.assign(scratch, { width: columns, height: rows });
  scratch.getContext("2d").putImageData(picture, 0, 0);
  context.imageSmoothingEnabled = false; // a voxel is a box: no interpolation
  context.drawImage(scratch, 0, 0, context.canvas.width, context.canvas.height);
}

function grey(black, white) {
  const gain = 255 / Math.max(white - black, 1e-9);
  return (value) => {
    const tone = (value - black) * gain + 0.5;
    return 0xff000000 | ((tone < 0 ? 0 : tone > 255 ? 255 : tone | 0) * 0x010101);
  };
}

function outline(context, { columns, rows, first, right, below }, inside, stroke) { // the borders between voxels in and out
  const [wide, high] = [context.canvas.width / columns, context.canvas.height / rows];
  const holds = (column, row) => column >= 0 && row >= 0 && column < columns && row < rows
    && Boolean(inside(first - column * right - row * below));
  Object.assign(context, { strokeStyle: stroke, lineWidth: 3, lineCap: "round" });
  context.beginPath();
  const border = (x1, y1, x2, y2) => {
    context.moveTo(x1 * wide, y1 * high);
    context.lineTo(x2 * wide, y2 * high);
  };
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      const here = holds(column, row);
      if (here !== holds(column - 1, row)) border(column, row, column, row + 1);
      if (here !== holds(column, row - 1)) border(column, row, column + 1, row);
    }
  }
  context.stroke();
}

function crossHair(context, plane, at, frame) { // through the middle of a voxel
  const { width, height } = context.canvas;
  const share = (axis) => 1 - (at[axis] - frame[axis][0] + 0.5) / frame[axis][1];
  const [x, y] = [share(plane.across) * width, share(plane.down) * height];
  Object.assign(context, { strokeStyle: CROSS, lineWidth: 2 });
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

function pane(plane, kind, point, step) { // a canvas that tells where it is pressed, 0 to 1 along the indices
  const [[left], [top]] = [ENDS[plane.across], ENDS[plane.down]];
  const name = `${plane.name} plane of the ${kind}, ${left} on the left, ${top} on top; a click moves it`;
  const tell = ({ clientX, clientY, buttons }) => {
    const box = canvas.getBoundingClientRect();
    if (buttons) point(kind, plane, 1 - (clientX - box.left) / box.width, 1 - (clientY - box.top) / box.height);
  };
  const move = (event, by) => {
    event.preventDefault();
    step(kind, plane.normal, by);
  };
  const keydown = (event) => {
    const by = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
    if (by) move(event, by);
  };
  const wheel = (event) => move(event, -Math.sign(event.deltaY));
  const canvas = html("canvas",
    { role: "img", tabindex: 0, "aria-label": name, pointerdown: tell, pointermove: tell, wheel, keydown });
  return canvas;
}

function fit(canvases, { mm }, frame, across, down) { // one scale for all; two canvas pixels a page's pixel
  const size = mm.map((width, axis) => width * frame[axis][1]);
  const total = PLANES.reduce((sum, plane) => sum + size[plane.across], 0);
  const scale = 2 * Math.min(across / total, down / Math.max(size[1], size[2]));
  PLANES.forEach((plane, i) => {
    canvases[i].width = Math.round(size[plane.across] * scale);
    canvases[i].height = Math.round(size[plane.down] * scale);
    canvases[i].parentElement.style.flexBasis = `${canvases[i].width / 2}px`;
  });
}

// ---- The view. state: { size, cases: [[case, center, modality, class]], held: { place in cases: case }, ... };
// it opens with the case `first`, or with the first of the lists.

function viewer(root, { size, cases, held, modalities, classes, palette }, ask, first) {
  const colors = new Uint32Array(bytes(palette).buffer);
  const state = { outline: true, near: false, heat: true };
  const names = ["center", "modality", "class"]; // of the columns of `cases` after the first
  const filters = names.map(() => select(() => list()));
  const chosen = select((k) => open(Number(k)));
  const ticks = Object.entries({ outline: "outline", near: "close-up", heat: "Grad-CAM" })
    .map(([key, name]) => [key, tick(name, (value) => set({ [key]: value }))]);
  const width = slider("window", (value) => set({ width: value }));
  const level = slider("level", (value) => set({ level: value }));
  const moves = PLANES.map(({ name, normal }) => slider(name, (k) => set({ at: state.at.with(normal, k) })));
  const [panes, cubes] = ["image", "cube"].map((kind) => PLANES.map((plane) => pane(plane, kind, point, step)));
  const [facts, note] = [html("dl"), html("p", { class: "note", "aria-live": "polite" })];
  const [body, wrong] = [html("div"), html("p", { "aria-live": "polite" })];

  function set(change) {
    Object.assign(state, change);
    if ("near" in change || "item" in change) frame();
    draw();
  }

  function frame() {
    state.frame = state.near ? closeUp(state.item) : whole(state.item.image);
    fit(panes, state.item.image, state.frame, 880, 320);
    fit(cubes, state.item.cube, whole(state.item.cube), 490, 160);
  }

  function point(kind, { across, down }, x, y) {
    const { item, at } = state;
    const shown = (axis, part) => {
      const [first, n] = kind === "image" ? state.frame[axis] : [0, size];
      const cell = first + clamp(Math.floor(part * n), 0, n - 1);
      return kind === "image" ? cell : fromCube(item, axis, cell);
    };
    set({ at: at.with(across, shown(across, x)).with(down, shown(down, y)) });
  }

  function step(kind, axis, by) {
    const { item, at } = state;
    const next = kind === "image" ? at[axis] + by : fromCube(item, axis, inCube(item, at).at[axis] + by);
    set({ at: at.with(axis, clamp(next, 0, item.shape[axis] - 1)) });
  }

  function where(axis) { // the slice of the whole image, in words
    const place = inWhole(state.item, axis, state.at[axis]);
    const mm = (place * state.item.spacing[axis]).toFixed(1);
    return `slice ${Math.floor(place) + 1} of ${state.item.whole[axis]}, ${mm} mm from the ${ORIGIN[axis]}`;
  }

  function draw() {
    const { item, at } = state;
    const net = inCube(item, at);
    const [offset, slope] = item.scale;
    const [black, white] = [-0.5, 0.5].map((part) => (state.level + part * state.width - offset) / slope);
    PLANES.forEach((plane, i) => {
      const context = panes[i].getContext("2d");
      const flat = section(item.image, plane, at, state.frame);
      color(context, flat, item.image.voxels, grey(black, white));
      if (state.outline && item.inside) outline(context, flat, (k) => (item.inside[k >> 3] >> (k & 7)) & 1, OUTLINE);
      crossHair(context, plane, at, state.frame);
      letters(context, ENDS[plane.across], ENDS[plane.down]);
      drawCube(cubes[i].getContext("2d"), plane, net);
      moves[i].show(at[plane.normal], where(plane.normal));
    });
    note.textContent = net.outside ? "The cross-hair is outside the cube; the nearest slices are shown." : "";
    for (const [key, control] of [["width", width], ["level", level]]) {
      control.show(state[key], String(Number(state[key].toPrecision(3))));
    }
  }

  function drawCube(context, plane, { at, outside }) {
    const { cube, heat, lesion } = state.item;
    const flat = section(cube, plane, at, whole(cube));
    color(context, flat, cube.voxels, grey(0, 255));
    if (heat && state.heat) {
      color(context, flat, heat, (value) => colors[value]);
      if (lesion) outline(context, flat, (k) => lesion[k] > 127, LESION);
    }
    if (!outside) crossHair(context, plane, at, whole(cube));
    letters(context, ENDS[plane.across], ENDS[plane.down]);
  }

  function list(k) { // the cases of the chosen center, modality and class; opens k, or the first
    const fits = (one) => filters.every((filter, i) => ["", String(one[i + 1])].includes(filter.value));
    const found = cases.map((one, k) => [k, one[0]]).filter(([k]) => fits(cases[k]));
    options(chosen, found, k ?? found[0]?.[0]);
    return found.length ? open(k ?? found[0][0]) : say("no such case");
  }

  function say(why) { // hides the pictures: they may belong to another patient
    delete state.item;
    body.hidden = true;
    wrong.textContent = why;
  }

  const ahead = new Map(); // the next case of the list, fetched in advance

  function fetched(k) {
    const found = ahead.get(k) ?? (held[k] ? [held[k]] : ask(k));
    ahead.clear();
    return found;
  }

  function fetchNext() {
    const k = Number(chosen.options[chosen.selectedIndex + 1]?.value ?? -1);
    if (ask && k >= 0 && !ahead.size) ahead.set(k, ask(k));
  }

  async function open(k) {
    body.style.visibility = "hidden"; // never show another patient's picture with this name
    wrong.textContent = "loading";
    const [about, buffers] = await fetched(k);
    if (Number(chosen.value) !== k) return; // another case was chosen meanwhile
    if (about.wrong) return say(about.wrong);
    const item = opened(about, await numbers(about.arrays, buffers), size);
    if (Number(chosen.value) !== k) return;
    body.hidden = false;
    body.style.visibility = "";
    wrong.textContent = "";
    const [low, high] = item.window;
    const span = Math.max(high - low, 1e-6);
    level.fit(low - span / 2, high + span / 2, span / 100);
    width.fit(span / 50, 2 * span, span / 50);
    PLANES.forEach(({ normal }, i) => moves[i].fit(0, item.shape[normal] - 1));
    for (const [key, { box }] of ticks) box.disabled = { outline: !item.inside, heat: !item.heat }[key] ?? false;
    facts.replaceChildren(...item.facts.flatMap(([name, words]) => [html("dt", {}, name), html("dd", {}, words)]));
    set({ item, at: item.at, width: span, level: (low + high) / 2 });
    setTimeout(fetchNext, 300);
  }

  function visit(k) { // from elsewhere in the page
    filters.forEach((filter, i) => { filter.value = i < 2 ? cases[k][i + 1] : ""; });
    root.scrollIntoView();
    chosen.focus({ preventScroll: true });
    return list(k);
  }

  function layOut() {
    const shown = { modality: modalities, class: classes };
    filters.forEach((filter, i) => {
      const present = [...new Set(cases.map((one) => one[i + 1]))].sort(i === 2 ? (a, b) => a - b : () => 0);
      const entries = present.map((value) => [value, shown[names[i]]?.[value] ?? value]);
      options(filter, i === 2 ? [["", "any"], ...entries] : entries, i === 2 ? "" : present[0]);
    });
    ticks.find(([key]) => key === "near")[1].box.checked = false;
    const figure = (canvas, ...rest) => html("div", { class: "pane" }, canvas, ...rest);
    body.append(
      html("div", { class: "panes" }, ...panes.map((canvas, i) => figure(canvas, moves[i].field))),
      row(level.field, width.field, ...ticks.map(([, one]) => one.field)),
      html("div", { class: "columns" }, html("div", {},
        html("p", {}, `What a network sees: the masked ROI, resized to ${size}³ voxels`),
        html("div", { class: "panes" }, ...cubes.map((canvas) => figure(canvas))), note), facts));
    root.append(row(...filters.map((filter, i) => field(names[i], filter)), field("case", chosen)), wrong, body);
  }

  viewers.push({ cases, visit });
  layOut();
  return first === undefined ? list() : visit(first);
}

VIEWS.viewer = viewer;
