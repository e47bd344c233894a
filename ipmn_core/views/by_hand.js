// FedProx by hand: the paths of two centers in the plane of two weights, for precomputed settings.
// state: { choices: [[name, values]], start, limits, clients, settings: { "0,1,2": paths }, planes: by heterogeneity }

function by_hand(root, { choices, start, limits, clients, settings, planes }) {
  const [low, high] = limits;
  const edge = 420;
  const x = (value) => 40 + ((value - low) / (high - low)) * edge;
  const y = (value) => 10 + edge - ((value - low) / (high - low)) * edge;
  const place = ([a, b]) => [x(a).toFixed(1), y(b).toFixed(1)];
  const colors = Object.fromEntries(clients.map(({ name, color }) => [name, color]));
  const chosen = { ...start };
  const moves = choices.map(([name, values]) => {
    const one = slider(name, (k) => {
      chosen[name] = k;
      draw();
    });
    one.fit(0, values.length - 1);
    return [name, one, values];
  });
  const picture = html("div", { class: "columns" });

  const dots = (points, attrs) => points.map((point) => {
    const [cx, cy] = place(point);
    return svg("circle", { cx, cy, ...attrs });
  });

  function star(point, color, name) {
    const [cx, cy] = place(point);
    return text(cx, Number(cy) + 7, "★", { class: "star", fill: color }).appendChild(svg("title", {}, name)).parentNode;
  }

  function plane({ walks, server }, { contours, optima }) {
    const lines = clients.flatMap(({ name, color }) => contours[name].map((points) =>
      path(line(points.map(place)), { class: "contour", stroke: color })));
    const steps = clients.flatMap(({ name, color }) => walks[name].flatMap((walk) =>
      [path(line(walk.map(place)), { class: "step", stroke: color }), ...dots(walk, { r: 1.6, fill: color })]));
    const rounds = [path(line(server.map(place)), { class: "server" }), ...dots(server, { r: 4, class: "round" })];
    const stars = optima.map(([name, point]) => star(point, colors[name] ?? "var(--ink)", `optimum of ${name}`));
    const ticks = [0, 1, 2].flatMap((value) => [text(x(value), edge + 26, value), text(28, y(value) + 4, value)]);
    const name = "the weights of both clients and the server, step by step";
    return svg("svg", { class: "plane", viewBox: `0 0 ${edge + 50} ${edge + 50}`, role: "img", "aria-label": name },
      path(`M40 10V${edge + 10}H${edge + 40}`, { class: "line" }), ...lines, ...steps, ...rounds, ...stars,
      svg("g", { "text-anchor": "middle" }, ...ticks, text(40 + edge / 2, edge + 44, "weight 0 (up: weight 1)")));
  }

  function draw() {
    for (const [name, one, values] of moves) one.show(chosen[name], String(values[chosen[name]]));
    const key = moves.map(([name]) => chosen[name]).join();
    const found = settings[key];
    const rows = clients.map(({ name, color, cases }) => [
      html("th", { scope: "row" }, html("span", { class: "swatch", style: `border-top: 5px solid ${color}` }),
        `${name}, ${cases} cases`),
      ...found.drift[name].map((distance) => html("td", {}, distance.toFixed(2)))]);
    const head = ["client", ...found.drift[clients[0].name].map((_, k) => `round ${k + 1}`)];
    const caption = "Drift: the distance of each client's weights from the server's, by round";
    picture.replaceChildren(plane(found, planes[chosen.heterogeneity]), html("div", {},
      html("p", {}, "Colored dots: local steps of a client. Large dots: the server after each round. ★: the optimum of each client (in its color) and of all cases."),
      table(caption, head, rows)));
  }

  root.append(row(...moves.map(([, one]) => one.field)), picture);
  draw();
}

VIEWS.by_hand = by_hand;
