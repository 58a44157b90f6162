"use strict";
/* The bank: regions that mislead most, and a map of all of them. */

Report.views.bank = (() => {
  const { h, get, percent, integer, swatch, nameOf } = Report;
  const dialog = document.getElementById("region");
  const body = h("div", { class: "trail" });
  const trail = new Report.why.Trail(body, (position) => {
    dialog.close();
    location.hash = `#/bank/image/${position}`;
  });
  let filter = "";

  /** Open a region in the dialog. */
  async function open(row) {
    if (!dialog.firstChild) {
      dialog.append(
        h(
          "button",
          { type: "button", class: "icon-button corner", "aria-label": "Close (Esc)", onclick: () => dialog.close() },
          Report.icon(Report.ICONS.close),
        ),
        body,
      );
      dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close();
      });
    }
    trail.panels = [];
    if (!dialog.open) dialog.showModal();
    await trail.step(row);
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
        view.replaceChildren(
          h("div", { class: "columns map-columns" }, Report.map(bank, open), counts(bank)),
          gallery(bank),
        );
        view.dataset.ready = "true";
      },
      () => view.replaceChildren(h("p", { class: "empty" }, "data/bank.js is missing.")),
    );
    return view;
  }

  return { title: "Bank", render, open };
})();
