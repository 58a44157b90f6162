"use strict";
/* Two runs over the same images: the difference of each class with its interval, images ordered by their difference. */

Report.views.compare = (() => {
  const { h, get, percent, signed, swatch, numbered } = Report;
  let order = "gain";
  let show = "labels";

  function difference(name, entry, label, range, { decimals = 1, is_larger_better: isLargerBetter = true } = {}) {
    const at = (value) => `${50 + (50 * value) / range}%`;
    const isScored = entry.difference !== null;
    const isBetter = isLargerBetter ? entry.difference >= 0 : entry.difference <= 0;
    const isCertain = isScored && entry.low !== null && (entry.low > 0 || entry.high < 0);
    return h(
      "div",
      {
        class: `difference${isCertain ? "" : " unsure"}`,
        title: isScored ? `${signed(entry.low, decimals)} to ${signed(entry.high, decimals)}` : "in neither",
      },
      h("span", { class: "bar-name" }, label === null ? null : swatch(label), h("span", {}, name)),
      h("span", { class: "number" }, percent(entry.first, decimals)),
      h("span", { class: "number" }, percent(entry.second, decimals)),
      h(
        "span",
        { class: "difference-track" },
        isScored && entry.low !== null
          ? h("i", {
              class: "whisker",
              style: { left: at(entry.low), width: `calc(${at(entry.high)} - ${at(entry.low)})` },
            })
          : null,
        isScored ? h("i", { class: `dot ${isBetter ? "up" : "down"}`, style: { left: at(entry.difference) } }) : null,
      ),
      h("span", { class: "number strong" }, signed(entry.difference, decimals)),
    );
  }

  /** Return the largest distance from 0 of differences and their intervals, `least` at least. */
  function rangeOf(entries, least) {
    const values = entries.flatMap((entry) => [entry.difference, entry.low, entry.high]).filter((v) => v !== null);
    return Math.max(least, ...values.map(Math.abs));
  }

  function table(compare) {
    const { classes, measures } = get("summary");
    const entries = Object.entries(compare.classes).filter(([, entry]) => entry.difference !== null);
    const compared = measures.filter(({ name }) => name in compare.measures);
    const inPercent = compared.filter(({ unit }) => unit === "%").map(({ name }) => compare.measures[name]);
    const range = rangeOf([...entries.map(([, entry]) => entry), ...inPercent], 1);
    entries.sort((a, b) => b[1].difference - a[1].difference);
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Difference, class by class"),
      h(
        "p",
        { class: "muted" },
        `Percent points; ${100 * compare.confidence} % interval over ${compare.resamples} paired resamples ` +
          `of ${compare.images} images. Pale: the interval holds 0.`,
      ),
      h(
        "div",
        { class: "differences" },
        h(
          "div",
          { class: "difference head" },
          h("span", {}),
          h("span", { class: "number break", title: compare.first }, "first"),
          h("span", { class: "number break", title: compare.second }, "second"),
          h("span", {}),
          h("span", { class: "number" }, "change"),
        ),
        compared.map((measure) => {
          const entry = compare.measures[measure.name];
          if (measure.unit === "%") return difference(measure.title, entry, null, range, measure);
          const title = `${measure.title} (${measure.unit || "number"})`;
          return difference(title, entry, null, rangeOf([entry], Number.EPSILON), measure);
        }),
        entries.map(([name, entry]) => difference(name, entry, classes.indexOf(name), range)),
      ),
    );
  }

  function tile(entry, list) {
    const { index, change } = entry;
    const images = get("images");
    const frames = ["labels", "second"].map((key) => {
      const canvas = h("canvas", { hidden: true });
      if (show !== "photo") {
        Report.codec.mapsOf(index).then((maps) => {
          if (!maps[key]) return;
          if (show === "errors" && maps.truth) Report.paint.errors(canvas, maps.truth, maps[key]);
          else Report.paint.labels(canvas, maps[key]);
          canvas.hidden = false;
        });
      }
      return h(
        "span",
        { class: "frame" },
        images.photographs[index]
          ? h("img", { src: `photos/${numbered(index)}.jpg`, alt: "", decoding: "async", draggable: "false" })
          : null,
        canvas,
      );
    });
    return h(
      "a",
      {
        class: "tile pair",
        href: Report.address.ofImage("compare", index),
        "data-index": index,
        onclick: () => {
          Report.views.images.list = list;
        },
        "aria-label": `${images.ids[index]}, change of mIoU ${signed(change)} percent points`,
      },
      h("span", { class: "frames" }, frames),
      h(
        "span",
        { class: "caption" },
        h("span", { class: `figure ${change < 0 ? "down" : change > 0 ? "up" : ""}` }, signed(change)),
        h(
          "span",
          { class: "muted" },
          `${percent(Report.scores.all()[index].miou)} → ${percent(Report.scores.all("second")[index].miou)}`,
        ),
        h("small", {}, images.ids[index]),
      ),
    );
  }

  function render() {
    const { compare } = get("summary");
    const [first, second] = [Report.scores.all(), Report.scores.all("second")];
    const entries = first
      .map((_, index) => index)
      .filter((i) => first[i] && second[i])
      .map((index) => ({ index, change: second[index].miou - first[index].miou }));
    const signs = {
      gain: (a, b) => b.change - a.change,
      loss: (a, b) => a.change - b.change,
      size: (a, b) => Math.abs(b.change) - Math.abs(a.change),
    };
    const grid = new Report.Grid(() => h("span"), {
      width: 300,
      ratio: 2 * Report.ratio,
      label: "Images by difference",
    });
    const refresh = () => {
      const sorted = [...entries].sort((a, b) => signs[order](a, b) || a.index - b.index);
      const list = sorted.map((entry) => entry.index);
      Report.views.images.list = list;
      grid.make = (entry) => tile(entry, list);
      grid.show(sorted);
    };
    queueMicrotask(refresh);
    const better = entries.filter((e) => e.change > 0.05).length;
    const worse = entries.filter((e) => e.change < -0.05).length;
    return h(
      "div",
      { class: "view compare" },
      h(
        "section",
        { class: "card hero" },
        h(
          "div",
          { class: "hero-number" },
          h("p", { class: "eyebrow" }, "change of mIoU"),
          h("p", { class: "big" }, signed(compare.miou.difference)),
          h(
            "p",
            { class: "muted" },
            `${signed(compare.miou.low)} to ${signed(compare.miou.high)}; ${better} images better, ${worse} worse, ` +
              `${entries.length - better - worse} as they were`,
          ),
        ),
        h(
          "div",
          {},
          h(
            "dl",
            { class: "facts" },
            [
              ["first", compare.first, compare.miou.first],
              ["second", compare.second, compare.miou.second],
            ].map(([name, run, value]) =>
              h("div", {}, h("dt", {}, name), h("dd", { class: "break" }, `${run}, ${percent(value)} %`)),
            ),
          ),
          compare.changes.length
            ? [
                h("h3", {}, "What was configured otherwise"),
                h(
                  "dl",
                  { class: "facts changes" },
                  compare.changes
                    .slice(0, 12)
                    .map(([key, before, after]) =>
                      h("div", {}, h("dt", {}, key), h("dd", { class: "break" }, `${before} → ${after}`)),
                    ),
                ),
              ]
            : null,
        ),
      ),
      table(compare),
      h(
        "div",
        { class: "toolbar" },
        Report.segmented(
          "Order",
          [
            ["gain", "most gained"],
            ["loss", "most lost"],
            ["size", "largest change"],
          ],
          order,
          (value) => {
            order = value;
            refresh();
          },
        ),
        Report.segmented(
          "Show",
          [
            ["labels", "predictions"],
            ["errors", "errors"],
            ["photo", "photographs"],
          ],
          show,
          (value) => {
            show = value;
            refresh();
          },
        ),
      ),
      grid.element,
    );
  }

  return { title: "Compare", render };
})();
