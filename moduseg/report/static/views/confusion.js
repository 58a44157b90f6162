"use strict";
/* The confusion matrix: rows are the truth, columns the prediction, in percent of one of them. */

Report.confusion = () => {
  const { h, get, percent, integer, swatch, nameOf } = Report;
  const { classes, record } = get("summary");
  let by = "truth";
  let at = null;
  const rowSums = record.confusion.map((row) => row.reduce((a, b) => a + b, 0));
  const columnSums = classes.map((_, c) => record.confusion.reduce((sum, row) => sum + row[c], 0));
  // Labels in neither truth nor prediction would only shrink the other cells.
  const used = classes.map((_, label) => label).filter((label) => rowSums[label] + columnSums[label] > 0);
  const count = used.length;
  const share = (t, p) => {
    const total = by === "truth" ? rowSums[t] : columnSums[p];
    return total ? (100 * record.confusion[t][p]) / total : 0;
  };

  const addressOf = (t, p) => `#/images?sort=cell&truth=${t}&predicted=${p}&show=errors`;
  const canvas = h("canvas", {
    tabindex: "0",
    role: "img",
    "aria-label": "Confusion matrix; arrow keys move through its cells, Enter shows their images",
  });
  const line = h("p", { class: "confusion-line", "aria-live": "polite" });
  const box = h("div", { class: "confusion-box" }, canvas);
  let geometry = null;

  function shorten(ink, name, space) {
    while (name.length > 2 && ink.measureText(name).width > space) name = `${name.slice(0, -2)}…`;
    return name;
  }

  function draw() {
    if (!box.clientWidth) return;
    const names = count <= 40;
    const context = canvas.getContext("2d");
    const font = "12px system-ui, sans-serif";
    context.font = font;
    const longest = names
      ? Math.min(120, Math.max(...used.map((label) => context.measureText(classes[label]).width))) + 26
      : 18;
    const left = box.clientWidth < 520 && names ? Math.min(longest, 96) : longest;
    const cell = Math.max(4, Math.min(46, Math.floor((box.clientWidth - left - 4) / count)));
    // Names of columns stand upright above them, where they can be read.
    const hasColumnNames = names && cell >= 11;
    const top = hasColumnNames ? Math.min(longest, 110) + 2 : names ? 22 : 14;
    geometry = { left, top, cell };
    const ink = Report.sharp(canvas, left + cell * count + 2, top + cell * count + 2);
    const [text, lineColour, accent, bad, ground, over] = [
      "--text",
      "--line",
      "--accent",
      "--bad",
      "--cell",
      "--on-accent",
    ].map(Report.css);
    ink.font = font;
    ink.textBaseline = "middle";
    used.forEach((label, i) => {
      const y = top + cell * i;
      ink.fillStyle = Report.colour(label);
      ink.fillRect(left - 14, y + cell / 2 - 5, 10, 10);
      ink.fillRect(left + cell * i + cell / 2 - Math.min(5, cell / 2 - 1), top - 16, Math.min(10, cell - 2), 10);
      ink.strokeStyle = lineColour;
      ink.strokeRect(left - 14.5, y + cell / 2 - 5.5, 11, 11);
      ink.strokeRect(
        left + cell * i + cell / 2 - Math.min(5, cell / 2 - 1) - 0.5,
        top - 16.5,
        Math.min(11, cell - 1),
        11,
      );
      if (names && cell >= 11) {
        ink.fillStyle = text;
        ink.textAlign = "right";
        ink.fillText(shorten(ink, classes[label], left - 20), left - 18, y + cell / 2);
      }
      if (hasColumnNames) {
        ink.save();
        ink.translate(left + cell * i + cell / 2, top - 20);
        ink.rotate(-Math.PI / 2);
        ink.textAlign = "left";
        ink.fillStyle = text;
        ink.fillText(shorten(ink, classes[label], top - 22), 0, 0);
        ink.restore();
      }
    });
    used.forEach((t, i) =>
      used.forEach((p, j) => {
        const value = share(t, p);
        const [x, y] = [left + cell * j, top + cell * i];
        ink.globalAlpha = 1;
        ink.fillStyle = ground;
        ink.fillRect(x + 0.5, y + 0.5, cell - 1, cell - 1);
        // The square root makes small confusions visible.
        ink.globalAlpha = Math.sqrt(value / 100);
        ink.fillStyle = t === p ? accent : bad;
        ink.fillRect(x + 0.5, y + 0.5, cell - 1, cell - 1);
        ink.globalAlpha = 1;
        if (cell >= 26 && value >= 1) {
          ink.fillStyle = value > 35 ? over : text;
          ink.textAlign = "center";
          ink.font = "10.5px system-ui, sans-serif";
          ink.fillText(value >= 99.5 ? "100" : value.toFixed(0), x + cell / 2, y + cell / 2);
          ink.font = font;
        }
      }),
    );
    if (at) {
      ink.strokeStyle = text;
      ink.lineWidth = 2;
      ink.strokeRect(left + cell * at[1], top + cell * at[0], cell, cell);
    }
  }

  function describe(event) {
    if (!at) {
      line.replaceChildren(h("span", { class: "muted" }, "Point at a cell; a click shows the images with most of it."));
      Report.hideTip();
      return;
    }
    const [t, p] = [used[at[0]], used[at[1]]];
    const content = () =>
      [
        swatch(t),
        h("b", {}, nameOf(t)),
        t === p ? " labelled right: " : [" labelled ", swatch(p), h("b", {}, nameOf(p)), ": "],
        `${percent(share(t, p))} % of ${by === "truth" ? "its" : "that label's"} pixels ` +
          `(${integer(record.confusion[t][p])})`,
      ].flat();
    line.replaceChildren(...content());
    if (event) Report.tip(event.clientX, event.clientY, ...content());
  }

  function move(event) {
    const { left, top, cell } = geometry;
    const bounds = canvas.getBoundingClientRect();
    const [j, i] = [
      Math.floor((event.clientX - bounds.left - left) / cell),
      Math.floor((event.clientY - bounds.top - top) / cell),
    ];
    const next = i >= 0 && j >= 0 && i < count && j < count ? [i, j] : null;
    const changed = String(next) !== String(at);
    at = next;
    if (changed) draw();
    describe(next ? event : null);
  }
  const open = () => {
    if (at) location.hash = addressOf(used[at[0]], used[at[1]]);
  };
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerleave", () => {
    at = null;
    draw();
    describe();
  });
  canvas.addEventListener("click", (event) => {
    move(event);
    Report.hideTip();
    open();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Enter") open();
    if (!step) return;
    event.preventDefault();
    at = at ? [0, 1].map((k) => Math.max(0, Math.min(count - 1, at[k] + step[k]))) : [0, 0];
    draw();
    describe();
  });
  new ResizeObserver(draw).observe(box);
  Report.onTheme(draw);
  describe();

  /** List the confusions that cost most pixels. */
  function costliest() {
    const cells = used
      .flatMap((t) => used.filter((p) => p !== t).map((p) => [t, p, record.confusion[t][p]]))
      .filter(([, , pixels]) => pixels > 0);
    cells.sort((a, b) => b[2] - a[2]);
    const wrong = cells.reduce((sum, [, , pixels]) => sum + pixels, 0);
    return h(
      "div",
      { class: "most" },
      h("h3", {}, "What costs most pixels"),
      cells
        .slice(0, 12)
        .map(([t, p, pixels]) =>
          h(
            "a",
            { class: "most-row", href: addressOf(t, p) },
            h("span", { class: "bar-name" }, swatch(t), h("span", {}, nameOf(t))),
            h("span", { class: "muted" }, "→"),
            h("span", { class: "bar-name" }, swatch(p), h("span", {}, nameOf(p))),
            h("span", { class: "number" }, `${percent((100 * pixels) / wrong)} %`),
          ),
        ),
    );
  }
  return h(
    "section",
    { class: "card" },
    h(
      "div",
      { class: "card-head" },
      h("h2", {}, "Confusion"),
      Report.segmented(
        "Percent of",
        [
          ["truth", "of the truth"],
          ["predicted", "of the prediction"],
        ],
        by,
        (value) => {
          by = value;
          draw();
          describe();
        },
      ),
    ),
    h("p", { class: "muted" }, "Rows are the truth, columns the label. The diagonal is right."),
    line,
    h("div", { class: "confusion-columns" }, box, costliest()),
  );
};
