"use strict";
/* The page's one global: data that scripts hand over, small helpers for elements and numbers, theme, tooltip. */

window.Report = (() => {
  const values = new Map();
  const waiting = new Map();
  /* Large values that can be loaded again are dropped, the oldest first, so that long visits need no more memory. */
  const FORGETTABLE = /^(labels|why|heat)\//;
  const REMEMBERED = 400;

  /** Store a value; every script below data/ calls this. */
  function receive(key, value) {
    values.set(key, value);
    if (values.size > REMEMBERED) {
      for (const old of values.keys()) {
        if (values.size <= REMEMBERED) break;
        if (FORGETTABLE.test(old) && old !== key) values.delete(old);
      }
    }
  }

  /** Load the value of data/<key>.js. It is a script because a page on disk may not fetch its own files. */
  function load(key) {
    if (values.has(key)) return Promise.resolve(values.get(key));
    if (!waiting.has(key)) {
      waiting.set(
        key,
        new Promise((resolve, reject) => {
          const script = document.createElement("script");
          script.src = `data/${key}.js`;
          script.onload = () => {
            resolve(values.get(key));
            script.remove();
            waiting.delete(key);
          };
          script.onerror = () => {
            reject(new Error(`data/${key}.js is missing`));
            script.remove();
            waiting.delete(key);
          };
          document.head.append(script);
        }),
      );
    }
    return waiting.get(key);
  }

  const get = (key) => values.get(key);

  /** Make an element. Text is never parsed as markup, since names of images and classes come from files. */
  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style")
        for (const [key, setting] of Object.entries(value)) element.style.setProperty(key, setting);
      else if (name in element && name !== "list" && typeof value === "boolean") element[name] = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  /** Make an SVG element with one path; it is parsed from text, which sets the name space. */
  function svg(viewBox, path, name) {
    const template = document.createElement("template");
    template.innerHTML = `<svg viewBox="${viewBox}" class="${name}" aria-hidden="true"><path></path></svg>`;
    const element = template.content.firstElementChild;
    element.firstElementChild.setAttribute("d", path);
    return element;
  }
  const icon = (path) => svg("0 0 24 24", path, "icon");

  const ICONS = {
    left: "M15 5l-7 7 7 7",
    right: "M9 5l7 7-7 7",
    close: "M6 6l12 12M18 6L6 18",
    plus: "M12 5v14M5 12h14",
    minus: "M5 12h14",
    fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
    copy: "M9 9h11v11H9zM5 15H4V4h11v1",
    check: "M5 13l4 4L19 7",
    sun:
      "M12 8a4 4 0 100 8 4 4 0 000-8zM12 2v2M12 20v2M4.9 4.9l1.4 1.4M17.7 17.7l1.4 1.4" +
      "M2 12h2M20 12h2M4.9 19.1l1.4-1.4M17.7 6.3l1.4-1.4",
    moon: "M20 14.5A8 8 0 019.5 4 8 8 0 1020 14.5z",
    outline: "M4 4h7v7H4zM13 13h7v7h-7zM13 4h7v7h-7zM4 13h7v7H4z",
    back: "M10 6l-6 6 6 6M4 12h16",
  };

  const percent = (value, digits = 1) =>
    value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits);
  const signed = (value, digits = 1) =>
    value === null || value === undefined
      ? "–"
      : `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(value).toFixed(digits)}`;
  /** Return a measure's value, or a value for each class; undefined if the measure did not apply. */
  const valueOf = (measure, record) => measure.name.split(".").reduce((value, key) => value?.[key], record);
  /** Return a value of a measure as text. */
  const formatted = (measure, value) => `${percent(value, measure.decimals)} ${measure.unit}`.trim();
  const integer = (value) => Math.round(value).toLocaleString("en");
  const numbered = (index) => String(index).padStart(6, "0");
  function duration(seconds) {
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
    return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
  }

  /** Make the coloured square of a label, with its name on hover. */
  const swatch = (label) => h("i", { class: "swatch", title: nameOf(label), style: { "--c": colour(label) } });
  const colour = (label) => {
    const { colours, ignore } = get("summary");
    return label === ignore ? colours[colours.length - 1] : colours[label] || "#888888";
  };
  const nameOf = (label) => {
    const { classes, ignore } = get("summary");
    return label === ignore ? "ignored" : (classes[label] ?? `id ${label}`);
  };

  /* Theme: the system's, until the reader chooses. */
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("moduseg-theme");
    } catch {
      return null;
    }
  };
  const listeners = [];
  function applyTheme() {
    const theme = stored() || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.replaceChildren(icon(theme === "dark" ? ICONS.sun : ICONS.moon));
    for (const listener of listeners) listener(theme);
  }
  function toggleTheme() {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("moduseg-theme", next);
    } catch {
      /* private windows forget the choice */
    }
    applyTheme();
    if (document.documentElement.dataset.theme !== next) document.documentElement.dataset.theme = next;
  }
  dark.addEventListener("change", applyTheme);
  const onTheme = (listener) => listeners.push(listener);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /* One tooltip for canvases. */
  function tip(x, y, ...content) {
    const box = document.getElementById("tip");
    box.replaceChildren(...content);
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
    box.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  }
  const hideTip = () => {
    document.getElementById("tip").hidden = true;
  };

  /** Make a row of buttons with one chosen. `options` are [value, text]; arrow keys move the choice. */
  function segmented(label, options, chosen, onChoose) {
    const box = h("div", { class: "segmented", role: "radiogroup", "aria-label": label });
    const choose = (value, focus) => {
      for (const button of box.children) {
        const on = button.dataset.value === value;
        button.setAttribute("aria-checked", String(on));
        button.tabIndex = on ? 0 : -1;
        if (on && focus) button.focus();
      }
    };
    for (const [value, text] of options) {
      box.append(
        h(
          "button",
          {
            type: "button",
            role: "radio",
            "data-value": value,
            onclick: () => {
              choose(value);
              onChoose(value);
            },
          },
          text,
        ),
      );
    }
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const at = options.findIndex(([value]) => box.querySelector('[aria-checked="true"]').dataset.value === value);
      const [value] = options[(at + step + options.length) % options.length];
      choose(value, true);
      onChoose(value);
    });
    choose(chosen);
    box.choose = choose;
    return box;
  }

  /** Give a canvas the screen's resolution, and return its context, scaled to CSS pixels. */
  function sharp(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  /** Let the browser save a text as a file. */
  function save(name, text, type) {
    const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  return {
    receive,
    load,
    get,
    h,
    svg,
    icon,
    ICONS,
    percent,
    valueOf,
    formatted,
    signed,
    integer,
    numbered,
    duration,
    swatch,
    colour,
    nameOf,
    applyTheme,
    toggleTheme,
    onTheme,
    css,
    tip,
    hideTip,
    segmented,
    save,
    sharp,
    views: {},
  };
})();
