"use strict";
/* Set light or dark (the reader's choice, else the system's) before anything is drawn, so that nothing flashes. */

document.documentElement.dataset.theme = (() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("moduseg-theme");
  } catch {
    /* private windows keep nothing */
  }
  return chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
})();
