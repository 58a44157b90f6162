"use strict";
/* Classes: bars of IoU, what each class is confused with, its best and worst images, and the confusion matrix. */

Report.views.classes = (() => {
  const { h, get, percent, swatch, valueOf, formatted } = Report;
  let order = "iou";
  let chosen = null;

  /** Return the labels with their figures; the IoU is null for labels in neither truth nor prediction. */
  function rows() {
    const { classes, record, measures, has_background: background } = get("summary");
    const total = record.confusion.flat().reduce((a, b) => a + b, 0);
    return classes
      .map((name, label) => ({
        label,
        name,
        iou: record.iou[name],
        precision: record.precision[name],
        recall: record.recall[name],
        figures: measures
          .filter((measure) => measure.is_per_class && valueOf(measure, record))
          .map((measure) => [measure.title, formatted(measure, valueOf(measure, record)[name])]),
        share: (100 * record.confusion[label].reduce((a, b) => a + b, 0)) / total,
      }))
      .filter((row) => background || row.label > 0);
  }

  const ORDERS = {
    iou: (a, b) => (b.iou ?? -1) - (a.iou ?? -1),
    list: (a, b) => a.label - b.label,
    share: (a, b) => b.share - a.share,
    gap: (a, b) => Math.abs((b.precision ?? 0) - (b.recall ?? 0)) - Math.abs((a.precision ?? 0) - (a.recall ?? 0)),
  };

  function bars(onChoose) {
    const list = h("div", { class: "bars", role: "listbox", "aria-label": "Classes" });
    const draw = () => {
      list.replaceChildren(
        ...rows()
          .sort(ORDERS[order])
          .map((row) =>
            h(
              "button",
              {
                type: "button",
                class: "bar-row",
                role: "option",
                "aria-selected": String(row.label === chosen),
                "data-label": row.label,
                title: [...row.figures.map((figure) => figure.join(" ")), `${percent(row.share)} % of the pixels`].join(
                  ", ",
                ),
                onclick: () => {
                  chosen = row.label;
                  mark();
                  onChoose(row.label);
                },
              },
              h("span", { class: "bar-name" }, swatch(row.label), h("span", {}, row.name)),
              h(
                "span",
                { class: "bar" },
                h("i", { style: { width: `${row.iou ?? 0}%` } }),
                row.recall === null ? null : h("b", { class: "recall", style: { left: `${row.recall}%` } }),
                row.precision === null ? null : h("b", { class: "precision", style: { left: `${row.precision}%` } }),
              ),
              h("span", { class: "number" }, percent(row.iou)),
            ),
          ),
      );
    };
    const mark = () => {
      for (const row of list.children) row.setAttribute("aria-selected", String(Number(row.dataset.label) === chosen));
    };
    queueMicrotask(() => {
      const row = list.querySelector('[aria-selected="true"]');
      if (row) list.scrollTop = row.offsetTop - list.offsetTop - list.clientHeight / 2;
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = step > 0 ? document.activeElement.nextElementSibling : document.activeElement.previousElementSibling;
      next?.focus();
    });
    draw();
    return h(
      "section",
      { class: "card" },
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, "IoU of each class"),
        Report.segmented(
          "Order of the classes",
          [
            ["iou", "IoU"],
            ["list", "list"],
            ["share", "pixels"],
            ["gap", "gap"],
          ],
          order,
          (value) => {
            order = value;
            draw();
          },
        ),
      ),
      list,
      h(
        "p",
        { class: "muted legend" },
        h("span", {}, h("i", { class: "key bar-key" }), "IoU"),
        h("span", {}, h("i", { class: "key precision" }), "precision"),
        h("span", {}, h("i", { class: "key recall" }), "recall"),
      ),
    );
  }

  function detail(label) {
    const { record, what } = get("summary");
    const row = rows().find((entry) => entry.label === label);
    const line = record.confusion[label];
    const column = record.confusion.map((counts) => counts[label]);
    const largest = (counts) =>
      counts
        .map((count, other) => [other, count])
        .filter(([other, count]) => other !== label && count > 0)
        .sort((a, b) => b[1] - a[1])
        .slice(0, 4);
    const share = (counts, total) => (total ? (100 * counts) / total : 0);
    const list = (title, entries, total, isTruth) =>
      h(
        "div",
        { class: "confused" },
        h("h3", {}, title),
        entries.length
          ? entries.map(([other, count]) =>
              h(
                "a",
                {
                  class: "chip",
                  href:
                    `#/images?sort=cell&truth=${isTruth ? label : other}` +
                    `&predicted=${isTruth ? other : label}&show=errors`,
                },
                swatch(other),
                Report.nameOf(other),
                h("b", {}, `${percent(share(count, total))} %`),
              ),
            )
          : h("p", { class: "muted" }, "nothing"),
      );
    const scores = Report.scores.all();
    const ids = scores.map((s, i) => i).filter((i) => scores[i]?.labels.get(label)?.truth > 0);
    ids.sort((a, b) => scores[a].labels.get(label).iou - scores[b].labels.get(label).iou);
    const count = Math.min(6, Math.ceil(ids.length / 2));
    const strip = (title, entries) =>
      h(
        "div",
        {},
        h("h3", {}, title),
        h(
          "div",
          { class: "strip-row small" },
          entries.map((i) => Report.views.images.tile(i, `classes`, entries, label)),
        ),
      );
    return h(
      "div",
      { class: "class-detail" },
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, swatch(label), row.name),
        h("a", { href: `#/images?sort=low&class=${label}` }, `${ids.length} image${ids.length === 1 ? "" : "s"}`),
      ),
      h(
        "dl",
        { class: "facts inline" },
        [...row.figures, ["of the pixels", `${percent(row.share)} %`]].map(([name, value]) =>
          h("div", {}, h("dt", {}, name), h("dd", {}, value)),
        ),
      ),
      h(
        "div",
        { class: "columns tight" },
        list(
          `${row.name} that was labelled as`,
          largest(line),
          line.reduce((a, b) => a + b, 0),
          true,
        ),
        list(
          `labelled ${row.name}, but is`,
          largest(column),
          column.reduce((a, b) => a + b, 0),
          false,
        ),
      ),
      ids.length
        ? strip("Lowest IoU of this class", ids.slice(0, count))
        : h("p", { class: "muted" }, `No ${what} was scored on an image that has it.`),
      ids.length > 1 ? strip("Highest IoU of this class", ids.slice(-count).reverse()) : null,
    );
  }

  function render() {
    const { record } = get("summary");
    if (!record)
      return h(
        "div",
        { class: "view" },
        h("p", { class: "empty" }, "There is no ground truth, so classes have no IoU."),
      );
    const entries = rows();
    // Choose first the class that misses most pixels.
    const missed = (row) => (row.label === 0 || row.recall === null ? -1 : row.share * (100 - row.recall));
    if (chosen === null) chosen = [...entries].sort((a, b) => missed(b) - missed(a))[0].label;
    const card = h("section", { class: "card", "aria-live": "polite" }, detail(chosen));
    const choose = (label) => card.replaceChildren(detail(label));
    return h(
      "div",
      { class: "view classes" },
      h("div", { class: "columns classes-top" }, bars(choose), card),
      Report.confusion(),
    );
  }

  return { title: "Classes", render };
})();
