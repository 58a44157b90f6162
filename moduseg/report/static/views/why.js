"use strict";
/* Panels that say why a proposal has its label (votes, neighbours), and what a region of the bank did. */

Report.why = (() => {
  const { h, get, swatch, nameOf, percent, integer } = Report;
  let bank = null;

  /** Load and decode the bank's columns, once. */
  async function open() {
    if (bank) return bank;
    const content = await Report.load("bank");
    const { numbers, neighbours } = Report.codec;
    const pictureAt = new Map(content.pictured.map((row, i) => [row, i]));
    const guilty = new Map(content.worst.map((entry) => [entry.row, entry]));
    bank = {
      ...content,
      labels: numbers(content.labels, 2),
      image: numbers(content.image, 4),
      areas: numbers(content.areas, 4),
      used: numbers(content.used, 4),
      searched: numbers(content.searched, 2),
      neighboursOf: neighbours(content.neighbours),
      pictureAt,
      guilty,
      names: get("summary").classes,
    };
    Report.corrections.open(bank);
    return bank;
  }

  const picture = (row) =>
    bank.pictureAt.has(row)
      ? h("img", { src: `bank/${Report.numbered(row)}.jpg`, alt: "", loading: "lazy", decoding: "async" })
      : h("span", { class: "no-photo" }, "no picture");

  /** Make a card of a bank region; `foot` is written below its label. */
  function card(row, foot, onOpen, voted = true) {
    const label = bank.labels[row];
    return h(
      "button",
      {
        type: "button",
        class: `region-card${voted ? "" : " other"}`,
        "data-row": row,
        style: { "--c": Report.colour(label) },
        title: `${nameOf(label)}, ${bank.ids[bank.image[row]]}, ${integer(bank.areas[row])} pixels`,
        onclick: () => onOpen(row),
      },
      picture(row),
      h("span", { class: "region-label" }, swatch(label), nameOf(label)),
      h("span", { class: "region-foot" }, foot),
    );
  }

  const similarity = (value) => [
    h("span", { class: "bar thin" }, h("i", { style: { width: `${Math.max(0, 100 * value)}%` } })),
    h("span", { class: "number" }, value.toFixed(3)),
  ];

  /** Make the panel of a proposal: `why` is of its image, `onOpen(row)` is called if a region is clicked. */
  async function proposal(why, index, onOpen) {
    const head = h(
      "div",
      { class: "card-head" },
      h("h3", {}, `Proposal ${index + 1} of ${why.area.length}`),
      h("small", { class: "muted" }, `${integer(why.area[index])} pixels`),
    );
    if (!why.label)
      return h(
        "div",
        { class: "why" },
        head,
        h("p", { class: "muted" }, "The vectors of this run are not stored, so its neighbours are not known."),
      );
    await open();
    const votes = why.votes[index];
    const label = why.label[index];
    const kept = why.kept.indexOf(index);
    const neighbours = Report.codec.neighbours(why.neighbours)(index);
    const total = votes.reduce((sum, [, count]) => sum + count, 0);
    const { selection } = get("summary").retrieval;
    const isMajority = ["majority", "shares"].includes(selection);
    // A set is chosen as a whole: what is not in it may have any score.
    const isSet = ["margin", "similarity", "learnt"].includes(selection);
    const state = isMajority
      ? "each pixel takes the label of most regions that hold it; this is one of them"
      : kept < 0 && !(isSet && label === 0)
        ? isSet
          ? "not in the label map: the regions that were chosen say more about these pixels"
          : "not in the label map: a region of the same label with a higher score covers it"
        : label === 0
          ? "background, so nothing is drawn"
          : kept === 0
            ? `in the label map; no region ${isSet ? "that was chosen" : "of this image"} has a higher score`
            : `in the label map, below ${kept} region${kept === 1 ? "" : "s"} of a higher score where they overlap`;
    return h(
      "div",
      { class: "why" },
      head,
      h(
        "div",
        { class: "verdict" },
        h("span", { class: "chip big" }, swatch(label), nameOf(label)),
        h("span", {}, "score ", h("b", {}, why.score[index].toFixed(3))),
        why.own[index] < 1
          ? h("span", { class: "muted" }, `mask quality, as the proposer sees it, ${why.own[index].toFixed(2)}`)
          : null,
      ),
      h("p", { class: "muted" }, state),
      votes.length
        ? h(
            "div",
            {
              class: "votes",
              role: "img",
              "aria-label": votes.map(([l, count]) => `${nameOf(l)} ${count}`).join(", "),
            },
            votes.map(([l, count, share, mean], i) =>
              h(
                "div",
                { class: "vote" },
                h(
                  "span",
                  { class: "vote-name" },
                  h("span", { class: "bar-name" }, swatch(l), h("span", {}, nameOf(l))),
                  h("small", {}, `${["winner, ", "runner-up, "][i] ?? ""}mean ${mean.toFixed(3)}`),
                ),
                h("span", { class: "bar" }, h("i", { style: { width: `${100 * share}%` } })),
                h(
                  "span",
                  { class: "number" },
                  `${count} of ${Math.max(total, get("summary").retrieval.top_k ?? total)}`,
                ),
              ),
            ),
          )
        : h("p", { class: "muted" }, "It has no vector, so nothing voted for it."),
      neighbours.length ? h("h3", {}, `Its ${neighbours.length} nearest bank regions`) : null,
      h(
        "div",
        { class: "region-grid" },
        neighbours.map(({ row, similarity: s }) => card(row, similarity(s), onOpen, bank.labels[row] === label)),
      ),
    );
  }

  /** Make the panel of a region: its training image, its votes, its neighbours. `onImage(index)` opens an image. */
  async function region(row, onOpen, onImage) {
    await open();
    const label = bank.labels[row];
    const guilty = bank.guilty.get(row);
    const list = bank.pictureAt.has(row) ? bank.neighboursOf(bank.pictureAt.get(row)) : [];
    return h(
      "div",
      { class: "why region", "data-row": row },
      h(
        "div",
        { class: "card-head" },
        h("h3", {}, swatch(label), nameOf(label)),
        h("small", { class: "muted" }, `bank region ${row}`),
      ),
      Report.corrections.control([row]),
      bank.pictureAt.has(row)
        ? h("img", {
            class: "training",
            src: `bank/image-${Report.numbered(bank.image[row])}.jpg`,
            alt: `Training image ${bank.ids[bank.image[row]]} with its pseudo mask`,
          })
        : null,
      h(
        "p",
        { class: "muted small" },
        "The training image with its pseudo mask: outlined is what purification left, dimmed what it took away.",
      ),
      h(
        "dl",
        { class: "facts" },
        [
          ["training image", bank.ids[bank.image[row]]],
          ["pixels", integer(bank.areas[row])],
          ["a neighbour of", `${integer(bank.used[row])} proposals`],
          ["in the search", bank.searched[row] ? "yes" : "no, an outlier"],
          ...(guilty
            ? [
                ["pixels it labelled right", integer(guilty.right)],
                ["pixels it labelled wrong", integer(guilty.wrong)],
              ]
            : []),
        ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "break" }, value))),
      ),
      guilty
        ? h(
            "div",
            {},
            h("h3", {}, "What it labelled wrong"),
            h(
              "p",
              {},
              guilty.truth
                .filter(([, pixels]) => pixels >= guilty.wrong / 100)
                .map(([l, pixels]) =>
                  h(
                    "span",
                    { class: "chip" },
                    swatch(l),
                    nameOf(l),
                    h("b", {}, `${percent((100 * pixels) / Math.max(1, guilty.wrong), 0)} %`),
                  ),
                ),
            ),
            h(
              "div",
              { class: "strip-row small" },
              guilty.images.map(([position, pixels]) =>
                h(
                  "button",
                  {
                    type: "button",
                    class: "mini",
                    onclick: () => onImage(position),
                    title: get("images").ids[position],
                  },
                  get("images").photographs[position]
                    ? h("img", {
                        src: `photos/${Report.numbered(position)}.jpg`,
                        alt: get("images").ids[position],
                        loading: "lazy",
                      })
                    : null,
                  h("small", {}, `${integer(pixels)} px`),
                ),
              ),
            ),
          )
        : null,
      list.length
        ? [
            h("h3", {}, "Its own nearest regions"),
            h(
              "div",
              { class: "region-grid" },
              list.map(({ row: other, similarity: s }) =>
                card(other, similarity(s), onOpen, bank.labels[other] === label),
              ),
            ),
          ]
        : null,
    );
  }

  /** Shows one panel at a time: a list, a proposal, a bank region. What is shown follows the address. */
  class Trail {
    /** @param {HTMLElement} place @param {(position: number) => void} onImage opens an image of the run */
    constructor(place, onImage) {
      Object.assign(this, { place, onImage, turn: 0 });
    }
    clear(...content) {
      this.turn += 1;
      this.place.replaceChildren(...content);
    }
    /**
     * Show the last of `rows`, regions opened one after the other, else what `first(onOpen)` makes.
     * @param {?Object} above changes of the address that lead one step up; `null` if there is no such step
     */
    async show(rows, first, above) {
      const turn = (this.turn += 1);
      const onOpen = (row) => Report.address.change({ rows: [...rows, row].join(".") }, { isStep: true });
      const panel = rows.length ? await region(rows.at(-1), onOpen, this.onImage) : await first(onOpen);
      if (turn !== this.turn) return;
      const back = above
        ? h(
            "button",
            { type: "button", class: "button small back", onclick: () => Report.address.up(above) },
            Report.icon(Report.ICONS.back),
            "Back",
          )
        : null;
      this.place.replaceChildren(...[back, panel].filter(Boolean));
      if (!back) return;
      // The start of the panel is scrolled into view, as it may be below the image on a narrow screen.
      const { top } = this.place.getBoundingClientRect();
      if (top < 50 || top > innerHeight - 160) this.place.scrollIntoView({ block: "start" });
      back.focus({ preventScroll: true });
    }
  }

  return { open, card, proposal, region, Trail };
})();
