"use strict";
/* The state of the page is its address, so that a copied address shows the same and the browser's Back undoes a step:
   #/<part>/image/<n>?key=value. What was chosen in a part, and in the image over it, are keys of one query. */

Report.address = (() => {
  /** Keys that belong to the open image or region, not to the part behind it. */
  const OVERLAY_KEYS = ["layer", "proposal", "rows"];

  /** Return { tab, image, query } of the address. `image` is a position, or null. */
  function read() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
    const [, tab, image] = path.match(/^(?:(?!image\/)([a-z]+))?\/?(?:image\/(\d+))?/) || [];
    return { tab: tab || "", image: image === undefined ? null : Number(image), query: new URLSearchParams(query) };
  }

  function write(tab, image, query) {
    const text = query.toString();
    return `#/${tab}${image === null ? "" : `${tab ? "/" : ""}image/${image}`}${text ? `?${text}` : ""}`;
  }

  /** Return the query without what is empty and, unless `keepsOverlay`, without the keys of an open image. */
  function tidy(query, keepsOverlay) {
    const result = new URLSearchParams();
    for (const [key, value] of query)
      if (value !== "" && (keepsOverlay || !OVERLAY_KEYS.includes(key))) result.set(key, value);
    return result;
  }

  /** Return the address of an image over a part; the part's own keys stay if it is the one shown. */
  function ofImage(tab, image) {
    const here = read();
    const query = tidy(here.tab === tab ? here.query : new URLSearchParams(), false);
    const { layer } = Object.fromEntries(here.query);
    if (layer && here.image !== null) query.set("layer", layer);
    return write(tab, image, query);
  }

  /** Return the query of the part behind an open image, as text: equal texts show the same part. */
  const ofPart = () => tidy(read().query, false).toString();

  /**
   * Change keys of the address; `null` or "" removes one.
   * @param {Object} changes @param {{ isStep?: boolean, image?: ?number }} options a step can be undone with Back, and
   *   is shown at once; anything else replaces the address, and whoever calls shows it
   */
  function change(changes, { isStep = false, image } = {}) {
    const here = read();
    for (const [key, value] of Object.entries(changes)) here.query.set(key, value ?? "");
    const hash = write(here.tab, image === undefined ? here.image : image, tidy(here.query, true));
    if (hash === location.hash) return;
    if (isStep) {
      history.pushState({ step: (history.state?.step ?? 0) + 1 }, "", hash);
      Report.route();
    } else {
      history.replaceState(history.state, "", hash);
      Report.settle();
    }
  }

  /** Undo the last step; if the page was opened at this address, make `changes`, which lead to what is above. */
  function up(changes) {
    if (history.state?.step) {
      history.back();
      return;
    }
    change(changes);
    Report.route();
  }

  /** Return the bank regions that were opened one after the other. */
  const rows = () => (read().query.get("rows") ?? "").split(".").filter(Boolean).map(Number);

  return { read, ofImage, ofPart, change, up, rows };
})();
