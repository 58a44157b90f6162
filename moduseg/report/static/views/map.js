"use strict";
/* The bank on a plane: each region is a point in the colour of its class, with a picture on hover. */

Report.map = (bank, open, onSelect) => {
  const { h, swatch, nameOf, numbered, integer } = Report;
  const kinds = Object.keys(bank.maps);
  const decoded = {};
  const points = () => {
    const kind = state.kind;
    decoded[kind] ||= {
      rows: Report.codec.numbers(bank.maps[kind].rows, 4),
      x: Report.codec.numbers(bank.maps[kind].x, 2),
      y: Report.codec.numbers(bank.maps[kind].y, 2),
    };
    return decoded[kind];
  };
  const state = {
    kind: kinds[0],
    label: null,
    view: { scale: 1, x: 0, y: 0 },
    hovered: -1,
    drag: null,
    hasLasso: false,
    lasso: null,
    selected: new Set(),
  };
  const canvas = h("canvas", {
    role: "img",
    "aria-label": "Map of the bank; its regions are also in the gallery below",
  });
  const box = h("div", { class: "map-box" }, canvas);
  let size = [0, 0];

  const positionOf = (i) => {
    const { x, y } = points();
    const extent = Math.min(size[0], size[1]) - 36;
    return [
      size[0] / 2 + (x[i] / 65535 - 0.5) * extent * state.view.scale + state.view.x,
      size[1] / 2 - (y[i] / 65535 - 0.5) * extent * state.view.scale + state.view.y,
    ];
  };

  function draw() {
    if (!box.clientWidth) return;
    size = [box.clientWidth, Math.min(560, Math.max(320, box.clientWidth * 0.68))];
    const ink = Report.sharp(canvas, ...size);
    const { rows } = points();
    const radius = Math.max(1.6, Math.min(5, 90 / Math.sqrt(rows.length + 1))) * Math.sqrt(state.view.scale);
    const text = Report.css("--text");
    const paint = (i, chosen) => {
      const label = bank.labels[rows[i]];
      const [x, y] = positionOf(i);
      const faint = state.label !== null && label !== state.label;
      ink.globalAlpha = chosen ? 1 : faint ? 0.12 : 1;
      ink.beginPath();
      ink.arc(x, y, chosen ? radius + 3 : radius, 0, 2 * Math.PI);
      // The colours are those of the legend; a thin ring keeps dark and pale ones visible in both themes.
      ink.fillStyle = Report.colour(label);
      ink.fill();
      ink.lineWidth = chosen ? 2 : 1;
      ink.strokeStyle = text;
      ink.globalAlpha *= chosen ? 1 : 0.6;
      ink.stroke();
    };
    // Background regions are the most frequent, so they are drawn below the others.
    for (let i = 0; i < rows.length; i++) if (bank.labels[rows[i]] === 0) paint(i);
    for (let i = 0; i < rows.length; i++) if (bank.labels[rows[i]] !== 0) paint(i);
    for (let i = 0; i < rows.length; i++) if (state.selected.has(rows[i])) paint(i, true);
    if (state.hovered >= 0) paint(state.hovered, true);
    ink.globalAlpha = 1;
    state.lasso?.draw(ink, Report.css("--accent"));
  }

  function nearest(event) {
    const bounds = canvas.getBoundingClientRect();
    const [px, py] = [event.clientX - bounds.left, event.clientY - bounds.top];
    const { rows } = points();
    let [minDistance, index] = [12 * 12, -1];
    for (let i = 0; i < rows.length; i++) {
      if (state.label !== null && bank.labels[rows[i]] !== state.label) continue;
      const [x, y] = positionOf(i);
      const distance = (x - px) ** 2 + (y - py) ** 2;
      if (distance < minDistance) [minDistance, index] = [distance, i];
    }
    return index;
  }

  function hover(event) {
    const index = nearest(event);
    if (index !== state.hovered) {
      state.hovered = index;
      draw();
    }
    canvas.style.cursor = index >= 0 ? "pointer" : "grab";
    if (index < 0) {
      Report.hideTip();
      return;
    }
    const row = points().rows[index];
    const label = bank.labels[row];
    Report.tip(
      event.clientX,
      event.clientY,
      ...[
        bank.pictureAt.has(row)
          ? h("img", { src: `bank/${numbered(row)}.jpg`, alt: "", width: "128", height: "128" })
          : null,
        h("span", {}, swatch(label), h("b", {}, nameOf(label))),
        h("small", {}, bank.ids[bank.image[row]]),
        h("small", {}, `a neighbour of ${integer(bank.used[row])} proposals`),
      ].filter(Boolean),
    );
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (state.hasLasso) {
      state.lasso = new Report.Lasso();
      return;
    }
    state.drag = { x: event.clientX, y: event.clientY, view: { ...state.view }, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (state.lasso) {
      const bounds = canvas.getBoundingClientRect();
      state.lasso.add(event.clientX - bounds.left, event.clientY - bounds.top);
      draw();
      return;
    }
    if (!state.drag) {
      if (!state.hasLasso) hover(event);
      return;
    }
    const [dx, dy] = [event.clientX - state.drag.x, event.clientY - state.drag.y];
    if (Math.hypot(dx, dy) > 4) state.drag.moved = true;
    if (state.drag.moved && state.view.scale > 1) {
      state.view = { ...state.view, x: state.drag.view.x + dx, y: state.drag.view.y + dy };
      Report.hideTip();
      draw();
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (state.lasso) {
      const { rows } = points();
      state.selected = new Set(
        [...rows].filter(
          (row, i) => (state.label === null || bank.labels[row] === state.label) && state.lasso.holds(...positionOf(i)),
        ),
      );
      state.lasso = null;
      draw();
      onSelect([...state.selected]);
      return;
    }
    const click = state.drag && !state.drag.moved;
    state.drag = null;
    if (!click) return;
    const index = nearest(event);
    Report.hideTip();
    if (index >= 0) open(points().rows[index]);
  });
  canvas.addEventListener("pointerleave", () => {
    state.hovered = -1;
    state.drag = null;
    Report.hideTip();
    draw();
  });
  canvas.addEventListener("dblclick", () => {
    state.view = { scale: 1, x: 0, y: 0 };
    draw();
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      // Zooming takes a key or two fingers, so that scrolling the page past the map still works.
      if (!event.ctrlKey && !event.shiftKey) return;
      event.preventDefault();
      const bounds = canvas.getBoundingClientRect();
      const scale = Math.max(1, Math.min(30, state.view.scale * Math.exp(-(event.deltaY || event.deltaX) * 0.004)));
      const ratio = scale / state.view.scale;
      const [px, py] = [event.clientX - bounds.left - size[0] / 2, event.clientY - bounds.top - size[1] / 2];
      state.view =
        scale === 1
          ? { scale, x: 0, y: 0 }
          : { scale, x: px - (px - state.view.x) * ratio, y: py - (py - state.view.y) * ratio };
      draw();
    },
    { passive: false },
  );
  new ResizeObserver(draw).observe(box);
  Report.onTheme(draw);

  const layouts = kinds.map((kind) => (kind === "pca" ? "two principal axes" : "UMAP")).join(", ");
  const labels = [...new Set(bank.labels)].sort((a, b) => a - b);
  return h(
    "section",
    { class: "card map" },
    h(
      "div",
      { class: "card-head" },
      h("h2", {}, "Map of the bank"),
      h(
        "div",
        { class: "row" },
        kinds.length > 1
          ? Report.segmented(
              "Layout",
              kinds.map((kind) => [kind, kind.toUpperCase()]),
              state.kind,
              (kind) => {
                state.kind = kind;
                state.view = { scale: 1, x: 0, y: 0 };
                draw();
              },
            )
          : null,
        h(
          "button",
          {
            type: "button",
            class: "button small",
            "aria-pressed": "false",
            title: "Draw around points to list their regions",
            onclick: (event) => {
              state.hasLasso = !state.hasLasso;
              event.currentTarget.setAttribute("aria-pressed", String(state.hasLasso));
              canvas.style.cursor = state.hasLasso ? "crosshair" : "grab";
              canvas.style.touchAction = state.hasLasso ? "none" : "";
              if (!state.hasLasso) {
                state.selected.clear();
                onSelect([]);
              }
              draw();
            },
          },
          "Lasso",
        ),
        h(
          "select",
          {
            "aria-label": "Class on the map",
            onchange: (event) => {
              state.label = event.target.value === "" ? null : Number(event.target.value);
              draw();
            },
          },
          h("option", { value: "" }, "all classes"),
          labels.map((label) => h("option", { value: String(label) }, nameOf(label))),
        ),
      ),
    ),
    h(
      "p",
      { class: "muted" },
      `What looks alike to the backbone lies close together (${layouts}).`,
      h("span", { class: "mouse-only" }, " Shift and wheel zoom."),
    ),
    box,
  );
};
