"use strict";
/* The list of keys, opened with "?". */

Report.help = (() => {
  const { h, icon, ICONS } = Report;
  const dialog = document.getElementById("help");
  const PARTS = [
    [
      "Everywhere",
      [
        ["t", "light or dark"],
        ["?", "this list"],
        ["Esc", "one step back"],
      ],
    ],
    [
      "Lists, tabs and the confusion matrix",
      [
        ["← → ↑ ↓", "move"],
        ["Enter", "open"],
      ],
    ],
    ["One image", Report.viewer.KEYS],
  ];

  function build() {
    dialog.append(
      h(
        "button",
        { type: "button", class: "icon-button corner", "aria-label": "Close", onclick: () => dialog.close() },
        icon(ICONS.close),
      ),
      h("h2", {}, "Keys"),
      ...PARTS.map(([title, keys]) =>
        h(
          "section",
          {},
          h("h3", {}, title),
          h(
            "dl",
            { class: "facts" },
            keys.map(([key, what]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, what))),
          ),
        ),
      ),
      h(
        "p",
        { class: "muted" },
        "The address holds what is chosen: copy it to show somebody the same. Back undoes a step.",
      ),
    );
  }

  return () => {
    if (!dialog.firstChild) build();
    if (!dialog.open) dialog.showModal();
  };
})();
