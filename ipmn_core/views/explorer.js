// The per-center explorer: intervals of all centers; ROC, confusions, scores and worst cases of one center.
// Arms and centers are indices into view.arms and view.centers; the last center is all together.

const three = (value) => value.toFixed(3);
const argmax = (p) => p.indexOf(Math.max(...p)); // a tie goes to the lower class
const byArm = (view, rule, arm) => view.scores.find((one) => one.arm === arm && one.rule === rule);

function tested(view, rule, arm, center) { // [{ id, center, y, p }], the cases of a center or of all
  const { id, center: places, y } = view.cases;
  const scored = byArm(view, rule, arm);
  if (!scored) return [];
  const [found, n] = [scored.table ??= new Float32Array(bytes(scored.p).buffer), view.classes.length];
  const here = (k) => center === view.centers.length - 1 || center === places[k];
  const p = (k) => Array.from(found.subarray(k * n, (k + 1) * n));
  return id.map((_, k) => k).filter((k) => here(k) && !Number.isNaN(found[k * n])) // NaN: was not tested
    .map((k) => ({ id: id[k], center: view.centers[places[k]], y: y[k], p: p(k) }));
}

function roc(cases) { // points (1 - specificity, sensitivity) and AUC of the last class, or null
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

function interval(found) {
  if (!found || found[4] === null) return found?.[7] ? `n/a: ${found[7]}` : "n/a";
  return three(found[4]) + (found[5] === null ? "" : `\u00a0[${three(found[5])},\u00a0${three(found[6])}]`);
}

const dashes = (arm) => ({ "stroke-dasharray": arm.reference ? "5 3" : "none" }); // trains no network

function mark(found, x, y, arm) {
  if (!found || found[4] === null) return text(x(0.5), y + 4, "n/a", { class: "undefined", fill: arm.color });
  const [mean, low, high] = [found[4], found[5] ?? found[4], found[6] ?? found[4]].map((v) => x(clamp(v, 0, 1)));
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
  const step = view.centers.length > 12 ? 8 : 11;
  const names = view.centers.map((center) => (center.length > 34 ? `${center.slice(0, 33)}…` : center));
  const left = Math.max(90, 24 + 7 * Math.max(...names.map((one) => one.length)));
  const [height, bottom] = [arms.length * step + 12, view.centers.length * (arms.length * step + 12) + 4];
  const x = (value) => left + value * (830 - left);
  const rows = view.centers.map((center, c) => {
    const found = arms.map((arm) => find(arm, c));
    const [top, middle] = [c * height + 2, (c + 0.5) * height + 5];
    const nowhere = arms.length && !found.some((one) => one && one[4] !== null);
    const marks = nowhere ? [text(x(0.5), middle, interval(found[0]), { class: "undefined" })]
      : arms.map((arm, a) => mark(found[a], x, top + 10 + a * step, view.arms[arm]));
    return centerRow(center, c === chosen, () => pick(c),
      arms.map((arm, a) => `${view.arms[arm].label} ${interval(found[a])}`),
      svg("rect", { class: "ground", x: 2, y: top, width: 846, height: height - 2, rx: 3 }),
      ...(name.includes("AUC") ? [path(`M${x(0.5)} ${top}V${top + height}`, { class: "guide" })] : []),
      text(12, middle, names[c]), ...marks);
  });
  const size = { class: "forest", viewBox: `0 0 850 ${bottom + 44}` };
  return svg("svg", { ...size, role: "group", "aria-label": name }, ...rows, axis(x, bottom, name));
}

function centerRow(center, pressed, pick, said, ...children) { // a button that says its intervals
  const keydown = (event) => [" ", "Enter"].includes(event.key) && (event.preventDefault(), pick());
  const attrs = { role: "button", tabindex: 0, "aria-pressed": pressed, click: pick, keydown };
  return svg("g", { class: "row", "aria-label": center, ...attrs },
    svg("title", {}, [center, ...said].join("\n")), ...children);
}

function curves(name, lines) { // lines: [arm, points]
  const [x, y] = [(value) => 46 + value * 300, (value) => 308 - value * 300];
  const through = (points) => line(points.map(([a, b]) => [x(a), y(b)]));
  const ticks = [0, 0.5, 1].map((value) => text(40, y(value) + 4, value, { "text-anchor": "end" }));
  const drawn = lines.map(([arm, points]) =>
    path(through(points), { class: "curve", stroke: arm.color, ...dashes(arm) }));
  return svg("svg", { class: "roc", viewBox: "0 0 362 350", role: "img", "aria-label": name },
    path(through([[0, 0], [1, 1]]), { class: "guide" }), path("M46 8V308", { class: "line" }), ...ticks,
    text(-158, 12, "sensitivity", { transform: "rotate(-90)", "text-anchor": "middle" }),
    axis(x, 308, "1 - specificity"), ...drawn);
}

function histogram(cases, classes) { // of the probability of the last class, a strip per true class
  const [bins, high, strip] = [20, classes.length - 1, 68];
  const counts = classes.map(() => new Array(bins).fill(0));
  for (const { y, p } of cases) counts[y][Math.min(Math.floor(p[high] * bins), bins - 1)]++;
  const most = Math.max(1, ...counts.flat());
  const x = (value) => 10 + value * 400;
  const bar = (n, bin, bottom, size = (n / most) * (strip - 24)) =>
    svg("rect", { x: x(bin / bins) + 1, y: bottom - size, width: 18, height: size, class: "bar" },
      svg("title", {}, `${bin / bins} to ${(bin + 1) / bins}: ${n} cases`));
  const strips = counts.map((found, y) => svg("g", {},
    text(x(0), y * strip + 17, `${classes[y]} (n = ${found.reduce((sum, n) => sum + n)})`),
    ...found.map((n, bin) => bar(n, bin, (y + 1) * strip)),
    path(`M${x(0)} ${(y + 1) * strip}H${x(1)}`, { class: "line" })));
  const name = `predicted probability of ${classes[high]}`;
  return svg("svg", { class: "histogram", viewBox: `0 0 420 ${classes.length * strip + 42}`, role: "img",
    "aria-label": `histogram of the ${name}` }, ...strips, axis(x, classes.length * strip, name));
}

function confusion(cases, classes) {
  const counts = classes.map(() => new Array(classes.length).fill(0));
  for (const { y, p } of cases) counts[y][argmax(p)]++;
  const cell = (n, found) => {
    const share = n / Math.max(1, found.reduce((sum, one) => sum + one));
    return html("td", { style: `background: rgba(0, 114, 178, ${0.45 * share})` }, n);
  };
  const rows = counts.map((found, y) =>
    [html("th", { scope: "row" }, classes[y]), ...found.map((n) => cell(n, found))]);
  return table("Cases; rows: true class, columns: predicted", ["", ...classes], rows, { class: "confusion" });
}

function worst(cases, view, show) { // those with the lowest probability of their true class
  const { classes, modality } = view;
  const button = (id) => html("button", { type: "button", "aria-label": `show ${id}`, click: () => show(id, modality) },
    "show");
  const cells = ({ id, center, y, p }) => [id, center, classes[y], classes[argmax(p)], three(p[y])];
  const rows = cases.toSorted((a, b) => a.p[a.y] - b.p[b.y]).slice(0, 8).map((one) =>
    [...cells(one).map((words) => html("td", {}, words)), html("td", {}, ...(show.known(one.id, modality) ? [button(one.id)] : []))]);
  const head = ["case", "center", "true class", "predicted class", "probability of the true class", "scan"];
  return table("The 8 worst predictions", head, rows);
}

function opening(below, scans, ask) { // show(case, modality): in a viewer of the page, or in a new one
  const holds = (one, name) => placeOf(one.cases, ...name) >= 0;
  const show = (...name) => {
    const found = viewers.find((one) => holds(one, name));
    if (found) found.visit(placeOf(found.cases, ...name));
    else viewer(below, scans, ask, placeOf(scans.cases, ...name)); // from then on it is a viewer of the page
  };
  const known = (...name) => [...viewers, ...(scans ? [scans] : [])].some((one) => holds(one, name));
  return Object.assign(show, { known });
}

// ---- The view. state: { rules, metrics, views: one per task and modality, scans: a viewer's state or null }

function explorer(root, { rules, metrics, views, scans }, ask) {
  const state = { view: views[0], center: -1, arm: 0, off: new Set(), metric: metrics[0][0], rule: rules[0][0] };
  const choose = {
    task: (task) => open(views.find((v) => v.task === task && v.modality === state.view.modality)
      ?? views.find((v) => v.task === task)),
    modality: (modality) => open(views.find((v) => v.task === state.view.task && v.modality === modality)),
    metric: (metric) => set({ metric }),
    rule: (rule) => set({ rule }),
    center: (center) => set({ center: Number(center) }),
    arm: (arm) => set({ arm: Number(arm) }),
  };
  const lists = Object.fromEntries(Object.entries(choose).map(([name, chosen]) => [name, select(chosen)]));
  const arms = html("fieldset");
  const [above, left, right, below, scan] = Array.from({ length: 5 }, () => html("div"));
  const show = opening(scan, scans, ask);

  const isAll = () => state.center === state.view.centers.length - 1;
  const place = () => (isAll() ? "all centers" : state.view.centers[state.center]);

  function set(change) {
    Object.assign(state, change);
    draw();
  }

  function open(view) { // another task or modality; keeps the center if possible
    const center = view.centers.indexOf(state.view.centers[state.center]);
    options(lists.task, [...new Map(views.map((v) => [v.task, v.taskName]))], view.task);
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
      view.summary.find((one) => one[0] === arm && one[1] === rule && one[2] === metric && one[3] === at);
    const [, named, of] = metrics.find(([key]) => key === metric);
    const name = (metric === "auc" && view.classes.length > 2 ? "macro " : "") + named;
    above.replaceChildren(forest(view, shown, center, find, `${name}, ${of}, with 95 % interval`, pick));
    left.replaceChildren(...rocPanel(shown, (arm) => interval(find(arm, center)), name));
    right.replaceChildren(...armPanel());
    below.replaceChildren(worst(tested(view, rule, state.arm, center), view, show));
  }

  function rocPanel(shown, mean, metric) {
    const { view, rule, center } = state;
    const mixed = (a) => isAll() && view.arms[a].personal;
    const found = shown.map((a) => [view.arms[a], mixed(a) ? null : roc(tested(view, rule, a, center)), a]);
    const why = (a) => mixed(a) ? "n/a, see above" : "n/a: one class only";
    const rows = found.map(([arm, curve, a]) => [html("th", { scope: "row" }, swatch(arm), arm.label),
      html("td", {}, curve ? three(curve.auc) : why(a)), html("td", {}, mean(a))]);
    const lines = found.filter(([, curve]) => curve).map(([arm, curve]) => [arm, curve.points]);
    const title = `ROC, ${place()}: ${view.classes.at(-1)} against the rest`;
    const caption = "The curve pools the test folds; the last column repeats the plot above.";
    const own = shown.filter(mixed).map((a) => view.arms[a].label).join(", ");
    const note = own && `${own}: one model per center. Their scores share no scale, so there is no ROC of all centers.`;
    return [html("h4", {}, title), curves(title, lines), html("p", { class: "note" }, note),
      table(caption, ["method", "AUC of the curve", `${metric} [95 %]`], rows, { class: "legend" })];
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
  root.append(
    row(field("task", lists.task), field("modality", lists.modality), field("metric", lists.metric),
      field("epoch", lists.rule)),
    row(arms), above, row(field("center", lists.center), field("method on the right", lists.arm)),
    html("div", { class: "columns" }, left, right), below, scan);
  open(views[0]);
}

VIEWS.explorer = explorer;
