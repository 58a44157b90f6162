"use strict";
/* One image: its layers, its figures, and why each proposal has its label. `KEYS` lists its keys. */

Report.viewer = (() => {
  const { h, get, icon, ICONS, percent, swatch, nameOf, numbered } = Report;
  const dialog = document.getElementById("viewer");
  const KEYS = [
    ["← →", "other image"],
    ["1 … 7", "layer"],
    ["space", "hide the layer"],
    ["o", "outlines"],
    ["+ − 0", "zoom"],
    ["Esc", "one step back"],
  ];
  const state = { layer: "labels", opacity: 0.65, outlines: false, heat: null };
  let index = -1;
  let maps = null;
  let why = null;
  let heat = null;
  let picked = { at: -1, candidates: [], turn: 0 };
  let chosen = null;
  let parts = null;

  const names = () => {
    const { compare, what, heat: title } = get("summary");
    return {
      photo: "photograph",
      proposals: "proposals",
      pseudo: "pseudo mask",
      heat: title,
      labels: what,
      confidence: "confidence",
      truth: "truth",
      errors: "errors",
      first: compare?.first,
      second: compare?.second,
    };
  };

  function build() {
    const { compare } = get("summary");
    const readout = h("p", { class: "readout", "aria-live": "off" });
    const trailPlace = h("div", { class: "trail" });
    const trail = new Report.why.Trail(trailPlace, (position) =>
      Report.address.change({ proposal: "", rows: "" }, { image: position, isStep: true }),
    );
    const options = (title, other) => ({
      title,
      onMove: (point) => hover(point, readout),
      onPick: (point) => pick(point),
      onView: (view) => {
        const follower = parts.canvases[other];
        if (follower) follower.set(view, true);
      },
    });
    const canvases = compare
      ? [new Report.ImageCanvas(options(compare.first, 1)), new Report.ImageCanvas(options(compare.second, 0))]
      : [new Report.ImageCanvas(options("", 1))];
    const layers = h("div", { class: "layers" });
    const classes = h("div", { class: "heat-classes", hidden: true });
    const slider = h("input", {
      type: "range",
      min: "0",
      max: "100",
      value: String(100 * state.opacity),
      "aria-label": "Opacity of the layer",
      oninput: (event) => {
        state.opacity = event.target.value / 100;
        opacity();
      },
    });
    const outlines = h(
      "button",
      {
        type: "button",
        class: "icon-button",
        "aria-pressed": String(state.outlines),
        title: "Outlines of the proposals (o)",
        "aria-label": "Outlines of the proposals",
        onclick: toggleOutlines,
      },
      icon(ICONS.outline),
    );
    const button = (name, path, action, id) =>
      h(
        "button",
        { type: "button", class: "icon-button", title: name, "aria-label": name, onclick: action, id },
        icon(path),
      );
    const title = h("div", { class: "viewer-title" });
    const figures = h("div", { class: "figures" });
    parts = { canvases, layers, classes, slider, outlines, title, figures, trail, readout };
    dialog.replaceChildren(
      h(
        "header",
        { class: "viewer-head" },
        button("Previous image (←)", ICONS.left, () => step(-1), "previous"),
        button("Next image (→)", ICONS.right, () => step(1), "next"),
        title,
        button("Close (Esc)", ICONS.close, close, "close"),
      ),
      h(
        "div",
        { class: "viewer-body" },
        h(
          "div",
          { class: "viewer-left" },
          h(
            "div",
            { class: `canvases${compare ? " two" : ""}` },
            canvases.map((canvas) => canvas.element),
          ),
          h(
            "div",
            { class: "viewer-tools" },
            layers,
            classes,
            h(
              "div",
              { class: "tool-group" },
              h("label", { class: "slider" }, h("span", {}, "opacity"), slider),
              outlines,
              button("Zoom in (+)", ICONS.plus, () => canvases[0].zoom(1.5)),
              button("Zoom out (−)", ICONS.minus, () => canvases[0].zoom(1 / 1.5)),
              button("Show all (0)", ICONS.fit, () => canvases[0].zoom(0)),
            ),
          ),
          readout,
        ),
        h(
          "aside",
          { class: "viewer-side" },
          figures,
          trailPlace,
          h(
            "p",
            { class: "keys" },
            KEYS.map(([key, what]) => h("span", {}, h("kbd", {}, key), what)),
          ),
        ),
      ),
    );
  }

  async function show(position) {
    if (!parts) build();
    if (!dialog.open) dialog.showModal();
    if (position === index) {
      if (maps) await follow();
      return;
    }
    index = position;
    chosen = null;
    [maps, why, heat] = [null, null, null];
    picked = { at: -1, candidates: [], turn: 0 };
    const images = get("images");
    const list = Report.views.images.list;
    const rank = list.indexOf(index);
    const score = Report.scores.all()?.[index];
    const second = Report.scores.all("second")?.[index];
    parts.title.replaceChildren(
      h("b", {}, images.ids[index]),
      h(
        "span",
        { class: "muted" },
        [
          rank < 0 ? null : `${rank + 1} of ${list.length}`,
          `${images.sizes[index][1]} × ${images.sizes[index][0]}`,
          images.proposals[index] === null ? null : `${images.proposals[index]} proposals`,
        ]
          .filter(Boolean)
          .join(" · "),
      ),
    );
    parts.figures.replaceChildren(...table(score, second));
    const [height, width] = images.sizes[index];
    for (const canvas of parts.canvases)
      canvas.show(width, height, images.photographs[index] ? `photos/${numbered(index)}.jpg` : null);
    parts.trail.clear();
    const wanted = index;
    const loaded = await Report.codec.mapsOf(wanted).catch(() => null);
    const reasons = images.proposals[wanted] === null ? null : await reasonsOf(wanted).catch(() => null);
    const scored = images.heat[wanted] ? await Report.codec.mapsOf(wanted, "heat").catch(() => null) : null;
    if (wanted !== index) return;
    if (!loaded) {
      parts.trail.clear(h("p", { class: "empty" }, "The label maps of this image are missing."));
      return;
    }
    [maps, why, heat] = [loaded, reasons, scored];
    for (const canvas of parts.canvases)
      canvas.show(
        maps.labels.width,
        maps.labels.height,
        images.photographs[index] ? `photos/${numbered(index)}.jpg` : null,
      );
    const available = [
      "photo",
      ...(why?.maps.length ? ["proposals"] : []),
      ...(maps.pseudo ? ["pseudo"] : []),
      ...(heat ? ["heat"] : []),
      "labels",
      ...(maps.confidence ? ["confidence"] : []),
      ...(maps.truth ? ["truth", "errors"] : []),
    ];
    parts.available = available;
    const asked = Report.address.read().query.get("layer");
    if (available.includes(asked)) state.layer = asked;
    if (!available.includes(state.layer)) state.layer = "labels";
    parts.choice = Report.segmented(
      "Layer",
      available.map((key) => [key, names()[key]]),
      state.layer,
      (value) => {
        setLayer(value);
      },
    );
    parts.layers.replaceChildren(parts.choice);
    parts.classes.replaceChildren(heatClasses());
    parts.outlines.hidden = !why?.maps.length;
    draw();
    if (state.outlines) drawOutlines();
    await follow();
    dialog.dispatchEvent(new CustomEvent("shown", { detail: index }));
  }

  function setLayer(layer) {
    state.layer = layer;
    Report.address.change({ layer });
    draw();
  }

  /** Show what the address names beside the image: a proposal, a bank region that voted, else the list of regions. */
  async function follow() {
    const { query } = Report.address.read();
    const rows = Report.address.rows();
    const number = query.has("proposal") ? Number(query.get("proposal")) : null;
    const proposal = why && number >= 0 && number < why.area.length ? number : null;
    const layer = query.get("layer");
    if (parts.available.includes(layer) && layer !== state.layer) {
      state.layer = layer;
      parts.choice.choose(layer);
      draw();
    }
    if (proposal !== chosen) {
      for (const canvas of parts.canvases) canvas.mark("chosen", proposal === null ? null : inside(proposal));
      if (proposal === null) picked.candidates = [];
      mark();
    }
    const isNew = proposal !== null && proposal !== chosen;
    chosen = proposal;
    const above = rows.length ? { rows: rows.slice(0, -1).join(".") } : proposal === null ? null : { proposal: "" };
    await parts.trail.show(
      rows,
      (onOpen) => (proposal === null ? regions() : Report.why.proposal(why, proposal, onOpen)),
      above,
    );
    if (isNew) dialog.dispatchEvent(new CustomEvent("chosen", { detail: proposal }));
  }

  /** Make the choice of the class whose scores are shown; the one of the image before stays, where it is scored. */
  function heatClasses() {
    const labels = Object.keys(heat ?? {});
    if (!labels.includes(state.heat)) state.heat = labels.find((label) => label !== "0") ?? labels[0] ?? null;
    return Report.segmented(
      "Class of the scores",
      labels.map((label) => [label, nameOf(Number(label))]),
      state.heat,
      (label) => {
        state.heat = label;
        draw();
      },
    );
  }

  /** List the regions of the image as buttons, large ones first, so that no pointer is needed. */
  function regions() {
    if (!why?.label)
      return h(
        "p",
        { class: "muted" },
        get("summary").why && why ? "The vectors of this run are not stored, so nobody knows why." : "",
      );
    const list = [...why.kept]
      .filter((i) => why.layer[i] >= 0)
      .sort((a, b) => (why.label[a] === 0) - (why.label[b] === 0) || why.area[b] - why.area[a]);
    return h(
      "div",
      {},
      h("p", { class: "hint muted" }, "Click a region of the image, or one of these, to see why it has its label."),
      h(
        "div",
        { class: "regions" },
        list.slice(0, 40).map((i) =>
          h(
            "button",
            {
              type: "button",
              class: "chip",
              "data-proposal": i,
              onclick: () => choose(i),
              onpointerenter: () => mark(i),
              onpointerleave: () => mark(),
              onfocus: () => mark(i),
              onblur: () => mark(),
            },
            swatch(why.label[i]),
            nameOf(why.label[i]),
            h("b", {}, why.score[i].toFixed(2)),
          ),
        ),
      ),
    );
  }

  function mark(proposal) {
    for (const canvas of parts.canvases) {
      canvas.hovered = proposal;
      canvas.mark("hover", proposal === undefined ? null : inside(proposal));
    }
  }

  /** Load and decode the proposals of an image with their id maps. */
  async function reasonsOf(position) {
    const content = await Report.load(`why/${numbered(position)}`);
    if (!content.decoded) {
      const layers = await Promise.all(content.layers.map(Report.codec.labelMap));
      const codes = layers.map(() => new Int32Array(256).fill(-1));
      content.layer.forEach((layer, i) => {
        if (layer >= 0) codes[layer][content.code[i]] = i;
      });
      Object.defineProperty(content, "decoded", { value: { ...content, maps: layers, codes } });
    }
    return content.decoded;
  }

  function table(score, second) {
    if (!score) {
      return [
        h(
          "div",
          { class: "label-list" },
          Report.scores
            .present(index)
            .map(([label, pixels]) =>
              h("span", { class: "chip" }, swatch(label), nameOf(label), h("b", {}, Report.integer(pixels))),
            ),
        ),
      ];
    }
    const labels = [...score.labels].sort((a, b) => b[1].truth - a[1].truth || b[1].predicted - a[1].predicted);
    return [
      h(
        "p",
        { class: "image-score" },
        h(
          "span",
          {},
          "mIoU ",
          h("b", {}, percent(score.miou)),
          second ? h("span", {}, " → ", h("b", {}, percent(second.miou))) : null,
        ),
        h("span", { class: "muted" }, `${percent(score.wrong)} % of the pixels wrong`),
      ),
      h(
        "div",
        { class: "label-table" },
        labels.map(([label, value]) =>
          h(
            "button",
            {
              type: "button",
              class: "label-row",
              title: `${Report.integer(value.truth)} pixels in the truth, ${Report.integer(value.predicted)} predicted`,
              onpointerenter: () => isolate(label),
              onpointerleave: () => isolate(null),
              onfocus: () => isolate(label),
              onblur: () => isolate(null),
            },
            h("span", { class: "bar-name" }, swatch(label), h("span", {}, nameOf(label))),
            h("span", { class: "bar" }, h("i", { style: { width: `${value.iou}%` } })),
            h(
              "span",
              { class: "number" },
              value.truth ? percent(value.iou) : "–",
              second ? h("small", { class: "muted" }, ` ${percent(second.labels.get(label)?.iou ?? null)}`) : null,
            ),
          ),
        ),
      ),
    ];
  }

  /** Paint one label alone while its row is pointed at; `null` paints all. */
  function isolate(label) {
    if (!maps || !["labels", "truth", "pseudo", "heat"].includes(state.layer)) return;
    draw(label);
  }

  function draw(only = null) {
    const layer = state.layer;
    parts.canvases.forEach((view, number) => {
      const canvas = view.layer;
      const prediction = number === 1 && maps.second ? maps.second : maps.labels;
      canvas.hidden = layer === "photo";
      canvas.classList.toggle("smooth", layer === "heat");
      if (layer === "proposals") Report.paint.proposals(canvas, why.maps, why);
      else if (layer === "errors") Report.paint.errors(canvas, maps.truth, prediction);
      else if (layer === "heat") Report.paint.heat(canvas, heat[only] ?? heat[state.heat]);
      else if (layer === "confidence") Report.paint.confidence(canvas, maps.confidence);
      else if (layer !== "photo") Report.paint.labels(canvas, layer === "labels" ? prediction : maps[layer], only);
    });
    opacity();
  }

  function opacity() {
    parts.classes.hidden = state.layer !== "heat";
    for (const canvas of parts.canvases) canvas.layer.style.opacity = state.opacity;
    parts.slider.value = String(Math.round(100 * state.opacity));
    parts.slider.disabled = state.layer === "photo";
  }

  function toggleOutlines() {
    state.outlines = !state.outlines;
    parts.outlines.setAttribute("aria-pressed", String(state.outlines));
    drawOutlines();
  }

  function drawOutlines() {
    for (const canvas of parts.canvases) {
      if (state.outlines && why?.maps.length) Report.paint.borders(canvas.lines, why.maps);
      canvas.lines.hidden = !(state.outlines && why?.maps.length);
    }
  }

  /** Return the proposals at a pixel: first the one that decided it, then the others, small ones first. */
  function candidates(at) {
    if (!why) return [];
    const here = why.maps
      .map((map, layer) => why.codes[layer][map.ids[at]])
      .filter((i) => i >= 0)
      .sort((a, b) => why.area[a] - why.area[b]);
    if (!why.kept) return here;
    const rankOf = (i) => why.kept.indexOf(i);
    const remaining = here
      .filter((i) => rankOf(i) >= 0)
      .sort((a, b) => (why.label[a] === 0) - (why.label[b] === 0) || rankOf(a) - rankOf(b));
    // If proposals decide by majority, the best one with the winning label represents them.
    const decisive = remaining.find((i) => why.label[i] === maps?.labels.ids[at]) ?? remaining[0];
    return [...(decisive === undefined ? [] : [decisive]), ...here.filter((i) => i !== decisive)];
  }

  const inside = (proposal) => (i) => why.codes[why.layer[proposal]][why.maps[why.layer[proposal]].ids[i]] === proposal;

  function hover(point, readout) {
    if (!maps) return;
    const first = point ? candidates(point.at)[0] : undefined;
    if (parts.canvases[0].hovered !== first) mark(first);
    if (!point) {
      readout.replaceChildren();
      return;
    }
    const entry = (name, map) =>
      map ? h("span", {}, `${name} `, swatch(map.ids[point.at]), nameOf(map.ids[point.at])) : null;
    const all = names();
    readout.replaceChildren(
      ...[
        maps.second ? entry(all.first, maps.labels) : entry(all.labels, maps.labels),
        entry(all.second, maps.second),
        entry("truth", maps.truth),
        entry("pseudo mask", maps.pseudo),
        heat && state.layer === "heat"
          ? h("span", {}, `${all.heat} `, swatch(Number(state.heat)), (heat[state.heat].ids[point.at] / 255).toFixed(2))
          : null,
        maps.confidence
          ? h("span", {}, `confidence ${Math.round((100 * maps.confidence.ids[point.at]) / 255)} %`)
          : null,
      ].filter(Boolean),
    );
  }

  /** Choose the proposal at a pixel; further clicks at the same pixel choose those below, in turn. */
  function pick(point) {
    const proposals = candidates(point.at);
    if (!proposals.length) return;
    const same = proposals.join() === picked.candidates.join();
    picked = { candidates: proposals, turn: same ? (picked.turn + 1) % proposals.length : 0 };
    choose(proposals[picked.turn]);
  }

  /** Choose a proposal. The first one is a step that Back undoes; another takes its place. */
  function choose(proposal) {
    if (chosen === null) Report.address.change({ proposal, rows: "" }, { isStep: true });
    else {
      Report.address.change({ proposal, rows: "" });
      follow();
    }
  }

  function go(position) {
    Report.address.change({ proposal: "", rows: "" }, { image: position });
    show(position);
  }
  function step(by) {
    const list = Report.views.images.list.length ? Report.views.images.list : get("images").ids.map((_, i) => i);
    const at = list.indexOf(index);
    go(list[(at + by + list.length) % list.length]);
  }
  function close() {
    dialog.close();
  }

  dialog.addEventListener("close", () => {
    index = -1;
    const { tab, image } = Report.address.read();
    const part = Report.address.ofPart();
    if (image !== null) location.hash = `#/${tab}${part ? `?${part}` : ""}`;
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) close();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !parts) return;
    const typing = event.target.matches("input[type=range], select");
    if (event.key === "Escape" && parts.trail.place.querySelector(".back")) {
      event.preventDefault();
      parts.trail.place.querySelector(".back").click();
      return;
    }
    const actions = {
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      o: toggleOutlines,
      "+": () => parts.canvases[0].zoom(1.5),
      "=": () => parts.canvases[0].zoom(1.5),
      "-": () => parts.canvases[0].zoom(1 / 1.5),
      0: () => parts.canvases[0].zoom(0),
    };
    if (typing && event.key.startsWith("Arrow")) return;
    if (event.key === " " && !event.target.matches("button") && !event.repeat) {
      event.preventDefault();
      for (const canvas of parts.canvases) canvas.layer.style.opacity = 0;
    } else if (/^[1-7]$/.test(event.key) && parts.available?.[event.key - 1]) {
      parts.choice.choose(parts.available[event.key - 1]);
      setLayer(parts.available[event.key - 1]);
    } else if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  dialog.addEventListener("keyup", (event) => {
    if (event.key === " " && parts && !event.target.matches("button")) opacity();
  });

  return {
    KEYS,
    show,
    close,
    get open() {
      return dialog.open;
    },
  };
})();
