"use strict";
/* Corrections of the bank's labels, collected here and applied by `bank apply`. They last as long as the tab. */

Report.corrections = (() => {
  const { h, get, swatch, nameOf } = Report;
  const listeners = new Set();
  let bank = null;
  let entries = new Map();

  const key = () => `moduseg-corrections-${bank.digest}`;

  /** Take the corrections of this bank that the tab still has. */
  function open(opened) {
    bank = opened;
    try {
      entries = new Map(JSON.parse(sessionStorage.getItem(key())) ?? []);
    } catch {
      entries = new Map(); // private windows keep nothing
    }
  }

  function changed() {
    try {
      sessionStorage.setItem(key(), JSON.stringify([...entries]));
    } catch {
      /* private windows keep nothing */
    }
    for (const listener of listeners) listener();
  }

  /** Say what a region is: a label, `null` to remove it, `undefined` if it was right after all. */
  function set(rows, label) {
    for (const row of rows) {
      if (label === undefined || label === bank.labels[row]) entries.delete(row);
      else entries.set(row, label);
    }
    changed();
  }

  /** Make the control that says what some regions are. */
  function control(rows) {
    const labels = get("summary").classes.map((_, label) => label);
    const first = entries.get(rows[0]);
    const isSame = rows.every((row) => entries.get(row) === first);
    const chosen = !isSame || first === undefined ? "" : first === null ? "remove" : String(first);
    const select = h(
      "select",
      {
        "aria-label": "Wrong label",
        class: "correct",
        onchange: ({ target: { value } }) =>
          set(rows, value === "" ? undefined : value === "remove" ? null : Number(value)),
      },
      h("option", { value: "" }, "label is right"),
      h("option", { value: "remove", selected: chosen === "remove" }, "wrong: remove from the bank"),
      labels.map((label) =>
        h("option", { value: String(label), selected: chosen === String(label) }, `wrong: is ${nameOf(label)}`),
      ),
    );
    return h("label", { class: "row correct-row" }, rows.length > 1 ? `these ${rows.length}` : null, select);
  }

  /** Return the text of the file that `bank apply` reads. */
  function text() {
    const list = [...entries]
      .sort((a, b) => a[0] - b[0])
      .map(([row, label]) => ({
        row,
        image: bank.ids[bank.image[row]],
        before: bank.names[bank.labels[row]],
        after: label === null ? null : bank.names[label],
      }));
    return JSON.stringify({ version: 1, bank: bank.digest, corrections: list }, null, 2);
  }

  /** Make the card that lists the corrections, saves them, and says what to do with them. */
  function card(onOpen) {
    const box = h("section", { class: "card corrections", "aria-live": "polite" });
    const draw = () => {
      box.hidden = entries.size === 0;
      box.replaceChildren(
        h(
          "div",
          { class: "card-head" },
          h("h2", {}, `${entries.size} correction${entries.size === 1 ? "" : "s"}`),
          h(
            "div",
            { class: "row" },
            h(
              "button",
              {
                type: "button",
                class: "button small",
                onclick: () => Report.save("corrections.json", text(), "application/json"),
              },
              "Save corrections.json",
            ),
            h(
              "button",
              {
                type: "button",
                class: "button small",
                onclick: () => {
                  entries.clear();
                  changed();
                },
              },
              "Forget them",
            ),
          ),
        ),
        h("p", { class: "muted" }, "Then, for a bank of its own with these labels:"),
        h("pre", {}, `python scripts/bank.py apply bank=${bank.path} ` + "corrections=corrections.json out=corrected"),
        h(
          "div",
          {},
          [...entries].map(([row, label]) =>
            h(
              "button",
              { type: "button", class: "chip", onclick: () => onOpen(row) },
              swatch(bank.labels[row]),
              nameOf(bank.labels[row]),
              " → ",
              label === null ? "removed" : [swatch(label), nameOf(label)],
            ),
          ),
        ),
      );
    };
    listeners.clear();
    listeners.add(draw);
    draw();
    return box;
  }

  return { open, set, control, card, text };
})();
