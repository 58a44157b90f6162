"use strict";
/* Show the part that the address names: #/<part>?key=value, with /image/<n> appended for one image. */

(() => {
  const { h, get, views } = Report;
  const main = document.getElementById("main");
  const summary = get("summary");
  const ofRun = [
    "overview",
    ...(summary.record ? ["classes"] : []),
    "images",
    ...(summary.bank ? ["bank"] : []),
    ...(summary.compare ? ["compare"] : []),
  ];
  // A table of methods is a page of its own: it has no run, and no images.
  const tabs = summary.methods ? ["methods"] : ofRun;
  let shown = { key: null, address: null };
  // Pictures are framed in the shape that most images have, so that few frames have empty edges.
  const ratios = get("images")
    .sizes.map(([height, width]) => width / height)
    .sort((a, b) => a - b);
  Report.ratio = Math.max(0.6, Math.min(2.2, ratios[Math.floor(ratios.length / 2)] ?? 4 / 3));
  document.documentElement.style.setProperty("--ratio", String(Report.ratio));

  const score = summary.record ? `, mIoU ${Report.percent(summary.record.miou)} %` : "";
  document.title = `${summary.dataset} ${summary.split}${score}`;
  document.getElementById("brand-name").textContent = `${summary.dataset} ${summary.split}`;
  document.getElementById("brand-run").textContent = summary.run;
  document
    .getElementById("tabs")
    .append(
      ...tabs.map((key) => h("a", { href: `#/${key === tabs[0] ? "" : key}`, "data-tab": key }, views[key].title)),
    );
  document.getElementById("theme").addEventListener("click", Report.toggleTheme);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.target.matches("input, select, textarea")) return;
    if (event.key === "t") Report.toggleTheme();
    if (event.key === "?") Report.help();
  });
  document.getElementById("keys").addEventListener("click", Report.help);

  function route() {
    const { tab, image, query } = Report.address.read();
    const key = tabs.includes(tab) ? tab : tabs[0];
    const address = `${key}?${Report.address.ofPart()}`;
    // Opening or closing an image keeps the part behind it; only another part or another choice in it renders.
    if (key !== shown.key || address !== shown.address) {
      shown = { key, address };
      Report.hideTip();
      main.replaceChildren(views[key].render(query));
      for (const link of document.querySelectorAll("[data-tab]")) {
        if (link.dataset.tab === key) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      if (image === null) scrollTo(0, 0);
    }
    if (image !== null && image < get("images").ids.length) Report.viewer.show(image);
    else if (Report.viewer.open) Report.viewer.close();
    if (key === "bank") views.bank.follow(image === null ? Report.address.rows() : []);
  }
  /* A choice that replaces the address silently is shown already. */
  Report.settle = () => {
    shown.address = `${shown.key}?${Report.address.ofPart()}`;
  };

  Report.applyTheme();
  addEventListener("hashchange", route);
  Report.route = route;
  route();
})();
