"use strict";
/* All methods side by side: a table that is sorted by a click on its head, quality against time, and which differ. */

Report.views.methods = (() => {
  const { h, get, percent, signed } = Report;
  const ALL = "all forms";
  let sorted = { key: null, isDown: true };

  const minutes = (seconds) => (seconds === null ? null : seconds / 60);
  /** Return a number of parameters in a few characters. */
  function count(number) {
    if (number === null) return "–";
    return number >= 100000 ? `${(number / 1e6).toFixed(1)} M` : number.toLocaleString("en");
  }

  /* Columns of the table: title, what it is sorted by, what is shown, what the pointer is told. */
  const COLUMNS = [
    { title: "method", value: (row) => row.method, cell: (row) => row.method, isText: true },
    { title: "form", value: (row) => get("summary").methods.forms.indexOf(row.form), cell: (row) => row.form },
    { title: "mIoU", value: (row) => row.miou, cell: quality, note: "with its 95 % interval over the pictures" },
    {
      title: "alike",
      value: (row) => row.alike,
      cell: (row) => row.alike ?? "–",
      note: "no letter shared: they differ",
    },
    { title: "gain", value: (row) => row.gain?.difference ?? null, cell: gain, note: "from the method's first form" },
    { title: "boundary", value: (row) => row.boundary_miou, cell: (row) => percent(row.boundary_miou) },
    { title: "train", value: (row) => row.train_miou, cell: (row) => percent(row.train_miou), note: "masks of train" },
    { title: "s", value: (row) => row.wall, cell: (row) => percent(row.wall, 3), note: "seconds a picture" },
    {
      title: "CPU s",
      value: (row) => row.cpu,
      cell: (row) => percent(row.cpu, 3),
      note: "of the processor, a picture",
    },
    { title: "GB", value: (row) => row.memory, cell: (row) => percent(row.memory, 2), note: "most memory" },
    {
      title: "preparation",
      value: (row) => row.preparation_cpu,
      cell: (row) => percent(minutes(row.preparation_cpu)),
      note: "minutes of the processor, once",
    },
    { title: "trained", value: (row) => row.num_parameters, cell: (row) => count(row.num_parameters), note: "numbers" },
    { title: "tags at test", value: (row) => row.needs_tags, cell: (row) => (row.needs_tags ? "yes" : "no") },
    {
      title: "published",
      value: (row) => row.published,
      cell: (row) => percent(row.published),
      note: "another benchmark, other models",
    },
  ];

  /** Make the mIoU of a row with its interval on a track from 0 to 100; a row that was not run says why. */
  function quality(row) {
    if (row.miou === null)
      return h("span", { class: "muted", title: [...row.missing, ...row.errors].join("\n") }, row.status);
    const { worlds } = get("summary").methods;
    return h(
      "span",
      { class: "interval", title: `${percent(row.miou_low)} to ${percent(row.miou_high)}, ${row.images} pictures` },
      h(
        "span",
        { class: "bar" },
        h("i", { class: "faint", style: { width: `${row.miou}%` } }),
        row.miou_low === null
          ? null
          : h("i", {
              class: "whisker",
              style: { left: `${row.miou_low}%`, width: `calc(${row.miou_high}% - ${row.miou_low}%)` },
            }),
      ),
      h("b", {}, percent(row.miou)),
      row.num_worlds < worlds.length
        ? h("small", { class: "muted" }, ` ${row.num_worlds} of ${worlds.length} worlds`)
        : null,
    );
  }

  function gain(row) {
    if (!row.gain) return "–";
    const { difference, low, high, is_certain: isCertain } = row.gain;
    const tone = isCertain ? (difference > 0 ? "up" : "down") : "muted";
    return h("span", { class: `figure ${tone}`, title: `${signed(low)} to ${signed(high)}` }, signed(difference));
  }

  /** Return the rows of a form, sorted by the chosen column; rows without a value come last. */
  function rowsOf(form) {
    const { rows } = get("summary").methods;
    const shown = rows.filter((row) => form === ALL || row.form === form);
    if (sorted.key === null) return shown;
    const { value } = COLUMNS[sorted.key];
    const sign = sorted.isDown ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    return shown.sort((first, second) => {
      const [a, b] = [value(first) ?? null, value(second) ?? null];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * compare(a, b);
    });
  }

  function table(form) {
    const box = h("div", { class: "scrolling" });
    const draw = () => {
      const head = COLUMNS.map((column, index) => {
        const isChosen = sorted.key === index;
        const order = isChosen ? (sorted.isDown ? "descending" : "ascending") : "none";
        const sort = () => {
          sorted = { key: index, isDown: isChosen ? !sorted.isDown : !column.isText };
          draw();
        };
        const arrow = isChosen ? (sorted.isDown ? " ↓" : " ↑") : "";
        return h(
          "th",
          { "aria-sort": order, title: column.note },
          h("button", { type: "button", onclick: sort }, `${column.title}${arrow}`),
        );
      });
      const body = rowsOf(form).map((row) =>
        h(
          "tr",
          { class: row.miou === null ? "absent" : "", title: row.command },
          COLUMNS.map((column) => h("td", {}, column.cell(row))),
        ),
      );
      box.replaceChildren(h("table", { class: "methods" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
    };
    draw();
    return box;
  }

  /** Make the differences of a form's methods: row minus column, pale where the interval holds 0. */
  function differences(form) {
    const { methods: record } = get("summary");
    const entries = record.differences.filter((entry) => entry.form === form);
    if (!entries.length) return null;
    const names = record.rows
      .filter((row) => row.form === form && row.miou !== null)
      .sort((a, b) => b.miou - a.miou)
      .map((row) => row.method);
    const cell = (row, column) => {
      const entry = entries.find(({ first, second }) => first === column && second === row);
      const turned = entries.find(({ first, second }) => first === row && second === column);
      const found = entry ?? turned;
      if (!found) return h("td", {}, row === column ? "" : "–");
      const value = entry ? found.difference : -found.difference;
      const ends = entry ? [found.low, found.high] : [-found.high, -found.low];
      const tone = found.is_certain ? (value > 0 ? "up" : "down") : "muted";
      return h(
        "td",
        { title: ends.map((end) => signed(end)).join(" to ") },
        h("span", { class: `figure ${tone}` }, signed(value)),
      );
    };
    return h(
      "section",
      { class: "card" },
      h("h2", {}, `Which methods differ, ${form}`),
      h(
        "p",
        { class: "muted" },
        `Row minus column, percent points; coloured where the interval of the paired bootstrap ` +
          `(${percent(100 * record.confidence.methods, 2)} % each, 95 % for all together) does not hold 0.`,
      ),
      h(
        "div",
        { class: "scrolling" },
        h(
          "table",
          { class: "methods matrix" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", {}),
              names.map((name) => h("th", {}, name)),
            ),
          ),
          h(
            "tbody",
            {},
            names.map((name) =>
              h(
                "tr",
                {},
                h("td", {}, name),
                names.map((other) => cell(name, other)),
              ),
            ),
          ),
        ),
      ),
    );
  }

  function problems(record) {
    const lacking = record.rows.filter((row) => row.missing.length || row.errors.length);
    if (!lacking.length) return null;
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Rows that were not run"),
      h(
        "dl",
        { class: "facts" },
        lacking.map((row) =>
          h(
            "div",
            {},
            h("dt", {}, `${row.method}, ${row.form}`),
            h("dd", { class: "break" }, [...row.missing, ...row.errors].join(" ")),
          ),
        ),
      ),
    );
  }

  function render(query) {
    const { methods: record } = get("summary");
    const form = record.forms.includes(query.get("form")) ? query.get("form") : ALL;
    const choose = (value) => Report.address.change({ form: value === ALL ? null : value }, { isStep: true });
    const worlds = record.worlds.length > 1 ? `, ${record.worlds.length} worlds` : "";
    const images = Math.max(0, ...record.rows.map((row) => row.images ?? 0));
    return h(
      "div",
      { class: "view methods-view" },
      h(
        "section",
        { class: "card" },
        h(
          "div",
          { class: "card-head" },
          h("h2", {}, record.title),
          Report.segmented(
            "Form",
            [ALL, ...record.forms].map((name) => [name, name]),
            form,
            choose,
          ),
        ),
        h(
          "p",
          { class: "muted" },
          `${record.dataset} ${record.split}${worlds}, ${images} pictures. The same as `,
          h("a", { href: "../table.csv" }, "table.csv"),
          " and ",
          h("a", { href: "../table.md" }, "table.md"),
          ".",
        ),
        table(form),
        record.notes.map((note) => h("p", { class: "muted small" }, note)),
      ),
      h(
        "section",
        { class: "card" },
        h("h2", {}, "Quality against time"),
        h("img", {
          class: "figure-picture",
          src: "fit/quality_time.svg",
          alt: "A point for each form of each method: mIoU with its interval against the seconds of a picture",
        }),
      ),
      (form === ALL ? record.forms : [form]).map(differences),
      problems(record),
    );
  }

  return { title: "Methods", render };
})();
