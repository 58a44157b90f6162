"use strict";
/* The overview: measures beside published ones, figures, times, configuration and versions. */

Report.views.overview = (() => {
  const { h, get, percent, integer, duration, valueOf, formatted } = Report;

  function headline(summary) {
    const { record } = summary;
    if (!record) {
      return h(
        "section",
        { class: "card hero" },
        h(
          "div",
          {},
          h("p", { class: "eyebrow" }, `${summary.dataset} ${summary.split}`),
          h("p", { class: "big" }, integer(summary.shown), h("span", { class: "unit" }, " images")),
          h("p", { class: "muted" }, "No ground truth: labels are shown, not scored."),
        ),
      );
    }
    const interval = record.miou_interval;
    return h(
      "section",
      { class: "card hero", "aria-label": "Result" },
      h(
        "div",
        { class: "hero-number" },
        h("p", { class: "eyebrow" }, `mIoU of ${summary.what}s`),
        h("p", { class: "big" }, percent(record.miou), h("span", { class: "unit" }, " %")),
        interval && interval.low !== null
          ? h(
              "p",
              { class: "muted" },
              `${percent(interval.low)} to ${percent(interval.high)} with ${100 * interval.confidence} % confidence, ` +
                "over images",
            )
          : null,
      ),
      scale(summary),
    );
  }

  /** Draw the result with its interval, and published figures if there are any, on one axis. */
  function scale(summary) {
    const { record, published } = summary;
    const interval = record.miou_interval;
    const values = [record.miou, ...published.map((row) => row.value)];
    // The axis covers only the range of the values, in steps of ten.
    const low = Math.max(0, Math.floor((Math.min(...values, interval?.low ?? 100) - 4) / 10) * 10);
    const high = Math.min(100, Math.ceil((Math.max(...values, interval?.high ?? 0) + 4) / 10) * 10);
    const at = (value) => `${(100 * (value - low)) / (high - low)}%`;
    const ticks = [];
    for (let tick = low; tick <= high; tick += high - low > 50 ? 20 : 10)
      ticks.push(h("i", { class: "tick", style: { left: at(tick) } }, h("span", {}, String(tick))));
    const row = (name, value, isThisRun, note) =>
      h(
        "div",
        { class: `scale-row${isThisRun ? " mine" : ""}` },
        h("span", { class: "scale-name", title: note || name }, name),
        h(
          "span",
          { class: "scale-track" },
          isThisRun && interval && interval.low !== null
            ? h("i", {
                class: "whisker",
                style: { left: at(interval.low), width: `calc(${at(interval.high)} - ${at(interval.low)})` },
              })
            : null,
          h("i", { class: "dot", style: { left: at(value) } }),
        ),
        h("span", { class: "scale-value" }, percent(value)),
      );
    const rows = [
      ["this run", record.miou, true, ""],
      ...published.map((p) => [p.method, p.value, false, `${p.source}${p.note ? `; ${p.note}` : ""}`]),
    ]
      .sort((a, b) => b[1] - a[1])
      .map((entry) => row(...entry));
    return h(
      "div",
      {
        class: "scale",
        role: "img",
        "aria-label": `mIoU ${percent(record.miou)} percent${published.length ? " among published figures" : ""}`,
      },
      rows,
      h(
        "div",
        { class: "scale-axis" },
        h("span", { class: "scale-name" }),
        h("span", { class: "scale-track" }, ticks),
        h("span", { class: "scale-value" }),
      ),
    );
  }

  function facts(summary) {
    const { record } = summary;
    const rows = [
      ["data set", summary.dataset],
      ["split", summary.split],
      [
        "images",
        record
          ? `${integer(record.images)} scored` +
            (summary.shown < summary.total ? `, ${integer(summary.shown)} shown` : "")
          : `${integer(summary.shown)} of ${integer(summary.total)}`,
      ],
      ["classes", `${summary.classes.length - 1}${summary.has_background ? " and background" : ", no background"}`],
      ["image-level labels", summary.label_source],
    ];
    if (record) {
      for (const measure of summary.measures) {
        const value = valueOf(measure, record);
        // The mIoU is the headline above, and measures of each class are in the part "Classes".
        if (measure.name !== "miou" && !measure.is_per_class && value !== undefined)
          rows.push([measure.title, formatted(measure, value)]);
      }
      if (record.left_out.length) rows.push(["left out", integer(record.left_out.length)]);
    }
    for (const [name, value, unit, decimals] of summary.figures)
      rows.push([name, formatted({ unit, decimals }, value)]);
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Figures"),
      h(
        "dl",
        { class: "facts" },
        rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
      ),
    );
  }

  function times(summary) {
    if (!summary.seconds.length) return null;
    const total = summary.seconds.reduce((sum, [, seconds]) => sum + seconds, 0);
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Time by step"),
      h("p", { class: "muted" }, `${duration(total)} of work in all`),
      h(
        "div",
        { class: "times" },
        summary.seconds.map(([name, seconds]) =>
          h(
            "div",
            { class: "time" },
            h("span", {}, name),
            h("span", { class: "bar" }, h("i", { style: { width: `${Math.max(0.6, (100 * seconds) / total)}%` } })),
            h("span", { class: "number" }, duration(seconds)),
          ),
        ),
      ),
    );
  }

  function strip(title, entries, more) {
    if (!entries.length) return null;
    return h(
      "section",
      { class: "card strip" },
      h("div", { class: "card-head" }, h("h2", {}, title), h("a", { href: more }, "all images")),
      h(
        "div",
        { class: "strip-row" },
        entries.map((index) => Report.views.images.tile(index, "", entries)),
      ),
    );
  }

  /** Show what a fit drew: its curves at once, the heads of each class when they are asked for. */
  function fit(summary) {
    if (!summary.fit?.length) return null;
    const picture = (path, title) => h("img", { class: "fit-picture", src: path, alt: title, loading: "lazy" });
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Fit"),
      h("p", { class: "muted" }, "Rows are blocks, columns heads; each map is stretched by itself."),
      summary.fit.map(([title, path]) =>
        h("details", { open: title === "training" ? "" : null }, h("summary", {}, title), picture(path, title)),
      ),
    );
  }

  function configuration(summary) {
    const text = h("pre", { tabindex: "0" }, summary.config);
    const button = h(
      "button",
      {
        type: "button",
        class: "button small",
        onclick: async () => {
          await copy(summary.config);
          button.replaceChildren(Report.icon(Report.ICONS.check), "Copied");
          setTimeout(() => button.replaceChildren(Report.icon(Report.ICONS.copy), "Copy"), 1600);
        },
      },
      Report.icon(Report.ICONS.copy),
      "Copy",
    );
    return h(
      "section",
      { class: "card" },
      h("div", { class: "card-head" }, h("h2", {}, "Configuration"), button),
      text,
    );
  }

  /** Copy text. Some browsers deny pages on disk the clipboard; there a selection is copied instead. */
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = h("textarea", { class: "offscreen" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  function render() {
    const summary = get("summary");
    const scores = Report.scores.all();
    const indices = scores ? scores.map((s, i) => i).filter((i) => scores[i]) : get("images").ids.map((_, i) => i);
    const ranked = scores ? [...indices].sort((a, b) => scores[a].miou - scores[b].miou) : indices;
    return h(
      "div",
      { class: "view overview" },
      headline(summary),
      scores
        ? strip("Lowest mIoU", ranked.slice(0, 8), "#/images?sort=low")
        : strip("Images", ranked.slice(0, 8), "#/images"),
      scores ? strip("Highest mIoU", ranked.slice(-8).reverse(), "#/images?sort=high") : null,
      h("div", { class: "columns" }, facts(summary), times(summary)),
      fit(summary),
      h(
        "div",
        { class: "columns wide-left" },
        configuration(summary),
        h(
          "section",
          { class: "card" },
          h("h2", {}, "Versions"),
          h(
            "dl",
            { class: "facts" },
            Object.entries(summary.versions).map(([name, version]) =>
              h("div", {}, h("dt", {}, name), h("dd", {}, version)),
            ),
            h("div", {}, h("dt", {}, "run"), h("dd", { class: "break" }, summary.run)),
          ),
        ),
      ),
    );
  }

  return { title: "Overview", render };
})();
