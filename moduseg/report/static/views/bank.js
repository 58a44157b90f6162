"use strict";
/* The bank: regions that mislead most, and a map of all of them. */

Report.views.bank = (() => {
  const { h, get, percent, integer, swatch, nameOf } = Report;
  const dialog = document.getElementById("region");
  const body = h("div", { class: "trail" });
  const trail = new Report.why.Trail(body, (position) =>
    Report.address.change({ rows: "" }, { image: position, isStep: true }),
  );
  let filter = "";

  const open = (row) => Report.address.change({ rows: row }, { isStep: true });

  function build() {
    dialog.append(
      h(
        "button",
        { type: "button", class: "icon-button corner", "aria-label": "Close", onclick: () => dialog.close() },
        Report.icon(Report.ICONS.close),
      ),
      body,
    );
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
    dialog.addEventListener("keydown", (event) => {
      const back = body.querySelector(".back");
      if (event.key !== "Escape" || !back) return;
      event.preventDefault();
      back.click();
    });
    dialog.addEventListener("close", () => {
      if (Report.address.read().image === null) Report.address.change({ rows: "" });
    });
  }

  /** Show the last of `rows`, regions that were opened one after the other, in the dialog; none closes it. */
  async function follow(rows) {
    if (!dialog.firstChild) build();
    if (!rows.length) {
      dialog.close();
      return;
    }
    if (!dialog.open) dialog.showModal();
    await trail.show(rows, () => null, rows.length > 1 ? { rows: rows.slice(0, -1).join(".") } : null);
  }

  function gallery(bank) {
    const grid = h("div", { class: "region-grid large" });
    let shown = 32;
    const more = h("button", {
      type: "button",
      class: "button more",
      onclick: () => {
        shown = Infinity;
        draw();
      },
    });
    const labels = [...new Set(bank.worst.map((entry) => bank.labels[entry.row]))].sort((a, b) => a - b);
    const draw = () => {
      const entries = bank.worst.filter((entry) => filter === "" || bank.labels[entry.row] === Number(filter));
      more.hidden = entries.length <= shown;
      more.textContent = `Show all ${entries.length}`;
      grid.replaceChildren(
        ...entries
          .slice(0, shown)
          .map((entry) =>
            Report.why.card(
              entry.row,
              h(
                "span",
                { class: "guilt" },
                h("b", {}, `${integer(entry.wrong)} px wrong`),
                h(
                  "span",
                  { class: "muted" },
                  `${percent((100 * entry.wrong) / (entry.wrong + entry.right), 0)} % of its votes`,
                ),
                entry.truth.length
                  ? h("span", { class: "muted" }, "was ", swatch(entry.truth[0][0]), nameOf(entry.truth[0][0]))
                  : null,
              ),
              open,
            ),
          ),
      );
    };
    draw();
    return h(
      "section",
      { class: "card" },
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, "Regions that mislead most"),
        h(
          "select",
          {
            "aria-label": "Class of the regions",
            onchange: (event) => {
              filter = event.target.value;
              draw();
            },
          },
          h("option", { value: "" }, "all classes"),
          labels.map((label) =>
            h("option", { value: String(label), selected: String(label) === filter }, nameOf(label)),
          ),
        ),
      ),
      h(
        "p",
        { class: "muted" },
        "Pixels that were labelled wrong, shared among the neighbours that voted so. " +
          "Their pseudo masks are the first to look at.",
      ),
      bank.worst.length
        ? [grid, more]
        : h(
            "p",
            { class: "empty" },
            get("summary").record ? "No region misled." : "Without ground truth nobody knows which regions mislead.",
          ),
    );
  }

  /** List the regions that the lasso holds, with what to say of all of them. */
  function list(place, rows) {
    place.hidden = rows.length === 0;
    if (!rows.length) return;
    place.replaceChildren(
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, `${integer(rows.length)} region${rows.length === 1 ? "" : "s"} inside the line`),
        Report.corrections.control(rows),
      ),
      h(
        "div",
        { class: "region-grid large" },
        rows.slice(0, 120).map((row) => Report.why.card(row, null, open)),
      ),
      rows.length > 120 ? h("p", { class: "muted" }, `${integer(rows.length - 120)} more are not drawn.`) : "",
    );
  }

  function counts(bank) {
    const { classes } = get("summary");
    const rows = classes.map((_, label) => [label, 0, 0]);
    bank.labels.forEach((label, row) => {
      rows[label][1] += 1;
      rows[label][2] += bank.searched[row] ? 1 : 0;
    });
    const maxCount = Math.max(...rows.map(([, count]) => count));
    return h(
      "section",
      { class: "card" },
      h("h2", {}, `${integer(bank.rows)} regions`),
      h("p", { class: "muted" }, "Of each class; the light part are outliers, left out of the search."),
      h(
        "div",
        { class: "bars" },
        rows
          .filter(([, count]) => count)
          .map(([label, count, searched]) =>
            h(
              "div",
              { class: "bar-row plain" },
              h("span", { class: "bar-name" }, swatch(label), h("span", {}, nameOf(label))),
              h(
                "span",
                { class: "bar" },
                h("i", { class: "faint", style: { width: `${(100 * count) / maxCount}%` } }),
                h("i", { style: { width: `${(100 * searched) / maxCount}%` } }),
              ),
              h("span", { class: "number" }, integer(count)),
            ),
          ),
      ),
    );
  }

  function render() {
    const view = h("div", { class: "view bank" }, h("p", { class: "empty" }, "Opening the bank …"));
    Report.why.open().then(
      (bank) => {
        const selection = h("section", { class: "card selection", hidden: true, "aria-live": "polite" });
        view.replaceChildren(
          h(
            "div",
            { class: "columns map-columns" },
            Report.map(bank, open, (rows) => list(selection, rows)),
            counts(bank),
          ),
          selection,
          Report.corrections.card(open),
          gallery(bank),
        );
        view.dataset.ready = "true";
      },
      () => view.replaceChildren(h("p", { class: "empty" }, "data/bank.js is missing.")),
    );
    return view;
  }

  return { title: "Bank", render, follow };
})();
