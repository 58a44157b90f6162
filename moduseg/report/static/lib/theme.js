"use strict";
/* Before anything is drawn: the reader's choice of light or dark, else the system's, so that no page flashes. */

document.documentElement.dataset.theme = (() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("moduseg-theme");
  } catch {
    /* private windows keep nothing */
  }
  return chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
})();
