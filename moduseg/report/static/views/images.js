"use strict";
/* All images: sorted by IoU, error, class or confusion, filtered by class and kind of error; as photographs, labels,
   truth or errors. What is chosen stands in the address. */

Report.views.images = (() => {
  const { h, get, percent, swatch, numbered } = Report;
  const DEFAULTS = { sort: "order", class: "", error: "", show: "labels", name: "" };
  const state = { ...DEFAULTS, truth: null, predicted: null };
  let grid = null;
  let current = [];

  /** Return the images in the chosen order, each with the figure that decides it. */
  function selection() {
    const images = get("images");
    const scores = Report.scores.all();
    const label = state.class === "" ? null : Number(state.class);
    const wanted = state.name.trim().toLowerCase();
    const figure = {
      order: (i) => i,
      id: (i) => i,
      low: (i) => iouOf(scores, i, label),
      high: (i) => iouOf(scores, i, label),
      error: (i) => (state.error ? shareOf(scores, i, state.error, label) : (scores?.[i]?.wrong ?? null)),
      score: (i) => images.scores[i],
      cell: (i) => Report.scores.cell(i, state.truth, state.predicted),
    }[state.sort];
    let list = images.ids.map((_, i) => i).filter((i) => !wanted || images.ids[i].toLowerCase().includes(wanted));
    if (label !== null) list = list.filter((i) => Report.scores.present(i).some(([present]) => present === label));
    if (state.error && scores) list = list.filter((i) => Report.scores.errorPixels(i, state.error, label) > 0);
    if (state.sort === "cell") list = list.filter((i) => figure(i) > 0);
    const sign = ["low", "score", "order", "id"].includes(state.sort) ? 1 : -1;
    const entries = list.map((index) => ({ index, value: figure(index) }));
    // Images without the figure come last, whatever the direction.
    if (state.sort === "id")
      entries.sort((a, b) => images.ids[a.index].localeCompare(images.ids[b.index], "en", { numeric: true }));
    else
      entries.sort(
        (a, b) => (a.value === null) - (b.value === null) || sign * (a.value - b.value) || a.index - b.index,
      );
    return entries;
  }

  function shareOf(scores, i, kind, label) {
    return scores?.[i] ? (100 * Report.scores.errorPixels(i, kind, label)) / scores[i].total : null;
  }

  function iouOf(scores, i, label) {
    if (!scores?.[i]) return null;
    return label === null ? scores[i].miou : (scores[i].labels.get(label)?.iou ?? null);
  }

  /**
   * Make a tile of an image.
   * @param {number} index @param {string} tab where the viewer returns to @param {number[]} list what it steps through
   * @param {?number} label whose IoU is shown in place of the mean
   */
  function tile(index, tab, list, label = null, show = "labels", value = null) {
    const images = get("images");
    const score = Report.scores.all()?.[index];
    const figure = iouOf(Report.scores.all(), index, label);
    const canvas = h("canvas", { hidden: true });
    const frame = h(
      "span",
      { class: "frame" },
      images.photographs[index]
        ? h("img", {
            src: `photos/${numbered(index)}.jpg`,
            alt: "",
            decoding: "async",
            draggable: "false",
            onload: firstPicture,
          })
        : h("span", { class: "no-photo" }, "no photograph"),
      canvas,
    );
    if (show !== "photo") paint(canvas, index, show);
    const labels = Report.scores
      .present(index)
      .filter(([l]) => l > 0)
      .slice(0, 6);
    return h(
      "a",
      {
        class: "tile",
        href: Report.address.ofImage(tab, index),
        "data-index": index,
        onclick: () => {
          Report.views.images.list = list;
        },
        "aria-label": `${images.ids[index]}${figure === null ? "" : `, IoU ${percent(figure)} percent`}`,
      },
      frame,
      h(
        "span",
        { class: "caption" },
        h(
          "span",
          { class: "figure" },
          value ??
            (score || figure !== null
              ? percent(figure)
              : images.scores[index] === null
                ? "–"
                : images.scores[index].toFixed(2)),
        ),
        h(
          "span",
          { class: "labels", title: labels.map(([l]) => Report.nameOf(l)).join(", ") },
          labels.map(([l]) => swatch(l)),
        ),
        h("small", {}, images.ids[index]),
      ),
    );
  }

  function firstPicture() {
    if (!performance.getEntriesByName("first-picture").length) performance.mark("first-picture");
  }

  async function paint(canvas, index, show) {
    const maps = await Report.codec.mapsOf(index);
    if (show === "errors" ? !maps.truth : !maps[show]) return;
    if (show === "errors") Report.paint.errors(canvas, maps.truth, maps.labels);
    else Report.paint.labels(canvas, maps[show]);
    canvas.hidden = false;
  }

  function refresh() {
    current = selection();
    if (Report.address.read().tab === "images")
      Report.address.change(Object.fromEntries(Object.keys(DEFAULTS).map((key) => [key, differing(key)])));
    const indices = current.map((entry) => entry.index);
    Report.views.images.list = indices;
    grid.make = ({ index, value }) =>
      tile(
        index,
        "images",
        indices,
        state.class === "" ? null : Number(state.class),
        state.show,
        state.sort === "cell"
          ? `${Report.integer(value)} px`
          : state.sort === "error" && value !== null
            ? `${percent(value)} % ${state.error || "wrong"}`
            : null,
      );
    grid.show(current);
    const legend = document.getElementById("errors-legend");
    if (legend) legend.hidden = state.show !== "errors";
    const note = document.getElementById("image-count");
    if (note) note.textContent = `${Report.integer(current.length)} of ${Report.integer(get("images").ids.length)}`;
  }

  const differing = (key) => (state[key] === DEFAULTS[key] ? "" : state[key]);

  /** Save the images of the list, in its order, with their figures. */
  function download() {
    const scores = Report.scores.all();
    const label = state.class === "" ? null : Number(state.class);
    const figure = (value) => (value === null || value === undefined ? "" : value.toFixed(4));
    const rows = current.map(({ index }) => [
      get("images").ids[index],
      figure(scores?.[index]?.miou),
      figure(scores?.[index]?.wrong),
      ...(label === null ? [] : [figure(iouOf(scores, index, label))]),
      Report.scores
        .present(index)
        .filter(([present]) => present > 0)
        .map(([present]) => Report.nameOf(present))
        .join(";"),
    ]);
    const head = ["image", "miou", "wrong_percent", ...(label === null ? [] : ["class_iou"]), "classes"];
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    Report.save("images.csv", [head, ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n", "text/csv");
  }

  function render(query) {
    const summary = get("summary");
    const scored = Boolean(Report.scores.all());
    Object.assign(state, DEFAULTS, { show: state.show }, { truth: null, predicted: null });
    for (const key of Object.keys(DEFAULTS)) if (query.has(key)) state[key] = query.get(key);
    for (const key of ["truth", "predicted"]) if (query.has(key)) state[key] = Number(query.get(key));
    if (state.truth === null && state.sort === "cell") state.sort = "order";
    const sorts = [
      ["order", "order of the data set"],
      ["id", "name"],
    ];
    if (scored)
      sorts.push(["low", "IoU, lowest first"], ["high", "IoU, highest first"], ["error", "error, most first"]);
    if (get("images").scores.some((s) => s !== null)) sorts.push(["score", "score, lowest first"]);
    if (state.truth !== null)
      sorts.push(["cell", `${Report.nameOf(state.truth)} labelled ${Report.nameOf(state.predicted)}`]);
    if (!sorts.some(([value]) => value === state.sort)) state.sort = "order";
    const choice = (name, key, options) =>
      h(
        "select",
        {
          "aria-label": name,
          "data-key": key,
          onchange: (event) => {
            state[key] = event.target.value;
            refresh();
          },
        },
        options.map(([value, text]) => h("option", { value, selected: value === String(state[key]) }, text)),
      );
    const present = new Set(get("images").ids.flatMap((_, i) => Report.scores.present(i).map(([label]) => label)));
    const classes = [
      ["", "all classes"],
      ...summary.classes.map((name, label) => [String(label), name]).filter(([label]) => present.has(Number(label))),
    ];
    const shows = [
      ["photo", "photograph"],
      ["labels", summary.what],
      ...(scored
        ? [
            ["truth", "truth"],
            ["errors", "errors"],
          ]
        : []),
    ];
    if (!shows.some(([value]) => value === state.show)) state.show = "photo";
    grid = new Report.Grid(() => h("span"), { label: "Images", ratio: Report.ratio });
    const view = h(
      "div",
      { class: "view images" },
      h(
        "div",
        { class: "toolbar" },
        choice("Sort by", "sort", sorts),
        choice("Class", "class", classes),
        scored
          ? choice("Error", "error", [
              ["", "right and wrong"],
              ["missed", "with missed pixels"],
              ["extra", "with extra pixels"],
              ["confused", "with confused pixels"],
            ])
          : null,
        Report.segmented("Show", shows, state.show, (value) => {
          state.show = value;
          refresh();
        }),
        h("input", {
          type: "search",
          placeholder: "name",
          "aria-label": "Find by name",
          value: state.name,
          oninput: (event) => {
            state.name = event.target.value;
            refresh();
          },
        }),
        h(
          "button",
          {
            type: "button",
            class: "button small",
            title: "The list as it is shown, as a table (CSV)",
            onclick: download,
          },
          "CSV",
        ),
        h("span", { id: "image-count", class: "muted", "aria-live": "polite" }),
      ),
      scored
        ? h(
            "p",
            { class: "legend errors-legend", id: "errors-legend" },
            Report.paint.ERRORS.map(([name, hex, what]) =>
              h("span", { title: what }, h("i", { class: "key", style: { "--c": hex } }), name),
            ),
          )
        : null,
      grid.element,
    );
    queueMicrotask(refresh);
    return view;
  }

  return { title: "Images", render, tile, iouOf, list: [] };
})();
