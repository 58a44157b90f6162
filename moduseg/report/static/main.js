"use strict";
/* Show the part that the address names: #/<part>?key=value, with /image/<n> appended for one image. */

(() => {
  const { h, get, views } = Report;
  const main = document.getElementById("main");
  const summary = get("summary");
  const tabs = [
    "overview",
    ...(summary.record ? ["classes"] : []),
    "images",
    ...(summary.bank ? ["bank"] : []),
    ...(summary.compare ? ["compare"] : []),
  ];
  let shown = { key: null, address: null };

  const score = summary.record ? `, mIoU ${Report.percent(summary.record.miou)} %` : "";
  document.title = `${summary.dataset} ${summary.split}${score}`;
  document.getElementById("brand-name").textContent = `${summary.dataset} ${summary.split}`;
  document.getElementById("brand-run").textContent = summary.run;
  document
    .getElementById("tabs")
    .append(
      ...tabs.map((key) => h("a", { href: `#/${key === "overview" ? "" : key}`, "data-tab": key }, views[key].title)),
    );
  document.getElementById("theme").addEventListener("click", Report.toggleTheme);
  document.addEventListener("keydown", (event) => {
    if (event.key === "t" && !event.ctrlKey && !event.metaKey && !event.target.matches("input, select, textarea"))
      Report.toggleTheme();
  });

  function route() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
    const [, tab, image] = path.match(/^([a-z]*)\/?(?:image\/(\d+))?/) || [];
    const key = tabs.includes(tab) ? tab : "overview";
    const address = `${key}?${query || ""}`;
    // Opening or closing an image keeps the part behind it; only another part or another query renders.
    if (key !== shown.key || (query && address !== shown.address)) {
      shown = { key, address };
      Report.hideTip();
      main.replaceChildren(views[key].render(new URLSearchParams(query)));
      for (const link of document.querySelectorAll("[data-tab]")) {
        if (link.dataset.tab === key) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      if (image === undefined) scrollTo(0, 0);
    }
    const position = Number(image);
    if (image !== undefined && position < get("images").ids.length) Report.viewer.show(position);
    else if (Report.viewer.open) Report.viewer.close();
  }

  Report.applyTheme();
  addEventListener("hashchange", route);
  route();
})();
